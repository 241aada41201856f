"""`kdkernels quantize MODEL OUT`: quantises a model, says what that cost and gained, and keeps it if it is good enough.

The deviation is measured on texts against the original: the cosine of what the model gives for a text (a classifier's
logits, else the mean of the last hidden state over real tokens), and the share of texts whose class changes.
"""

import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors import SafetensorError

from .quantize import quantize

BATCH = 32
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")  # without any, transformers makes a tokenizer that knows nothing


@dataclass(frozen=True)
class Measured:
    """One model on the texts: what it gave, its bytes, seconds for one text and for a batch."""

    outputs: torch.Tensor
    bytes: int
    one: float
    batch: float


@dataclass(frozen=True)
class Deviation:
    """How far the quantised model is from the original; `changed` is None where there are no classes."""

    mean_cosine: float
    least_cosine: float
    changed: float | None

    def failures(self, min_cosine: float | None, max_drop: float | None) -> list[str]:
        """What the quality gate has against it, one line each."""
        found = []
        if min_cosine is not None and self.mean_cosine < min_cosine:
            found.append(f"mean cosine {self.mean_cosine:.4f} is below --min-cosine {min_cosine}")
        if max_drop is not None and self.changed is not None and self.changed > max_drop:
            found.append(f"{100 * self.changed:.2f} % of the classes change, more than --max-drop {max_drop}")
        return found


def run(
    model: str,
    out: str | os.PathLike,
    *,
    scheme: str,
    skip: Sequence[str] = (),
    texts: Sequence[str],
    min_cosine: float | None = None,
    max_drop: float | None = None,
    console: Console | None = None,
) -> int:
    """Loads, quantises, measures, prints a table; writes `out` whole unless the gate fails. Returns the exit status."""
    console = console or Console()
    out = Path(out)
    _check_out(out)
    for option, share in (("--min-cosine", min_cosine), ("--max-drop", max_drop)):
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{option} must be a number from 0 to 1, got {share}")
    loaded, tokenizer = load(model)
    if max_drop is not None and not _classifies(loaded):
        raise ValueError(f"--max-drop needs a sequence classifier, got {type(loaded).__name__}")
    with console.status("measuring the original"):
        before = measure(loaded, tokenizer, texts)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"quantising to {scheme}", total=None)
        quantize(loaded, scheme, skip=skip, progress=lambda done, all: bar.update(task, completed=done, total=all))
    with console.status("measuring the quantised model"):
        after = measure(loaded, tokenizer, texts)
    deviation = compare(before.outputs, after.outputs, _classifies(loaded))
    console.print(table(before, after, deviation, len(texts)))
    if failures := deviation.failures(min_cosine, max_drop):
        for line in failures:
            console.print(f"quality gate: {line}")
        console.print("nothing was written")
        return 1
    save(loaded, tokenizer, out)
    console.print(f"written to {out}")
    return 0


def load(model: str):
    """(model in eval mode, tokenizer) of a local folder or a name on the Hub. ValueError names what is missing."""
    folder = Path(model)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(
            f"MODEL {model} is no folder that save_pretrained of transformers wrote: it has no config.json"
        )
    if folder.exists() and not any(file for files in _TOKENIZER_FILES for file in folder.glob(files)):
        raise ValueError(
            f"MODEL {model} has no tokenizer: save_pretrained of the tokenizer writes it to the same folder"
        )
    cached = not folder.exists() and not _hub_answers()
    try:
        loaded, found = model_class(model, cached).from_pretrained(
            model, local_files_only=cached, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=cached)
    except (OSError, ValueError, SafetensorError) as error:
        if not folder.exists():
            why = "can't be reached" if cached else "gives no model of this name"
            raise ValueError(f"MODEL {model}: no such folder, and the Hub {why}") from error
        raise ValueError(f"MODEL {model} can't be loaded: {error}") from error
    except RuntimeError as error:  # transformers' own message is about a report that is not printed here
        raise ValueError(
            f"MODEL {model} can't be loaded: its weights don't have the shapes of its config.json"
        ) from error
    if loaded.main_input_name != "input_ids" or loaded.config.is_encoder_decoder or loaded.can_generate():
        raise ValueError(f"MODEL {model} is a {type(loaded).__name__}, which is no encoder of texts")
    if missing := sorted(name for name in found["missing_keys"] if "pooler" not in name):  # which embedders leave out
        raise ValueError(
            f"MODEL {model} can't be loaded: its files lack {len(missing)} of the model's weights, {missing[0]} for one"
        )
    return loaded.eval(), tokenizer


def _hub_answers() -> bool:
    """One question to the Hub: huggingface_hub asks for each file six times, in 25 s, before it gives up."""
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:  # of whichever HTTP library this huggingface_hub is built on
        return False
    return True


def model_class(folder: str, cached: bool = False):
    """The class that config.json names; a model of hidden states where it names none. cached: ask no Hub."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=cached)
    if getattr(config, "quantization_config", None):
        raise ValueError("it is quantised already")
    names = config.architectures or []
    return getattr(transformers, names[0], transformers.AutoModel) if names else transformers.AutoModel


@torch.inference_mode()
def measure(model, tokenizer, texts: Sequence[str]) -> Measured:
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512) - 2)
    encode = functools.partial(tokenizer, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    batches = [encode(list(texts[i : i + BATCH])) for i in range(0, len(texts), BATCH)]
    outputs = torch.cat([_per_text(model, batch) for batch in batches])
    tensors = {(x.data_ptr(), x.nbytes) for x in model.state_dict().values()}  # tied ones are one
    size = sum(nbytes for _, nbytes in tensors)
    return Measured(outputs, size, _seconds(model, encode(texts[0]), 20), _seconds(model, batches[0], 5))


def compare(before: torch.Tensor, after: torch.Tensor, classes: bool) -> Deviation:
    cosine = F.cosine_similarity(before, after)
    changed = (before.argmax(1) != after.argmax(1)).float().mean().item() if classes else None
    return Deviation(cosine.mean().item(), cosine.min().item(), changed)


def table(before: Measured, after: Measured, deviation: Deviation, texts: int) -> Table:
    made = Table(title=f"on {texts} texts")
    for heading in ("", "original", "quantised", "ratio"):
        made.add_column(heading, justify="right" if heading else "left")
    for name, old, new, digits in (
        ("size, MB", before.bytes / 1e6, after.bytes / 1e6, 1),
        ("1 text, ms", before.one * 1e3, after.one * 1e3, 2),
        (f"{BATCH} texts, ms", before.batch * 1e3, after.batch * 1e3, 1),
    ):
        made.add_row(name, f"{old:.{digits}f}", f"{new:.{digits}f}", f"{old / new:.1f}x")
    made.add_row("cosine, mean", "1", f"{deviation.mean_cosine:.5f}", "")
    made.add_row("cosine, least", "1", f"{deviation.least_cosine:.5f}", "")
    if deviation.changed is not None:
        made.add_row("classes changed", "", f"{100 * deviation.changed:.2f} %", "")
    return made


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT must be a folder that is new or empty, got {out}")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"OUT {out} can't be made: {parent} is no folder that can be written to")


def save(model, tokenizer, out: Path) -> None:
    """Model and tokenizer into `out`, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if out.exists():
            out.rmdir()
        partial.chmod(0o755)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _classifies(model) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification") and model.config.num_labels > 1


def _per_text(model, batch) -> torch.Tensor:
    """[texts, features] in float32."""
    if _classifies(model):
        return model(**batch).logits.float()
    states = model.base_model(**batch).last_hidden_state.float()
    real = batch["attention_mask"].unsqueeze(-1).float()
    return (states * real).sum(1) / real.sum(1)


def _seconds(model, batch, rounds: int) -> float:
    """The median of a few rounds after one to warm up."""
    model(**batch)
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        model(**batch)
        found.append(time.perf_counter() - start)
    return statistics.median(found)
