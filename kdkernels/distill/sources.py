"""Sources: where a stage's teacher tensors come from. A callable: teacher tap names + batch + student taps -> teacher
tensors.

    Frozen(model)          one trained teacher
    Mean([models])         the mean of several teachers, of logits or of probabilities
    Cached(path)           tensors that a teacher computed once, read back by example (`Cached.write` makes the file)
    SelfBranch()           the student's own other taps, detached (the deepest layer teaches the shallow ones)
    Snapshot(cycle)        the student as it was at the last multiple of `cycle` steps
    Peers([models])        students that learn together: each from the mean of the others

`module` is what belongs into checkpoints beside the student (snapshots, peers), or None. Teachers are in eval mode,
without gradients, and outside of `module`: they are neither trained, nor checkpointed, nor wrapped by DDP.
"""

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from .errors import DistillError, unknown
from .taps import Tapped, collect, parse


class Source:
    """Base: `config` is the teacher's (None = the student's own)."""

    config = None
    module: nn.Module | None = None
    peers: Sequence[PreTrainedModel] = ()
    from_student = False

    def bind(self, student: PreTrainedModel) -> None:
        """Called once, before training, with the live student."""

    def to(self, device) -> None:
        """Moves the teachers."""

    def taps(self, names: list[str], batch: dict, students: list[dict], index: int, step: int) -> dict[str, Tapped]:
        """Teacher tensors for network `index`. `students` holds the taps of the student (0) and of its peers (1,
        ...).
        """
        raise NotImplementedError


class Frozen(Source):
    def __init__(self, model: PreTrainedModel):
        self.model = model.eval().requires_grad_(False)
        self.config = model.config

    def to(self, device):
        self.model.to(device)

    def taps(self, names, batch, students, index, step):
        with torch.no_grad():
            return collect(self.model, batch, names)


class Mean(Source):
    """of="values" averages every tap; of="probs" averages the softmax of logits (and returns its logarithm, a logit
    again).
    """

    def __init__(self, models: Sequence[PreTrainedModel], of: str = "values"):
        if of not in ("values", "probs"):
            raise unknown("mean", of, ("values", "probs"))
        if not models:
            raise DistillError("a mean of teachers needs at least one model")
        self.sources = [Frozen(model) for model in models]
        self.of, self.config = of, models[0].config

    def to(self, device):
        for source in self.sources:
            source.to(device)

    def taps(self, names, batch, students, index, step):
        with torch.no_grad():
            return _mean(
                [source.taps(names, batch, students, index, step) for source in self.sources], self.of == "probs"
            )


class SelfBranch(Source):
    from_student = True

    def taps(self, names, batch, students, index, step):
        return {name: _map(torch.detach, students[index][name]) for name in names}


class Snapshot(Source):
    def __init__(self, cycle: int):
        if cycle < 1:
            raise DistillError(f"snapshot: cycle must be a number of steps >= 1, got {cycle}")
        self.cycle = cycle

    def bind(self, student):
        self.student = student
        self.module = copy.deepcopy(student).eval().requires_grad_(False)

    def taps(self, names, batch, students, index, step):
        with torch.no_grad():
            if step % self.cycle == 0:
                self.module.load_state_dict(self.student.state_dict())
            return collect(self.module.eval(), batch, names)


class Peers(Source):
    """Deep mutual learning (arXiv 1706.00384): peers train with the student, under the same matches."""

    from_student = True

    def __init__(self, models: Sequence[PreTrainedModel]):
        self.peers = list(models)
        self.module = nn.ModuleList(models)

    def taps(self, names, batch, students, index, step):
        others = [taps for i, taps in enumerate(students) if i != index]
        return _mean([{name: _map(torch.detach, taps[name]) for name in names} for taps in others], probs=False)


class Cached(Source):
    """Reads a file that `Cached.write` made. Batches need a column `index`, the example's number in the written data
    set.

    Tensors lie example after example, cut to the example's real tokens: tap -> [rows, ...], with `offsets` saying where
    each example starts. The file is memory-mapped.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            self.file = safe_open(path, framework="pt")
            self.examples = int(self.file.metadata()["examples"])
            self.names = json.loads(self.file.metadata()["taps"])
        except FileNotFoundError:
            raise DistillError(f"teacher cache {path}: no such file") from None
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise DistillError(
                f"teacher cache {path}: not a cache or corrupt ({error}); delete it to have it written again"
            ) from error
        self.offsets = {name: self.file.get_tensor(f"{name}/offsets").tolist() for name in self.names}
        self.device = "cpu"

    @staticmethod
    def write(path: str | os.PathLike, source: Source, names: Sequence[str], batches) -> "Cached":
        """Runs `source` over `batches` (dicts of tensors, examples in order) and writes the file whole or not at
        all.
        """
        names = [part for name in names for part in _single(name)]
        parts = {name: [] for name in names}
        for batch in batches:
            taps = source.taps(names, batch, [], 0, 0)
            ends = _ends(batch)
            for name in names:
                value = _rows_first(name, taps[name]).cpu()
                parts[name] += [
                    row[:end] if by_token(name, value) else row[None] for row, end in zip(value, ends, strict=True)
                ]
        tensors = {}
        for name, rows in parts.items():
            tensors[name] = torch.cat(rows).contiguous()
            tensors[f"{name}/offsets"] = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.unfinished")
        save_file(tensors, unfinished, metadata={"examples": str(len(rows)), "taps": json.dumps(names)})
        os.replace(unfinished, path)
        return Cached(path)

    def to(self, device):
        self.device = device

    def taps(self, names, batch, students, index, step):
        if "index" not in batch:
            raise DistillError("a cached teacher needs the examples' numbers: the batch has no column 'index'")
        return {name: self._tap(name, batch) for name in names}

    def _tap(self, name, batch):
        singles = _single(name)
        if len(singles) > 1:
            return tuple(self._tap(single, batch) for single in singles)
        if name not in self.offsets:
            raise DistillError(f"the teacher cache holds {', '.join(self.names)}, not {name!r}")
        rows, offsets = self.file.get_slice(name), self.offsets[name]
        examples = batch["index"].tolist()
        if max(examples) >= self.examples:
            raise DistillError(
                f"the teacher cache holds {self.examples} examples, number {max(examples)} was asked for"
            )
        values = [rows[offsets[i] : offsets[i + 1]] for i in examples]
        width = batch["input_ids"].shape[1]
        if not by_token(name, None) and all(len(value) == 1 for value in values):
            return torch.cat(values).to(self.device)
        padded = torch.stack([nn.functional.pad(v, (0, 0) * (v.dim() - 1) + (0, width - len(v))) for v in values])
        return (padded.transpose(1, 2) if parse(name)[0] in "qkv" else padded).to(self.device)


def by_token(name: str, value: torch.Tensor | None) -> bool:
    """Whether a tap has a row per token; logits have if they are [B, N, V]."""
    kind = parse(name)[0]
    return kind in ("hidden", "q", "k", "v") or (kind == "logits" and value is not None and value.dim() == 3)


def _single(name: str) -> list[str]:
    kind, layer = parse(name)
    return [f"{part}.{layer}" for part in kind] if kind in ("qk", "qkv") else [name]


def _rows_first(name: str, value: torch.Tensor) -> torch.Tensor:
    return value.transpose(1, 2) if parse(name)[0] in ("q", "k", "v") else value


def _ends(batch: dict) -> list[int]:
    """One past the last real token of each example."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None:
        return [ids.shape[1]] * ids.shape[0]
    positions = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return (mask.bool() * positions).amax(1).tolist()


def _map(function, value: Tapped) -> Tapped:
    return tuple(map(function, value)) if isinstance(value, tuple) else function(value)


def _mean(taps: list[dict], probs: bool) -> dict[str, Tapped]:
    def mean(name, values):
        if isinstance(values[0], tuple):
            return tuple(mean(name, part) for part in zip(*values, strict=True))
        if len({value.shape for value in values}) > 1:
            raise DistillError(f"teachers differ in tap {name!r}: {' and '.join(str(list(v.shape)) for v in values)}")
        stacked = torch.stack(values)
        if probs and name == "logits":
            return stacked.float().log_softmax(-1).logsumexp(0) - torch.tensor(len(values)).log()
        return stacked.mean(0)

    return {name: mean(name, [each[name] for each in taps]) for name in taps[0]}
