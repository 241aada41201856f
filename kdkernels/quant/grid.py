"""The values that a quantised weight can take, and which one a weight gets: one place for packing and for training.

A weight w becomes scale * (unit * code - offset), with code = round((w / scale) / unit + offset / unit) held to the
codes that exist. `unit` is the block's step where the scheme has two levels (csrc/core/packed.h) and 1 elsewhere,
`offset` the zero in units of the scale.
"""

from dataclasses import dataclass

import torch

from .packed import spread
from .scheme import Scheme


@dataclass(frozen=True)
class Grid:
    """Integers in float32, each of the weight's shape [rows, columns] or broadcast to it."""

    unit: torch.Tensor | int
    offset: torch.Tensor | int
    least: torch.Tensor | int
    most: torch.Tensor | int

    def codes(self, ratio: torch.Tensor) -> torch.Tensor:
        """The codes, in float32, of weight / scale."""
        return (ratio / self.unit + self.offset / self.unit).round_().clamp_(self.least, self.most)


def bounds(step: torch.Tensor, zero: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(offset, least code, greatest code) such that step * code - offset stays within [-127, 127]."""
    offset = (step * (zero + 2 ** (bits - 1)) / 2).floor()
    return offset, ((offset - 127) / step).ceil().clamp_min(0), ((offset + 127) / step).floor().clamp_max(2**bits - 1)


def grid(
    scheme: Scheme, zeros: torch.Tensor | None, steps: torch.Tensor | None, shape: tuple[int, int] | torch.Size
) -> Grid:
    """Of what `packed.Parts` calls zeros and steps."""
    rows, columns = shape
    if steps is not None:
        both = steps.to(torch.int32)
        step, zero = (both & ((1 << (8 - scheme.bits)) - 1)).float(), (both >> (8 - scheme.bits)).float()
        parts = (step, *bounds(step, zero, scheme.bits))
        return Grid(*(part.repeat_interleave(scheme.group_size, 1)[:, :columns] for part in parts))
    least = 1 if scheme.bits == 8 and scheme.symmetric else 0
    offset = 2 ** (scheme.bits - 1) if zeros is None else spread(zeros.float(), scheme, rows, columns)
    return Grid(1, offset, least, 2**scheme.bits - 1)
