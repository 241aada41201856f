"""`pack`: a float weight to a `PackedWeight`, with the range of each group searched for the least squared error.

The range that loses no weight to clipping is seldom the best: at four bits and less a narrower one rounds the many
small weights finer and clips a few large ones. No calibration data is needed. Each group tries ranges and zeros, and
keeps what errs least; the sum runs over the group, so the search is a few passes over the weight.
"""

import torch

from .packed import MAX_COLUMNS, PackedWeight, Parts, num_scales, pack_blob, spread
from .scheme import Scheme, as_scheme

# How much of the full range is given up at most, and in how many steps. Rounding error falls with the range's square.
_NARROWEST = {8: 0.15, 4: 0.4, 3: 0.45, 2: 0.5}
_TRIALS = 16
_CHUNK = 1 << 15  # weights whose trials stay in cache; torch runs so few on one thread


def pack(weight: torch.Tensor, scheme: Scheme | str = "int8", *, importance=None) -> PackedWeight:
    """Quantises `weight` [out features, in features] (as torch.nn.Linear's), on its device.

    Args:
        weight: float32, bfloat16, float16 or float64, finite, at most 32768 in features.
        scheme: a Scheme, or "int8" (a scale per output feature), "int4", "int3", "int2" (blocks of 32 in features, each
            with its own zero); all with 8-bit activations.
        importance: [in features], how much the squared error of each column counts, such as the mean square of that
            feature; behind a LayerNorm weight^2 + bias^2, which needs no data. None: all alike.

    Raises: TypeError or ValueError naming the argument.
    """
    scheme = as_scheme(scheme)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if not weight.dtype.is_floating_point or weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            "weight must be a float tensor [out features, in features], got "
            f"{weight.dtype} of shape {list(weight.shape)}"
        )
    if weight.shape[1] > MAX_COLUMNS:
        raise ValueError(f"weight must have at most {MAX_COLUMNS} in features, got {weight.shape[1]}")
    weight = weight.detach().float()
    if not bool(weight.isfinite().all()):
        raise ValueError("weight must be finite, got NaN or Inf")
    counts = _checked_importance(importance, weight)
    parts = _two_level(weight, counts, scheme) if scheme.two_level else _one_level(weight, counts, scheme)
    return PackedWeight(pack_blob(scheme, parts).to(weight.device))


def _checked_importance(importance, weight: torch.Tensor) -> torch.Tensor:
    if importance is None:
        return weight.new_ones(weight.shape[1])
    if not isinstance(importance, torch.Tensor):
        raise TypeError(f"importance must be a tensor or None, got {type(importance).__name__}")
    counts = importance.detach().to(weight)
    if tuple(counts.shape) != (weight.shape[1],):
        raise ValueError(f"importance must have the shape [{weight.shape[1]}], got {list(importance.shape)}")
    if not bool((counts >= 0).all() & counts.isfinite().all()):
        raise ValueError("importance must be finite and >= 0")
    return counts


class _Best:
    """The trial with the least error so far, group by group: `keep` takes one value per group, codes one per weight."""

    def __init__(self):
        self.error, self.kept = None, []

    def keep(self, error: torch.Tensor, *found: torch.Tensor) -> None:
        if self.error is None:
            self.error, self.kept = error, list(found)
            return
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.kept = [
            torch.where(better.view(*better.shape, *(1,) * (new.dim() - better.dim())), new, old)
            for new, old in zip(found, self.kept, strict=True)
        ]


def _chunks(groups: torch.Tensor):
    """Parts along the first dimension that stay in cache while all trials run over them."""
    return groups.split(max(1, _CHUNK // groups[0].numel()))


def _one_level(weight: torch.Tensor, counts: torch.Tensor, scheme: Scheme) -> Parts:
    rows, columns = weight.shape
    groups, counts = _to_groups(weight, scheme), _to_groups(counts.expand_as(weight), scheme)
    found = [_fit(*part, scheme) for part in zip(_chunks(groups), _chunks(counts), strict=True)]
    scales, zeros = (torch.cat([part[i] for part in found]) for i in range(2))
    scales, zeros = scales.contiguous(), zeros.to(torch.uint8)
    spread_zeros = spread(zeros.float(), scheme, rows, columns)
    least = 1 if scheme.bits == 8 and scheme.symmetric else 0
    codes = _codes(weight / spread(scales, scheme, rows, columns), spread_zeros, least, 2**scheme.bits - 1)
    assert scales.numel() == num_scales(scheme, rows, columns)
    return Parts(codes.to(torch.uint8), scales, None if scheme.symmetric else zeros, None)


def _to_groups(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """[groups, weights of a group]; short groups are filled with zeros, which cost no error."""
    size = scheme.group_size
    if scheme.group == "channel":
        return weight
    if scheme.group == "out":
        return torch.nn.functional.pad(weight, (0, 0, 0, -weight.shape[0] % size)).view(-1, size * weight.shape[1])
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % size))
    if scheme.group == "block":
        return padded.view(-1, size)
    return padded.T.contiguous().view(-1, size * weight.shape[0])


def _codes(scaled: torch.Tensor, zero: torch.Tensor, least: int, most: int) -> torch.Tensor:
    return (scaled + zero).round_().clamp_(least, most)


def _fit(groups: torch.Tensor, counts: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero) per group."""
    most, middle = 2**scheme.bits - 1, 2 ** (scheme.bits - 1)
    low, high = groups.amin(1).clamp_max(0), groups.amax(1).clamp_min(0)
    if scheme.symmetric:
        least = 1 if scheme.bits == 8 else 0
        full = torch.maximum(high / (most - middle), low / (least - middle))
    else:
        least, full = 0, (high - low) / most
    full = full.clamp_min(torch.finfo(torch.float32).tiny)
    best = _Best()
    for part in _shrinks(scheme.bits):
        scale = full * part
        for zero in _zeros(low, high, scale, most) if not scheme.symmetric else (torch.full_like(scale, middle),):
            scaled = groups / scale[:, None]  # in units of the scale, whose square could overflow
            errors = _codes(scaled, zero[:, None], least, most).sub_(zero[:, None]).sub_(scaled).mul_(part)
            best.keep(errors.square_().mul_(counts).sum(1), scale, zero)
    return best.kept[0], best.kept[1]


def _shrinks(bits: int):
    return [1 - _NARROWEST[bits] * i / (_TRIALS - 1) for i in range(_TRIALS)]


def _zeros(low, high, scale, most):
    """Zeros that put the range of codes around the middle of the weights, and one to either side."""
    middle = (most / 2 - (low + high) / (2 * scale)).round()
    return [(middle + shift).clamp(0, most) for shift in (-1, 0, 1)]


def _two_level(weight: torch.Tensor, counts: torch.Tensor, scheme: Scheme) -> Parts:
    rows, columns = weight.shape
    size = scheme.group_size
    blocks = torch.nn.functional.pad(weight, (0, -columns % size)).view(rows, -1, size)
    counts = torch.nn.functional.pad(counts, (0, -columns % size)).view(-1, size)
    found = [_fit_rows(part, counts, scheme) for part in _chunks(blocks)]
    codes, scales, steps, zeros = (torch.cat([part[i] for part in found]) for i in range(4))
    packed = steps.to(torch.int32) | zeros.to(torch.int32) << (8 - scheme.bits)
    return Parts(codes.to(torch.uint8).view(rows, -1)[:, :columns], scales, None, packed.to(torch.uint8))


def _fit_rows(blocks: torch.Tensor, counts: torch.Tensor, scheme: Scheme):
    """[rows, blocks, size] -> (codes, scale per row, step and z per block) as csrc/core/packed.h has them.

    The row's scale is the smallest with which every weight fits into [-127, 127] and the widest block's range into the
    largest step (smaller ones won nothing); then each block tries the steps from the one that spans its range down.
    """
    bits = scheme.bits
    most, middle, largest_step = 2**bits - 1, 2 ** (bits - 1), 2 ** (8 - bits) - 1
    low, high = blocks.amin(2).clamp_max(0), blocks.amax(2).clamp_min(0)
    scale = torch.maximum(torch.maximum(high, -low).amax(1) / 127, (high - low).amax(1) / (most * largest_step))
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    low, high, scaled = low / scale[:, None], high / scale[:, None], blocks / scale[:, None, None]
    full = ((high - low) / most).ceil().clamp(1, largest_step)
    best = _Best()
    for trial in range(int((full * _NARROWEST[bits]).max()) + 1):
        step = (full - trial).clamp_min(1)
        z = (most - (low + high) / step - middle).round()  # puts the codes' range around the weights'
        for shift in (0,) if scheme.symmetric else (-1, 0, 1):
            zero = torch.full_like(step, middle) if scheme.symmetric else (z + shift).clamp(0, most)
            offset = (step * (zero + middle) / 2).floor()
            least = ((offset - 127) / step).ceil().clamp_min(0)[..., None]
            greatest = ((offset + 127) / step).floor().clamp_max(most)[..., None]
            codes = _codes(scaled / step[..., None], (offset / step)[..., None], least, greatest)
            error = (codes * step[..., None] - offset[..., None] - scaled).square_().mul_(counts).sum(2)
            best.keep(error, codes, step, zero)
    codes, step, zero = best.kept
    return codes, scale, step, zero
