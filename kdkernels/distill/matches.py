"""Matches: which tensor of the student is compared with which of the teacher, by which loss, with which weight.

Every loss is a mean over a unit (real tokens, sequences, labelled rows or pairs of real tokens). A global batch is
split over processes and accumulation steps that hold different numbers of units, and the mean of their means is not
the global mean. So a match returns mean x (units here / units in the global batch), and those terms sum to the loss of
the whole batch.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from .. import functional
from .errors import DistillError, unknown
from .schedules import Number, at
from .taps import Tapped, parse

UNITS = ("sequences", "tokens", "pairs", "labels")
_losses = functional


@contextmanager
def losses_from(module):
    """Inside, matches call another module's losses, such as `kdkernels.reference`: how the demo times eager ones."""
    global _losses
    before, _losses = _losses, module
    try:
        yield
    finally:
        _losses = before


@dataclass(frozen=True)
class Match:
    """One term of a stage's loss: weight x op(student tap, teacher tap).

    op: a name in OPS. student, teacher: a tap or a list of taps (as many on both sides; their losses are summed);
    `teacher` defaults to `student`. weight: a number or a schedule. projection: the name of a trained Linear from the
    student's width to the teacher's, for hidden_mse; matches with the same name share it. mask: "tokens" (the batch's
    attention_mask), "labels" (also only where labels are not -100) or "none". gate: a schedule; where it is 0 the term
    is not computed at all. options: keyword arguments of the op; numbers may be schedules; kd_loss takes `labels:
    true` to add the batch's labels.
    """

    op: str
    student: str | tuple[str, ...]
    teacher: str | tuple[str, ...] | None = None
    weight: Number = 1.0
    projection: str | None = None
    mask: str = "tokens"
    gate: Number | None = None
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.op not in OPS:
            raise unknown("op", self.op, OPS)
        if self.mask not in ("tokens", "labels", "none"):
            raise unknown("mask", self.mask, ("tokens", "labels", "none"))
        if self.projection is not None and self.op != "hidden_mse":
            raise DistillError(f"a projection belongs to hidden_mse, not to {self.op}")
        if len(self.student_taps) != len(self.teacher_taps):
            raise DistillError(
                f"{self.op}: {len(self.student_taps)} student taps, {len(self.teacher_taps)} teacher taps"
            )
        for tap in (*self.student_taps, *self.teacher_taps):
            parse(tap)

    @property
    def student_taps(self) -> tuple[str, ...]:
        return (self.student,) if isinstance(self.student, str) else tuple(self.student)

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        taps = self.student if self.teacher is None else self.teacher
        return (taps,) if isinstance(taps, str) else tuple(taps)

    def open(self, step: int) -> bool:
        """Whether this match takes part at this step."""
        return self.gate is None or bool(at(self.gate, step))

    def loss(
        self, student: dict, teacher: dict, batch: dict, projections: nn.ModuleDict, step: int
    ) -> tuple[torch.Tensor, str]:
        """The weighted loss, a scalar, and the unit that it is a mean over. A mismatch raises with both shapes."""
        pairs = [(student[s], teacher[t]) for s, t in zip(self.student_taps, self.teacher_taps, strict=True)]
        for (s, t), names in zip(pairs, zip(self.student_taps, self.teacher_taps, strict=True), strict=True):
            self._check(s, t, names)
        options = {name: at(value, step) for name, value in self.options.items()}
        projection = None if self.projection is None else projections[self.projection]
        mask = None if self.mask == "none" else batch.get("attention_mask")
        value, unit = OPS[self.op].run(pairs, mask, batch, options, projection, self.mask == "labels")
        return at(self.weight, step) * value, unit

    def _check(self, student: Tapped, teacher: Tapped, names: tuple[str, str]) -> None:
        if isinstance(student, tuple) != isinstance(teacher, tuple):
            raise DistillError(f"{self.op}: taps {names[0]!r} and {names[1]!r} are not of the same kind")
        if not isinstance(student, tuple):
            student, teacher = (student,), (teacher,)
        for s, t in zip(student, teacher, strict=True):
            what = _mismatch(self.op, s.shape, t.shape, projected=self.projection is not None)
            if what:
                raise DistillError(
                    f"{self.op}: the {what}: student tap {names[0]!r} {list(s.shape)}, "
                    f"teacher tap {names[1]!r} {list(t.shape)}"
                )

    def __str__(self) -> str:
        """One line of a recipe's objective."""
        weight = f"{self.weight:g}" if isinstance(self.weight, (int, float)) else str(self.weight)
        arguments = [_taps_text(self.student_taps), _taps_text(self.teacher_taps)]
        arguments += [f"{name}={value}" for name, value in self.options.items()]
        arguments += [] if self.projection is None else [f"weight={self.projection}"]
        gate = "" if self.gate is None else f" while {self.gate}"
        return f"{weight} x {self.op}({', '.join(arguments)}){gate}"


def count(batch: dict) -> torch.Tensor:
    """How many of each of UNITS a batch holds: int64 [4]."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    ids = batch["input_ids"]
    tokens = torch.full((ids.shape[0],), ids.shape[1], device=ids.device) if mask is None else mask.long().sum(1)
    labelled = torch.zeros_like(tokens) if labels is None else _labelled(labels, mask)
    return torch.stack([tokens.new_tensor(ids.shape[0]), tokens.sum(), (tokens * tokens).sum(), labelled.sum()])


def _labelled(labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    rows = labels.ne(-100)
    return rows & mask.bool() if mask is not None and mask.shape == labels.shape else rows


def _mismatch(op: str, s: torch.Size, t: torch.Size, projected: bool) -> str | None:
    if len(s) != len(t):
        return "ranks differ"
    if op == "kd_loss":
        return "vocabularies differ" if s[-1] != t[-1] else "lengths differ" if s != t else None
    if len(s) == 4:
        if op != "relation_kl" and s[1] != t[1]:
            return "numbers of heads differ (relation_kl re-splits heads)"
        return "lengths differ" if (s[0], s[2]) != (t[0], t[2]) else None
    if s[:-1] != t[:-1]:
        return "lengths differ"
    return "widths differ and no projection is set" if op == "hidden_mse" and s[-1] != t[-1] and not projected else None


def _taps_text(taps: tuple[str, ...]) -> str:
    return taps[0] if len(taps) == 1 else f"[{', '.join(taps)}]"


def _kd_loss(pairs, mask, batch, options, projection, labelled_only):
    options = dict(options)
    total, with_labels = 0.0, options.pop("labels", False)
    for student, teacher in pairs:
        by_token = student.dim() == 3
        rows, labels, unit = mask if by_token else None, None, "tokens" if by_token else "sequences"
        if with_labels or labelled_only:
            if "labels" not in batch:
                raise DistillError("kd_loss with labels: the data has no labels")
            # Soft and hard term over the same rows, so that one unit serves both.
            rows, unit = _labelled(batch["labels"], mask), "labels"
            labels = batch["labels"] if with_labels else None
        total = total + _losses.kd_loss(student, teacher, mask=rows, labels=labels, **options)
    return total, unit


def _hidden_mse(pairs, mask, batch, options, projection, labelled_only):
    by_token = pairs[0][0].dim() == 3
    if labelled_only:
        mask = _labelled(batch["labels"], mask)
    if not by_token:  # one vector a sequence, such as cls or embedding
        pairs, mask = [(s.unsqueeze(1), t.unsqueeze(1)) for s, t in pairs], None
    weight, bias = (None, None) if projection is None else (projection.weight, projection.bias)
    value = _losses.hidden_mse(*map(list, zip(*pairs, strict=True)), mask, weight=weight, bias=bias, **options)
    return value, "labels" if labelled_only and by_token else "tokens" if by_token else "sequences"


def _relation_kl(pairs, mask, batch, options, projection, labelled_only):
    total = 0.0
    for student, teacher in pairs:
        for s, t in zip(*(x if isinstance(x, tuple) else (x,) for x in (student, teacher)), strict=True):
            total = total + _losses.relation_kl(_merge_heads(s), _merge_heads(t), mask, **options)
    return total, "tokens"


def _attention(name, unit):
    def run(pairs, mask, batch, options, projection, labelled_only):
        return sum(getattr(_losses, name)(*student, *teacher, mask, **options) for student, teacher in pairs), unit

    return run


def _merge_heads(x: torch.Tensor) -> torch.Tensor:
    """[B, H, N, d] -> [B, N, H d]; a view for q, k and v as transformers makes them."""
    return x.transpose(1, 2).flatten(2) if x.dim() == 4 else x


@dataclass(frozen=True)
class Op:
    """How a match calls its loss, and the loss as text."""

    run: Callable
    formula: str


OPS = {
    "kd_loss": Op(
        _kd_loss, "T^2 KL(softmax(t/T) || softmax(s/T)), mean over rows; with labels alpha soft + (1 - alpha) CE(s, y)"
    ),
    "hidden_mse": Op(_hidden_mse, "sum over layers of mean((W s + b - t)^2) over real tokens x width"),
    "relation_kl": Op(
        _relation_kl, "sum over taps of KL(softmax(t t^T/sqrt d) || softmax(s s^T/sqrt d)), mean over real rows"
    ),
    "attention_kl": Op(
        _attention("attention_kl", "tokens"), "KL of teacher to student attention map, mean over real rows"
    ),
    "attention_mse": Op(
        _attention("attention_mse", "pairs"), "mean over real pairs of the squared difference of attention scores"
    ),
}
