"""Two attention maps that are given as scores, side by side: the rows of attention_map_mse and attention_map_kl.

Bound by memory: each map is read once forward and once backward, what is padding not at all, and the gradient is
written once, zeros included. A program owns a few rows of one map and streams the keys; where heads are reduced, a map
is the sum of all of them, and its gradient goes to each. With s and t the summed scores and x = scale * scores:
    mse    row loss sum_j (x_s - x_t)^2                        d/ds = 2 scale_s (x_s - x_t)
    kl     row loss sum_j p_t (x_t - x_s) - (lse_t - lse_s)    d/ds = scale_s (p_s - p_t)
The kl takes one pass, both online softmaxes coupled with the first moment. Moments are relative to the running maxima,
so that nothing rounds with the size of the scores, and a key of probability 0 counts 0 even at -inf. What stays per row
is max and 1 / sum of both maps.
"""

import torch
import triton
import triton.language as tl

from ..ops._common import HEAD_REDUCTION, REDUCTION
from ._common import LAUNCH, finish, host_divisor, mean_divisor

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # below every maximum, and finite: -inf - LOWEST is no NaN


def tile_sizes(tokens: int) -> dict:
    """Up to 1024 keys at a time, about 2048 elements of either map a program."""
    block = min(max(16, triton.next_power_of_2(tokens)), 1024)
    return {"BLOCK_N": block, "BLOCK_M": max(1, 2048 // block), "num_warps": 4}


@triton.jit
def _real(mask, b, at, N):
    """Which of the tokens `at` of batch b exist and are real."""
    keep = at < N
    if mask is not None:
        keep = tl.load(mask + b * N + at, mask=keep, other=0) != 0
    return keep


@triton.jit
def _scores(x, strides, b, m, row, column, keep, HEADS: tl.constexpr):
    """A tile of a map, summed over its heads, float32; 0 where not kept."""
    address = x + b * strides[0] + m * HEADS * strides[1] + row[:, None] * strides[2] + column[None, :] * strides[3]
    total = tl.load(address, mask=keep, other=0.0).to(tl.float32)
    for _ in range(1, HEADS):
        address += strides[1]
        total += tl.load(address, mask=keep, other=0.0).to(tl.float32)
    return total


@triton.jit
def _forward_kernel(
    student, teacher, strides_s, strides_t, mask, rows, partial, stats, MAPS, N, scale_s, scale_t, factor_s, factor_t,
    ratio, KL: tl.constexpr, HEADS_S: tl.constexpr, HEADS_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Losses of BLOCK_M rows into `rows` [B, MAPS, N] or their sum into `partial`, and for KL their `stats`."""
    tiles = tl.cdiv(N, BLOCK_M)
    index = (tl.program_id(0) // tiles).to(tl.int64)
    b, m = index // MAPS, index % MAPS
    row = (tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    real = _real(mask, b, row, N)
    top_s = tl.full((BLOCK_M,), LOWEST, tl.float32)
    top_t = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total_s = tl.zeros((BLOCK_M,), tl.float32)
    total_t = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)  # of squares; for KL of exp(x_t - top) ((t - top_t) ratio - (s - top_s))
    for start in range(0, N, BLOCK_N):
        column = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        keep = real[:, None] & _real(mask, b, column, N)[None, :]
        s = _scores(student, strides_s, b, m, row, column, keep, HEADS_S)
        t = _scores(teacher, strides_t, b, m, row, column, keep, HEADS_T)
        if KL:
            s, t = tl.where(keep, s, float("-inf")), tl.where(keep, t, float("-inf"))
            new_s, new_t = tl.maximum(top_s, tl.max(s, 1)), tl.maximum(top_t, tl.max(t, 1))
            moved = tl.where(total_t == 0, 0.0, (top_t - new_t) * ratio - (top_s - new_s))
            fade_s, fade_t = tl.exp2((top_s - new_s) * factor_s), tl.exp2((top_t - new_t) * factor_t)
            ds, dt = s - new_s[:, None], t - new_t[:, None]
            e_t = tl.exp2(dt * factor_t)
            terms = tl.where(e_t == 0, 0.0, e_t * (dt * ratio - ds))
            sums = (sums + total_t * moved) * fade_t + tl.sum(terms, 1)
            total_s = total_s * fade_s + tl.sum(tl.exp2(ds * factor_s), 1)
            total_t = total_t * fade_t + tl.sum(e_t, 1)
            top_s, top_t = new_s, new_t
        else:
            difference = s * scale_s - t * scale_t
            sums += tl.sum(difference * difference, 1)

    at = index * N + row
    loss = sums
    if KL:
        # Rows of padding have no sums; 1 keeps them from being divided by 0 before they are dropped.
        total_s, total_t = tl.where(real, total_s, 1.0), tl.where(real, total_t, 1.0)
        loss = scale_s * tl.div_rn(sums, total_t) - tl.log2(tl.div_rn(total_t, total_s)) * LN2
        one = tl.full((BLOCK_M,), 1.0, tl.float32)
        stats += at * 4
        tl.store(stats, tl.where(real, top_s, 0.0), mask=row < N)
        tl.store(stats + 1, tl.where(real, tl.div_rn(one, total_s), 0.0), mask=row < N)
        tl.store(stats + 2, tl.where(real, top_t, 0.0), mask=row < N)
        tl.store(stats + 3, tl.where(real, tl.div_rn(one, total_t), 0.0), mask=row < N)
    loss = tl.where(real, loss, 0.0)
    if rows is None:
        tl.store(partial + tl.program_id(0), tl.sum(loss, 0))
    else:
        tl.store(rows + at, loss, mask=row < N)


@triton.jit
def _backward_kernel(
    student, teacher, strides_s, strides_t, mask, count, stats, grad, strides_grad, out, B, MAPS, N, scale_s, scale_t,
    factor_s, factor_t, weight, divisor: tl.int64, KL: tl.constexpr, PER_ROW: tl.constexpr, POWER: tl.constexpr,
    HEADS_S: tl.constexpr, HEADS_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M rows into every head of their map, zeros where the query or the key is padding."""
    tiles = tl.cdiv(N, BLOCK_M)
    index = (tl.program_id(0) // tiles).to(tl.int64)
    b, m = index // MAPS, index % MAPS
    row = (tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    real = _real(mask, b, row, N)
    weight /= mean_divisor(count, B, divisor, POWER).to(tl.float32)
    coef = tl.zeros((BLOCK_M,), tl.float32) + weight
    if PER_ROW:
        above = grad + b * strides_grad[0] + m * strides_grad[1] + row * strides_grad[2]
        coef *= tl.load(above, mask=real, other=0.0).to(tl.float32)
    else:
        coef *= tl.load(grad).to(tl.float32)
    if KL:
        stats += (index * N + row) * 4
        top_s, of_s = tl.load(stats, mask=real, other=0.0), coef * tl.load(stats + 1, mask=real, other=0.0)
        top_t, of_t = tl.load(stats + 2, mask=real, other=0.0), coef * tl.load(stats + 3, mask=real, other=0.0)
    size = tl.zeros((), tl.int64) + N
    for start in range(0, N, BLOCK_N):
        column = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        keep = real[:, None] & _real(mask, b, column, N)[None, :]
        s = _scores(student, strides_s, b, m, row, column, keep, HEADS_S)
        t = _scores(teacher, strides_t, b, m, row, column, keep, HEADS_T)
        if KL:
            of_teacher = tl.exp2((t - top_t[:, None]) * factor_t) * of_t[:, None]
            slope = tl.exp2((s - top_s[:, None]) * factor_s) * of_s[:, None] - of_teacher
        else:
            slope = (s * scale_s - t * scale_t) * coef[:, None]
        value = tl.where(keep, slope, 0.0).to(out.dtype.element_ty)
        inside = (row < N)[:, None] & (column < N)[None, :]
        address = out + (index * HEADS_S * N + row)[:, None] * N + column[None, :]
        for _ in range(0, HEADS_S):
            tl.store(address, value, mask=inside)
            address += size * size


class _Call:
    """What both passes of a call share."""

    def __init__(self, student, teacher, mask, head_reduction, temperature, kl, reduction):
        self.batch, heads, self.tokens, _ = student.shape
        each = head_reduction == HEAD_REDUCTION[None]
        self.maps, of_map = (heads, (1, 1)) if each else (1, (heads, teacher.shape[1]))
        mean = head_reduction == HEAD_REDUCTION["mean"]
        self.scales = [1 / (temperature * (n if mean else 1)) for n in of_map]
        self.factors = [scale * LOG2E for scale in self.scales]
        self.inputs = student, teacher, student.stride(), teacher.stride()
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.count = None if mask is None else mask.sum(-1)
        # The mean runs over real rows (1), over real entries of the maps (2), or there is none (0).
        self.power = int(reduction == REDUCTION["batchmean"]) if kl else 2
        self.divisor = host_divisor(mask, self.maps, self.batch, self.tokens, self.power)
        sizes = tile_sizes(self.tokens)
        self.grid = (self.batch * self.maps * triton.cdiv(self.tokens, sizes["BLOCK_M"]),)
        self.statics = {"KL": kl, "HEADS_S": of_map[0], "HEADS_T": of_map[1], **sizes, **LAUNCH}


def forward(student, teacher, mask, head_reduction, temperature=1.0, kl=False, reduction=REDUCTION["mean"]):
    """(loss, stats float32 [B, maps, N, 4], or None without kl)."""
    call = _Call(student, teacher, mask, head_reduction, temperature, kl, reduction)
    rows = partial = stats = None
    if kl:
        stats = student.new_empty((call.batch, call.maps, call.tokens, 4), dtype=torch.float32)
    if reduction == REDUCTION["none"]:
        each = head_reduction == HEAD_REDUCTION[None]
        shape = (call.batch, call.maps, call.tokens) if each else (call.batch, call.tokens)
        rows = student.new_empty(shape, dtype=torch.float32)
    else:
        partial = student.new_empty(call.grid[0], dtype=torch.float32)
    if call.grid[0]:
        _forward_kernel[call.grid](
            *call.inputs, call.mask, rows, partial, stats, call.maps, call.tokens, *call.scales, *call.factors,
            call.scales[1] / call.scales[0], **call.statics,
        )  # fmt: skip
    return finish(partial, call.count, call.divisor, call.power) if rows is None else rows, stats


def backward(
    grad, student, teacher, mask, head_reduction, stats=None, temperature=1.0, kl=False, reduction=REDUCTION["mean"]
):
    """The gradient of the student's scores."""
    call = _Call(student, teacher, mask, head_reduction, temperature, kl, reduction)
    out = student.new_empty(student.shape)
    strides = grad.stride() if grad.dim() == 3 else (grad.stride(0), 0, grad.stride(1)) if grad.dim() == 2 else ()
    if call.grid[0]:
        _backward_kernel[call.grid](
            *call.inputs, call.mask, call.count, stats, grad, strides, out, call.batch, call.maps, call.tokens,
            *call.scales, *call.factors, call.scales[0] * (1 if kl else 2), call.divisor,
            PER_ROW=grad.dim() > 0, POWER=call.power, **call.statics,
        )  # fmt: skip
    return out
