"""Rows of `benches.gpu_rows`: one file per op, each with its CASES. To add an op: its file, and its line in OPS."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..roofline import Work

OURS = "kdkernels"


@dataclass(frozen=True)
class Built:
    """A case on a device: what is called, what must come out, and what it must cost.

    calls: {implementation: call}, ours as OURS. call(i) is the i-th call of `count`, on weights of its own; the result
    of call(0) is compared with `truth`. A peer that can't run here raises what it likes and is named.
    work: of one call.
    """

    calls: dict[str, Callable[[int], torch.Tensor]]
    truth: torch.Tensor
    work: Work
    count: int = 1


@dataclass(frozen=True)
class Case:
    """One row for each implementation.

    build(device, small) makes it, with `small` in a shape for a CPU's dry run. The goals are those of an H200:
    `targets`, how many times ours a peer shall take; `milliseconds` that ours shall take at most; `share`, percent of
    the ceiling that ours shall reach, on matrix products of `arithmetic`. `match`: the largest error of ours, relative
    to the largest magnitude.
    """

    op: str
    name: str
    why: str
    build: Callable[[str, bool], Built]
    arithmetic: torch.dtype
    targets: dict[str, float] = field(default_factory=dict)
    milliseconds: float | None = None
    share: float | None = None
    match: float = 1e-2

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"

    @property
    def has_goals(self) -> bool:
        return bool(self.targets) or self.milliseconds is not None or self.share is not None


def lazily(make: Callable[[], Callable[[int], torch.Tensor]]) -> Callable[[int], torch.Tensor]:
    """A call that is made when it is first called: a peer that can't be made here is left out, and nothing else is."""
    made = []

    def call(i: int) -> torch.Tensor:
        if not made:
            made.append(make())
        return made[0](i)

    return call


def compiled(function: Callable, device: str) -> Callable:
    """torch.compile's on a GPU; the function itself in a dry run on the CPU."""
    return torch.compile(function, dynamic=False) if device == "cuda" else function


def cases() -> tuple[Case, ...]:
    """All of them, what has goals first."""
    from . import encoder, quant_linear, varlen_attention

    every = encoder.CASES + quant_linear.CASES + varlen_attention.CASES
    return tuple(sorted(every, key=lambda case: not case.has_goals))
