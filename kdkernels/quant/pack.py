"""`pack`: a float weight to a `PackedWeight`, with the range of each group searched for the least squared error.

The range that loses no weight to clipping is seldom the best: at four bits and less a narrower one rounds the many
small weights finer and clips a few large ones. No calibration data is needed. Each group tries ranges and zeros, and
keeps what errs least. The search is arithmetic over parts of the weight that stay in cache; blocks lie across the
lanes there, [weights of a block, blocks], since sums and factors along short rows would cost torch ten times as much.
"""

import torch
import torch.nn.functional as F

from .grid import bounds, grid
from .packed import MAX_COLUMNS, PackedWeight, Parts, num_scales, pack_blob, spread, storable
from .scheme import Scheme, as_scheme

# How much of the full range is given up at most, and in how many steps. Rounding error falls with the range's square.
_NARROWEST = {8: 0.15, 4: 0.4, 3: 0.45, 2: 0.5}
_TRIALS = 16
_CHUNK = 1 << 17  # weights whose trials stay in the L2 cache


def pack(weight: torch.Tensor, scheme: Scheme | str = "int8", *, importance=None) -> PackedWeight:
    """Quantises `weight` [out features, in features] (as torch.nn.Linear's), on its device.

    Args:
        weight: float32, bfloat16, float16 or float64, finite, at most 32768 in features.
        scheme: a Scheme, or "int8" (a scale per output feature), "int4", "int3", "int2" (blocks of 32 in features, each
            with its own zero); all with 8-bit activations.
        importance: [in features], how much the squared error of each column counts: the mean square of that feature
            (importance.py estimates it without data; behind a LayerNorm it is near weight^2 + bias^2). None: all alike.

    Raises: TypeError or ValueError naming the argument.
    """
    scheme = as_scheme(scheme)
    return encode(weight, scheme, *find_ranges(weight, scheme, importance))


def check_weight(weight: torch.Tensor) -> None:
    """The errors of `pack` about its weight."""
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if not weight.dtype.is_floating_point or weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            "weight must be a float tensor [out features, in features], got "
            f"{weight.dtype} of shape {list(weight.shape)}"
        )
    if weight.shape[1] > MAX_COLUMNS:
        raise ValueError(f"weight must have at most {MAX_COLUMNS} in features, got {weight.shape[1]}")
    if weight.is_meta:
        raise ValueError("weight must have values, got one on the meta device")
    if not bool(weight.detach().float().isfinite().all()):
        raise ValueError("weight must be finite, got NaN or Inf")


def find_ranges(weight: torch.Tensor, scheme: Scheme, importance=None):
    """(scales, zeros or None, steps or None) as in `packed.Parts`, on the weight's device; arguments and errors as in
    `pack`."""
    check_weight(weight)
    weight = weight.detach().float()
    counts = None if importance is None else _checked_importance(importance, weight)
    return (_two_level if scheme.two_level else _one_level)(weight, counts, scheme)


def encode(weight: torch.Tensor, scheme: Scheme, scales, zeros, steps, *, prepare: bool = True) -> PackedWeight:
    """Packs a weight with ranges that are known, scales of `storable`: each weight gets the nearest value there is.
    `prepare` as in `PackedWeight`.
    """
    weight = weight.detach().float()
    ratio = weight / spread(scales, scheme, *weight.shape)
    codes = grid(scheme, zeros, steps, weight.shape).codes(ratio).to(torch.uint8)
    return PackedWeight(pack_blob(scheme, Parts(codes, scales, zeros, steps)).to(weight.device), prepare=prepare)


def _checked_importance(importance, weight: torch.Tensor) -> torch.Tensor:
    if not isinstance(importance, torch.Tensor):
        raise TypeError(f"importance must be a tensor or None, got {type(importance).__name__}")
    counts = importance.detach().to(weight)
    if tuple(counts.shape) != (weight.shape[1],):
        raise ValueError(f"importance must have the shape [{weight.shape[1]}], got {list(importance.shape)}")
    if not bool((counts >= 0).all() & counts.isfinite().all()):
        raise ValueError("importance must be finite and >= 0")
    return counts


class _Search:
    """Trials on a part of a weight, of which each group keeps the one with the least error.

    Args:
        x: groups of weights, each along `dim`.
        counts: how much each error counts, of x's shape or broadcast to it; None: all alike.
    """

    def __init__(self, x: torch.Tensor, counts: torch.Tensor | None, dim: int):
        self.x, self.dim, self.root = x, dim, None if counts is None else counts.sqrt()
        self.exact, self.codes = torch.empty_like(x), torch.empty_like(x)
        self.error = torch.full_like(x.narrow(dim, 0, 1), torch.inf)
        self.kept = ()

    def attempt(self, unit: torch.Tensor, offset: torch.Tensor, least, most, *found: torch.Tensor) -> None:
        """code = round(x / unit + offset) within [least, most]; `found`, a value per group, is kept where that is best.
        All have x's shape with 1 along `dim`.
        """
        torch.addcmul(offset, self.x, 1 / unit, out=self.exact)
        torch.round(self.exact, out=self.codes)
        difference = self.codes.clamp_(least, most).sub_(self.exact)
        if self.root is not None:
            difference.mul_(self.root)
        error = difference.square_().sum(self.dim, keepdim=True).mul_(unit * unit)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.kept = [torch.where(better, new, old) for new, old in zip(found, self.kept or found, strict=True)]


def _parts(groups: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Parts along the first dimension that stay in cache while all trials run over them."""
    return groups.split(max(1, _CHUNK // groups[0].numel()))


def _one_level(weight: torch.Tensor, counts: torch.Tensor | None, scheme: Scheme):
    groups = _parts(_to_groups(weight, scheme))
    if counts is not None:
        counts = _parts(_to_groups(counts.expand_as(weight), scheme))
    found = [_fit(part, None if counts is None else counts[i], scheme) for i, part in enumerate(groups)]
    scales, zeros = (torch.cat([part[i] for part in found]) for i in range(2))
    assert scales.numel() == num_scales(scheme, *weight.shape)
    return scales, None if scheme.symmetric else zeros.to(torch.uint8), None


def _to_groups(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """[groups, weights of a group]; short groups are filled with zeros, which cost no error."""
    size = scheme.group_size
    if scheme.group == "channel":
        return weight
    if scheme.group == "out":
        size = min(size, weight.shape[0])
        return F.pad(weight, (0, 0, 0, -weight.shape[0] % size)).view(-1, size * weight.shape[1])
    padded = F.pad(weight, (0, -weight.shape[1] % size))
    if scheme.group == "block":
        return padded.view(-1, size)
    return padded.T.contiguous().view(-1, size * weight.shape[0])


def _fit(groups: torch.Tensor, counts: torch.Tensor | None, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero) per group, of [groups, weights of a group]."""
    dim = 0 if scheme.group == "block" else 1
    if dim == 0:
        groups = groups.T.contiguous()
        counts = None if counts is None else counts.T.contiguous()
    most, middle = 2**scheme.bits - 1, 2 ** (scheme.bits - 1)
    low, high = groups.amin(dim, keepdim=True).clamp_max(0), groups.amax(dim, keepdim=True).clamp_min(0)
    if scheme.symmetric:
        least = 1 if scheme.bits == 8 else 0
        full = torch.maximum(high / (most - middle), low / (least - middle))
    else:
        least, full = 0, (high - low) / most
    full = full.clamp_min(torch.finfo(torch.float32).tiny)
    search = _Search(groups / full, counts, dim)  # in units of the full range's scale, whose square could overflow
    low, high = low / full, high / full
    for trial in range(_TRIALS):
        unit = storable(full * (1 - _NARROWEST[scheme.bits] * trial / (_TRIALS - 1))) / full
        for zero in (torch.full_like(full, middle),) if scheme.symmetric else _zeros(low, high, unit, most):
            search.attempt(unit, zero, least, most, unit, zero)
    unit, zero = search.kept
    return storable(full * unit).flatten(), zero.flatten()


def _zeros(low, high, scale, most):
    """Zeros that put the range of codes around the middle of the weights, and one to either side."""
    middle = (most / 2 - (low + high) / (2 * scale)).round()
    return [(middle + shift).clamp(0, most) for shift in (-1, 0, 1)]


def _two_level(weight: torch.Tensor, counts: torch.Tensor | None, scheme: Scheme):
    size, missing = scheme.group_size, -weight.shape[1] % scheme.group_size
    blocks = F.pad(weight, (0, missing)).view(weight.shape[0], -1, size)
    if counts is not None:
        counts = F.pad(counts, (0, missing)).view(-1, size)
    found = [_fit_rows(part, counts, scheme) for part in _parts(blocks)]
    scales, steps, zeros = (torch.cat([part[i] for part in found]) for i in range(3))
    return scales, None, (steps.to(torch.int32) | zeros.to(torch.int32) << (8 - scheme.bits)).to(torch.uint8)


def _fit_rows(blocks: torch.Tensor, counts: torch.Tensor | None, scheme: Scheme):
    """[rows, blocks, size] -> (scale per row, step and z per block) as csrc/core/packed.h has them.

    The row's scale is the smallest with which every weight fits into [-127, 127] and the widest block's range into the
    largest step (smaller ones won nothing); then each block tries the steps from the one that spans its range down.
    """
    bits, (rows, number, size) = scheme.bits, blocks.shape
    most, middle, largest_step = 2**bits - 1, 2 ** (bits - 1), 2 ** (8 - bits) - 1
    low, high = blocks.amin(2).clamp_max(0), blocks.amax(2).clamp_min(0)
    scale = torch.maximum(torch.maximum(high, -low).amax(1) / 127, (high - low).amax(1) / (most * largest_step))
    scale = storable(scale.clamp_min(torch.finfo(torch.float32).tiny))[:, None]
    low, high = ((end / scale).view(1, -1) for end in (low, high))
    scaled = (blocks / scale[..., None]).permute(2, 0, 1).reshape(size, -1)
    if counts is not None:
        counts = counts.T[:, None].expand(size, rows, number).reshape(size, -1)
    search = _Search(scaled, counts, 0)
    full = ((high - low) / most).ceil().clamp(1, largest_step)
    for trial in range(int((full * _NARROWEST[bits]).max()) + 1):
        step = (full - trial).clamp_min(1)
        z = (most - (low + high) / step - middle).round()  # puts the codes' range around the weights'
        for shift in (0,) if scheme.symmetric else (-1, 0, 1):
            zero = torch.full_like(step, middle) if scheme.symmetric else (z + shift).clamp(0, most)
            offset, least, greatest = bounds(step, zero, bits)
            search.attempt(step, offset / step, least, greatest, step, zero)
    step, zero = search.kept
    return scale[:, 0], step.view(rows, -1), zero.view(rows, -1)
