"""`python -m benches.run [OP ...]`: our kernels beside their peers, on the rows of `python_tests.cases.BENCHES`.

Each case is first compared with the reference in float64: what does not match is not timed. Then ours, eager and the
best mode of torch.compile run forward and backward in turns (see timing.py), and each gives a row: median and spread,
percentage of the machine's measured ceiling (roofline.py), extra memory (memory.py), error, and what the machine was.
The ratio to a peer is the median of the ratios round by round. Exit status 1 where something did not match or failed;
a missed target is printed and is no failure.

`python -m benches.run quant_linear` measures products with quantised weights (quant_linear.py),
`python -m benches.run encoder` measures quantised encoders (encoder.py).
"""

import argparse
import math
import sys
import time
import traceback
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch

import kdkernels.functional
from python_tests import tolerance
from python_tests.case import OPS, Call, Case
from python_tests.cases import BENCHES, of
from python_tests.steps import STEPS, loss_of

from . import machine, memory, roofline
from .peers import compiled, eager, liger
from .rows import append
from .timing import Runner, interleaved, quick, spread

OURS, EAGER, COMPILE, LIGER, FLOAT32 = "kdkernels", "eager", "torch.compile", "liger", "kdkernels fp32"
PEERS = (EAGER, COMPILE, LIGER)

# Relative to the largest magnitude of the truth. Ours must match; peers only have to compute the same thing, and
# eager bf16 loses a lot.
MATCH = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SAME_FORMULA = 0.25
# Load average above which threads wait for one another; eager code suffers most, which would flatter ours.
BUSY = 0.5
# float64 maps and logits of the large cases would not fit into memory at once.
LARGE, PARTS = 1 << 22, 64

COLUMNS = (
    "op", "case", "implementation", "variant", "dtype", "median_ms", "p20_ms", "p80_ms", "rounds", "ratio", "target",
    "reached", "bytes", "operations", "floor_ms", "bound", "percent_of_ceiling", "extra_bytes", "extra_target",
    "extra_reached", "loss_error", "gradient_error", "ceilings", "machine", "threads", "load", "implementation_of_ours",
    "kdkernels", "torch", "triton", "python", "commit", "when",
)  # fmt: skip


@dataclass(frozen=True)
class Effort:
    """Which peers, and the seconds for the timed rounds and for choosing torch.compile's mode, per case."""

    peers: tuple[str, ...] = PEERS
    seconds: float = 8.0
    compile_seconds: float = 300.0


@dataclass
class Entry:
    """One implementation on one case, and its rows' values as they become known."""

    runner: Runner
    variant: str = ""
    values: dict = field(default_factory=dict)


class Mismatch(Exception):
    """Our result is not the reference's."""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["quant_linear"]:
        from .quant_linear import main as quant_linear  # it needs _native

        return quant_linear(argv[1:])
    if argv[:1] == ["encoder"]:
        from .encoder import main as encoder  # its peers are other libraries

        return encoder(argv[1:])
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        table = of(*arguments.ops, table=BENCHES)
    except ValueError as error:
        parser.error(str(error))
    wanted = arguments.case or [""]
    cases = [case for case in table if case.device == arguments.device and any(text in case.name for text in wanted)]
    if not cases:
        print("benches.run: no case fits; --list shows all", file=sys.stderr)
        return 2
    if arguments.list:
        for case in cases:
            print(f"{case.op:14} {case.name:28} {case.why}")
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("benches.run: --device cuda, but torch sees no GPU", file=sys.stderr)
        return 2
    effort = Effort(tuple(arguments.peers), arguments.seconds, arguments.compile_seconds)
    return 1 if measure_all(cases, arguments.device, effort, arguments.csv) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benches.run", description="Time the fused losses beside their peers."
    )
    parser.add_argument("ops", metavar="OP", nargs="*", help=f"of {', '.join((*OPS, *STEPS))} (default: all)")
    parser.add_argument("--case", metavar="TEXT", nargs="*", help="only cases whose name contains one of these")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default: all that run here")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--seconds", type=float, default=Effort.seconds, help="for the timed rounds of one case (default: %(default)s)"
    )
    parser.add_argument(
        "--compile-seconds",
        type=float,
        default=Effort.compile_seconds,
        help="for trying torch.compile's modes on one case, the first time (default: %(default)s)",
    )
    parser.add_argument("--csv", metavar="PATH", type=Path, help="append the rows to this file")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    return parser


def measure_all(cases: list[Case], device: str, effort: Effort, out: Path | None) -> list[str]:
    """Measures, prints and stores; returns what went wrong, one line per case."""
    facts, ceilings, failures = machine.facts(device), {}, []
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    if device == "cpu" and float(facts["load"]) > BUSY:
        print(
            f"other work keeps this machine busy (load {facts['load']}): these times are not evidence", file=sys.stderr
        )
    for case in cases:
        arithmetic = case.dtypes[0] if device == "cuda" else torch.float32
        if arithmetic not in ceilings:
            ceilings[arithmetic] = roofline.measure(device, arithmetic, torch.get_num_threads())
            print(f"ceilings: {ceilings[arithmetic].described}", flush=True)
        try:
            rows = measure(case, effort, ceilings[arithmetic], facts)
        except Exception as error:  # of whatever kind, the other cases are still wanted
            failures.append(f"{case.id}: {machine.in_a_line(error)}")
            print(f"\n{failures[-1]}", file=sys.stderr, flush=True)
            if not isinstance(error, Mismatch):
                traceback.print_exc()
            if machine.is_lost(device):
                sys.exit(machine.LOST)
            continue
        print(_table(case, rows), flush=True)
        if out is not None:
            append(out, COLUMNS, rows)
    return failures


def measure(case: Case, effort: Effort, ceilings: roofline.Ceilings, facts: dict) -> list[dict]:
    """The rows of one case, ours first."""
    call = case.make()
    entries = _entries(case, call, effort, facts["machine"])
    truth = _truth(case.op, call)
    for entry in list(entries):
        _compare(entry, call, truth, entries)
    del truth
    work = roofline.work(case.op, call)
    floor, bound = ceilings.floor(work)
    for entry in entries:
        entry.values["extra_bytes"] = memory.extra_bytes(entry.runner)
    times = interleaved([entry.runner for entry in entries], effort.seconds)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows = []
    for entry in entries:
        samples = times[entry.runner.name]
        low, middle, high = spread(samples)
        percent = 100 * floor / middle
        rows.append(
            {
                "op": case.op, "case": case.name, "implementation": entry.runner.name, "variant": entry.variant,
                "dtype": str(entry.runner.call.leaves[0].dtype).removeprefix("torch."),
                "median_ms": middle * 1e3, "p20_ms": low * 1e3, "p80_ms": high * 1e3, "rounds": len(samples),
                "bytes": work.bytes, "operations": work.operations, "floor_ms": floor * 1e3, "bound": bound,
                "percent_of_ceiling": percent, "ceilings": ceilings.described, "when": now,
                **entry.values, **facts, **_judgement(case, call, entry, times, percent),
            }
        )  # fmt: skip
    return rows


def _truth(op: str, call: Call):
    """The reference in float64, for large cases in equal parts of the batch, whose losses and gradients are
    averaged."""
    batch = call.leaves[0].shape[0]
    parts = math.gcd(batch, PARTS)
    weighted = any("weight" in name for name in call.student)
    if parts == 1 or "mask" in call.other or weighted or sum(x.numel() for x in call.leaves) < LARGE:
        return tolerance.truth_of(op, call)
    losses, gradients = [], []
    for part in range(parts):
        rows = slice(part * batch // parts, (part + 1) * batch // parts)
        other = {name: x[rows] if torch.is_tensor(x) else x for name, x in call.other.items()}
        loss, grads = tolerance.truth_of(op, call.map(lambda x, rows=rows: x[rows]).with_options(**other))
        losses.append(loss / parts)
        gradients.append([g / parts for g in grads])
    return sum(losses), [torch.cat(pieces) for pieces in zip(*gradients, strict=True)]


def _entries(case: Case, call: Call, effort: Effort, where: str) -> list[Entry]:
    entries = [Entry(Runner(OURS, loss_of(kdkernels.functional, case.op), call))]
    if case.target.float32 is not None:
        entries.append(Entry(Runner(FLOAT32, loss_of(kdkernels.functional, case.op), call.to(torch.float32))))
    if EAGER in effort.peers:
        candidates = [Runner(EAGER, variant, call) for variant in eager.VARIANTS[case.op]]
        fastest = min(candidates, key=quick) if len(candidates) > 1 else candidates[0]
        entries.append(Entry(fastest, fastest.function.__name__))
    if COMPILE in effort.peers:
        function, choice = compiled.best(case, call, where, effort.compile_seconds)
        if function is not None:
            entries.append(Entry(Runner(COMPILE, function, call), choice))
    if LIGER in effort.peers and case.device == "cuda":
        function = liger.peer(case)
        if function is not None:
            entries.append(Entry(Runner(LIGER, function, call)))
    return entries


def _compare(entry: Entry, call: Call, truth, entries: list[Entry]) -> None:
    """Notes the error against float64; ours must match, and a peer that computes something else is dropped."""
    errors = tolerance.errors(entry.runner.function, entry.runner.call, truth)
    relative = [e.largest / max(e.scale, tolerance.TINY) for e in errors]
    entry.values |= {"loss_error": relative[0], "gradient_error": max(relative[1:])}
    ours = entry.runner.name in (OURS, FLOAT32)
    # The float32 run of a bf16 case has the very values of the bf16 inputs, so one truth serves both.
    limit = MATCH[call.leaves[0].dtype] if ours else SAME_FORMULA
    if all(e <= limit for e in relative):
        return
    said = f"loss error {relative[0]:.1e}, gradient error {max(relative[1:]):.1e}, allowed {limit:.0e}"
    if ours:
        raise Mismatch(f"does not match the reference and is not timed: {said}")
    print(f"{entry.runner.name} ({entry.variant}) computes something else and is left out: {said}", file=sys.stderr)
    entries.remove(entry)


def _judgement(case: Case, call: Call, entry: Entry, times: dict, percent: float) -> dict:
    """The peer's ratio to ours beside its target, and for ours memory and the share of the ceiling beside theirs."""
    name, target = entry.runner.name, case.target
    if name == OURS:
        limit = target.memory(call) if target.memory else None
        judged = {
            "extra_target": limit,
            "extra_reached": None if limit is None else entry.values["extra_bytes"] <= limit,
        }
        return judged | ({} if target.share is None else share_of_ceiling(target.share, percent))
    ratio = median(peer / ours for peer, ours in zip(times[name], times[OURS], strict=True))
    goal = {EAGER: target.eager, COMPILE: target.compile, LIGER: target.liger, FLOAT32: target.float32}[name]
    return {"ratio": ratio, "target": goal, "reached": None if goal is None else ratio >= goal}


def share_of_ceiling(goal: float, percent: float) -> dict:
    """What a row of ours says of a goal that is a share of the ceiling."""
    return {"target": f"{goal:g} %", "reached": percent >= goal}


def _table(case: Case, rows: list[dict]) -> str:
    first = rows[0]
    lines = [
        f"\n{case.op} {case.name}: {case.why}; floor {first['floor_ms']:.2f} ms ({first['bound']})",
        f"  {'':16}{'median ms':>10}{'p20':>9}{'p80':>9}{'ceiling':>9}{'extra MB':>10}{'error':>10}   ratio (target)",
    ]
    for row in rows:
        judged = ""
        if row.get("ratio") is not None:
            judged = f"{row['ratio']:6.2f}x" + _verdict(row["target"], row["reached"], "{:g}x".format)
        elif row.get("extra_target") is not None:
            judged = "memory" + _verdict(row["extra_target"], row["extra_reached"], lambda n: f"{n / 1e6:.3g} MB")
            judged += _verdict(row.get("target"), row.get("reached"), str)
        lines.append(
            f"  {row['implementation']:16}{row['median_ms']:10.3f}{row['p20_ms']:9.3f}{row['p80_ms']:9.3f}"
            f"{row['percent_of_ceiling']:8.1f}%{row['extra_bytes'] / 1e6:10.3f}{row['gradient_error']:10.1e}   {judged}"
            + (f"   [{row['variant']}]" if row["variant"] else "")
        )
    return "\n".join(lines)


def _verdict(goal, reached: bool | None, shown) -> str:
    return "" if goal is None else f" ({shown(goal)}: {'pass' if reached else 'MISSED'})"


if __name__ == "__main__":
    started = time.perf_counter()
    status = main()
    print(f"\n{time.perf_counter() - started:.0f} s")
    sys.exit(status)
