"""Two attention maps side by side, the student's and the teacher's, never stored: the tiles of three losses.

With x = scale q k^T / T * log2(e) and p = softmax(x) in base 2, i a query and j a key:
    kl     row loss sum_j p_t (x_t - x_s) - (lse_t - lse_s), times log 2     slope p_s - p_t
    probs  row loss sum_j (p_s - p_t)^2     slope p_s (p_s - p_t - delta), delta = sum_j p_s (p_s - p_t)
The slope is the derivative by the student's scores, up to a factor 2 for probs.

Forward: a program owns BLOCK_M queries and streams the keys. kl takes one pass, both online softmaxes coupled with the
sum of p_t (x_t - x_s). probs takes two, since the sum p_s^2 - 2 p_s p_t + p_t^2 of a single one would cancel where the
maps agree. What stays per row is max and 1 / sum of both maps (and delta): exp2(x - max) / sum does not round with the
size of lse.

Backward recomputes. A program owns BLOCK_M rows of one operand and streams the other: d q owns queries (ROWS), d k owns
keys (COLS). Where queries and keys are one tensor, scores are symmetric and one launch does both, with half of the
products. No two programs write one output, so nothing is atomic and results repeat bit by bit.

A head wider than a tile is walked through in chunks; the columns of its gradient are split over programs.
"""

import torch
import triton
import triton.language as tl

from ..ops._common import REDUCTION
from ._common import (
    LAUNCH,
    dot_dtype,
    finish,
    head_of,
    host_divisor,
    load_tile,
    mean_divisor,
    positions,
    token_order,
    tokens_of,
)

KL, PROBS = tl.constexpr(0), tl.constexpr(1)
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)


def tile_sizes(dtypes, dims, backward: bool) -> dict:
    """Block shapes and launch settings. BLOCK_S and BLOCK_T: columns of a head in one product, BLOCK_G: of the
    gradient.

    16-bit products run on tensor cores (64 rows a tile, whole heads up to 128). float32 ones keep float32 precision, on
    the ordinary cores: operands sit in registers, and 16 columns at a time is what fits without spills.
    """
    half = all(dtype != tl.float32 for dtype in dtypes)
    power_s, power_t = (max(16, triton.next_power_of_2(d)) for d in dims)
    widest = 128 if half else 16
    sizes = {"BLOCK_M": 64, "BLOCK_S": min(power_s, widest), "BLOCK_T": min(power_t, widest)}
    sizes["BLOCK_N"] = 64 if half and max(power_s, power_t) <= 64 else 32
    if backward:
        sizes["BLOCK_G"] = min(power_s, 128 if half else 64)
    return {**sizes, "num_warps": 4, "num_stages": 2 if half else 1}


@triton.jit
def _product(a, b, tile_a, tile_b, at, real, it, keep, D: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr):
    """a b^T for rows `at`, `it` of two heads, float32. The tiles hold these rows if D fits BLOCK_D, else go unused."""
    if BLOCK_D >= D:
        return tl.dot(tile_a, tl.trans(tile_b), input_precision="ieee")
    total = tl.zeros((at.shape[0], it.shape[0]), tl.float32)
    for first in range(0, D, BLOCK_D):
        chunk_a = load_tile(a, at, real, first, D, BLOCK_D, DTYPE)
        chunk_b = load_tile(b, it, keep, first, D, BLOCK_D, DTYPE)
        total = tl.dot(chunk_a, tl.trans(chunk_b), total, input_precision="ieee")
    return total


@triton.jit
def _online_softmax(x, top, total):
    """One more tile of a softmax: (exp2(x - new max), the factor for older sums, new max, new sum)."""
    new = tl.maximum(top, tl.max(x, 1))
    fade = tl.exp2(top - new)
    e = tl.exp2(x - new[:, None])
    return e, fade, new, total * fade + tl.sum(e, 1)


@triton.jit
def _inverse(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def _forward_kernel(
    q_s, k_s, q_t, k_t, strides_qs, strides_ks, strides_qt, strides_kt, order, count, rows, partial, stats,
    H, N, factor_s, factor_t, LOSS: tl.constexpr, WIDTH: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, DTYPE_S: tl.constexpr, DTYPE_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Losses of BLOCK_M rows into `rows` [B, H, N] or their sum into `partial`, and, unless None, their `stats`."""
    tiles = tl.cdiv(N, BLOCK_M)
    start_m = tl.program_id(0) % tiles * BLOCK_M
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // H, head % H
    q_s, k_s = head_of(q_s, strides_qs, b, h), head_of(k_s, strides_ks, b, h)
    q_t, k_t = head_of(q_t, strides_qt, b, h), head_of(k_t, strides_kt, b, h)

    tokens = tokens_of(count, b, N)
    slot = start_m + tl.arange(0, BLOCK_M)
    real = slot < tokens
    at = positions(order, b, start_m, N, BLOCK_M)
    keys = tl.where(start_m < tokens, tokens, 0)  # a tile of padding has nothing to stream
    tile_qs = load_tile(q_s, at, real, 0, D_S, BLOCK_S, DTYPE_S)
    tile_qt = load_tile(q_t, at, real, 0, D_T, BLOCK_T, DTYPE_T)

    top_s = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    top_t = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_s = tl.zeros((BLOCK_M,), tl.float32)
    total_t = tl.zeros((BLOCK_M,), tl.float32)
    gap = tl.zeros((BLOCK_M,), tl.float32)  # sum of exp2(x_t - top_t) (x_t - x_s)
    for start in range(0, keys, BLOCK_N):
        keep = start + tl.arange(0, BLOCK_N) < tokens
        it = positions(order, b, start, N, BLOCK_N)
        tile_ks = load_tile(k_s, it, keep, 0, D_S, BLOCK_S, DTYPE_S)
        tile_kt = load_tile(k_t, it, keep, 0, D_T, BLOCK_T, DTYPE_T)
        x_s = factor_s * _product(q_s, k_s, tile_qs, tile_ks, at, real, it, keep, D_S, BLOCK_S, DTYPE_S)
        x_t = factor_t * _product(q_t, k_t, tile_qt, tile_kt, at, real, it, keep, D_T, BLOCK_T, DTYPE_T)
        masked_s = tl.where(keep[None, :], x_s, float("-inf"))
        masked_t = tl.where(keep[None, :], x_t, float("-inf"))
        _, _, top_s, total_s = _online_softmax(masked_s, top_s, total_s)
        e_t, fade_t, top_t, total_t = _online_softmax(masked_t, top_t, total_t)
        if LOSS == KL:
            gap = gap * fade_t + tl.sum(e_t * (x_t - x_s), 1)

    inverse_s, inverse_t = _inverse(total_s), _inverse(total_t)
    loss = tl.zeros((BLOCK_M,), tl.float32)
    delta = tl.zeros((BLOCK_M,), tl.float32)
    if LOSS == KL:
        loss = (gap * inverse_t - (top_t - top_s) - tl.log2(tl.div_rn(total_t, total_s))) * LN2
    else:
        for start in range(0, keys, BLOCK_N):
            keep = start + tl.arange(0, BLOCK_N) < tokens
            it = positions(order, b, start, N, BLOCK_N)
            tile_ks = load_tile(k_s, it, keep, 0, D_S, BLOCK_S, DTYPE_S)
            tile_kt = load_tile(k_t, it, keep, 0, D_T, BLOCK_T, DTYPE_T)
            x_s = factor_s * _product(q_s, k_s, tile_qs, tile_ks, at, real, it, keep, D_S, BLOCK_S, DTYPE_S)
            x_t = factor_t * _product(q_t, k_t, tile_qt, tile_kt, at, real, it, keep, D_T, BLOCK_T, DTYPE_T)
            p_s = tl.where(keep[None, :], tl.exp2(x_s - top_s[:, None]) * inverse_s[:, None], 0.0)
            p_t = tl.where(keep[None, :], tl.exp2(x_t - top_t[:, None]) * inverse_t[:, None], 0.0)
            loss += tl.sum((p_s - p_t) * (p_s - p_t), 1)
            delta += tl.sum(p_s * (p_s - p_t), 1)

    loss = tl.where(real, loss, 0.0)
    row = head * N + at
    if rows is None:
        tl.store(partial + tl.program_id(0), tl.sum(loss, 0))
    else:
        tl.store(rows + row, loss, mask=slot < N)
    if stats is not None:
        stats += row * WIDTH
        tl.store(stats, top_s, mask=real)
        tl.store(stats + 1, inverse_s, mask=real)
        tl.store(stats + 2, top_t, mask=real)
        tl.store(stats + 3, inverse_t, mask=real)
        if LOSS == PROBS:
            tl.store(stats + 4, delta, mask=real)


@triton.jit
def _slope(x_s, x_t, stats, grad, query, keep, AXIS: tl.constexpr, LOSS: tl.constexpr, WIDTH: tl.constexpr):
    """The slope of a tile of scores whose queries lie along the axis that is not AXIS, from their stats.

    With reduction "none", `grad` = (this head's upstream gradients, strides), one per query; else it is None.
    """
    stats += query * WIDTH
    top_s = tl.expand_dims(tl.load(stats, mask=keep, other=0.0), AXIS)
    inverse_s = tl.expand_dims(tl.load(stats + 1, mask=keep, other=0.0), AXIS)
    top_t = tl.expand_dims(tl.load(stats + 2, mask=keep, other=0.0), AXIS)
    inverse_t = tl.expand_dims(tl.load(stats + 3, mask=keep, other=0.0), AXIS)
    p_s = tl.exp2(x_s - top_s) * inverse_s
    slope = p_s - tl.exp2(x_t - top_t) * inverse_t
    if LOSS == PROBS:
        delta = tl.expand_dims(tl.load(stats + 4, mask=keep, other=0.0), AXIS)
        slope = p_s * (slope - delta)
    if grad is not None:
        slope *= tl.expand_dims(tl.load(grad[0] + query * grad[1][2], mask=keep, other=0.0), AXIS).to(tl.float32)
    return slope


@triton.jit
def _backward_kernel(
    own_s, other_s, own_t, other_t, strides_own_s, strides_other_s, strides_own_t, strides_other_t,
    order, count, stats, grad, strides_grad, out, strides_out, B, H, N, factor_s, factor_t, weight, divisor: tl.int64,
    LOSS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PER_ROW: tl.constexpr, POWER: tl.constexpr,
    WIDTH: tl.constexpr, D_S: tl.constexpr, D_T: tl.constexpr, DTYPE_S: tl.constexpr, DTYPE_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows and BLOCK_G columns of the gradient of `own_s`, which holds queries (ROWS), keys (COLS) or both."""
    tiles = tl.cdiv(N, BLOCK_M)
    start_m = tl.program_id(0) % tiles * BLOCK_M
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(1) * BLOCK_G
    b, h = head // H, head % H
    own_s, other_s = head_of(own_s, strides_own_s, b, h), head_of(other_s, strides_other_s, b, h)
    own_t, other_t = head_of(own_t, strides_own_t, b, h), head_of(other_t, strides_other_t, b, h)
    stats += head * N * WIDTH
    upstream = head_of(grad, strides_grad, b, h) if PER_ROW else None

    tokens = tokens_of(count, b, N)
    slot = start_m + tl.arange(0, BLOCK_M)
    real = slot < tokens
    at = positions(order, b, start_m, N, BLOCK_M)
    streamed = tl.where(start_m < tokens, tokens, 0)  # a tile of padding has nothing to stream
    tile_own_s = load_tile(own_s, at, real, 0, D_S, BLOCK_S, DTYPE_S)
    tile_own_t = load_tile(own_t, at, real, 0, D_T, BLOCK_T, DTYPE_T)

    total = tl.zeros((BLOCK_M, BLOCK_G), tl.float32)
    for start in range(0, streamed, BLOCK_N):
        keep = start + tl.arange(0, BLOCK_N) < tokens
        it = positions(order, b, start, N, BLOCK_N)
        tile_s = load_tile(other_s, it, keep, 0, D_S, BLOCK_S, DTYPE_S)
        tile_t = load_tile(other_t, it, keep, 0, D_T, BLOCK_T, DTYPE_T)
        x_s = factor_s * _product(own_s, other_s, tile_own_s, tile_s, at, real, it, keep, D_S, BLOCK_S, DTYPE_S)
        x_t = factor_t * _product(own_t, other_t, tile_own_t, tile_t, at, real, it, keep, D_T, BLOCK_T, DTYPE_T)
        slope = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if ROWS:
            slope += _slope(x_s, x_t, stats, upstream, at, real, 1, LOSS, WIDTH)
        if COLS:
            slope += _slope(x_s, x_t, stats, upstream, it, keep, 0, LOSS, WIDTH)
        slope = tl.where(keep[None, :], slope, 0.0).to(DTYPE_S)
        if BLOCK_S < D_S:
            tile_s = load_tile(other_s, it, keep, first, D_S, BLOCK_G, DTYPE_S)
        total = tl.dot(slope, tile_s, total, input_precision="ieee")

    weight /= mean_divisor(count, B, divisor, POWER).to(tl.float32)
    if not PER_ROW:
        weight *= tl.load(grad).to(tl.float32)
    column = first + tl.arange(0, BLOCK_G)
    out += b * strides_out[0] + h * strides_out[1]
    value = tl.where(real[:, None], total * weight, 0.0).to(out.dtype.element_ty)
    inside = (slot < N)[:, None] & (column < D_S)[None, :]
    tl.store(out + at[:, None] * strides_out[2] + column[None, :] * strides_out[3], value, mask=inside)


def _statics(q_s, k_s, q_t, k_t, loss, backward: bool) -> dict:
    """The compile-time arguments that both kernels share, tile sizes and launch settings among them."""
    dtypes, dims = (dot_dtype(q_s, k_s), dot_dtype(q_t, k_t)), (q_s.shape[3], q_t.shape[3])
    return {
        **{"LOSS": loss, "WIDTH": 4 if loss == KL else 5},
        **{"DTYPE_S": dtypes[0], "DTYPE_T": dtypes[1], "D_S": dims[0], "D_T": dims[1]},
        **tile_sizes(dtypes, dims, backward),
        **LAUNCH,
    }


def _power(loss, reduction) -> int:
    """The mean runs over real rows (1), over real elements of the maps (2), or there is none (0)."""
    return 2 if loss == PROBS else int(reduction == REDUCTION["batchmean"])


def forward(q_s, k_s, q_t, k_t, mask, loss, scale_s, scale_t, reduction, need_grad):
    """(loss, stats float32 [B, H, N, 4 or 5], empty if not need_grad); q, k [B, H, N, d], and x = scale q k^T."""
    batch, heads, tokens, _ = q_s.shape
    statics = _statics(q_s, k_s, q_t, k_t, loss, backward=False)
    order, count = token_order(mask)
    programs = batch * heads * triton.cdiv(tokens, statics["BLOCK_M"])
    rows = partial = stats = None
    if need_grad:
        stats = q_s.new_empty((batch, heads, tokens, statics["WIDTH"]), dtype=torch.float32)
    if reduction == REDUCTION["none"]:
        rows = q_s.new_empty((batch, heads, tokens), dtype=torch.float32)
    else:
        partial = q_s.new_empty(programs, dtype=torch.float32)
    _forward_kernel[(programs,)](
        q_s, k_s, q_t, k_t, q_s.stride(), k_s.stride(), q_t.stride(), k_t.stride(), order, count, rows, partial, stats,
        heads, tokens, scale_s * LOG2E, scale_t * LOG2E, **statics,
    )  # fmt: skip
    if rows is None:
        power = _power(loss, reduction)
        rows = finish(partial, count, host_divisor(mask, heads, batch, tokens, power), power)
    return rows, q_s.new_empty(0, dtype=torch.float32) if stats is None else stats


def backward(grad, q_s, k_s, q_t, k_t, mask, stats, loss, scale_s, scale_t, reduction, d_q, d_k):
    """Writes the gradients of q_s and k_s into d_q and d_k, any strides; if those are one tensor, so are q_s, k_s."""
    batch, heads, tokens, d_s = q_s.shape
    statics = _statics(q_s, k_s, q_t, k_t, loss, backward=True)
    grid = batch * heads * triton.cdiv(tokens, statics["BLOCK_M"]), triton.cdiv(d_s, statics["BLOCK_G"])
    power = _power(loss, reduction)
    order, count = token_order(mask)
    weight, divisor = scale_s * (1.0 if loss == KL else 2.0), host_divisor(mask, heads, batch, tokens, power)

    def launch(own_s, other_s, own_t, other_t, out, rows, cols):
        strides = own_s.stride(), other_s.stride(), own_t.stride(), other_t.stride()
        _backward_kernel[grid](
            own_s, other_s, own_t, other_t, *strides, order, count, stats, grad, grad.stride(), out, out.stride(),
            batch, heads, tokens, scale_s * LOG2E, scale_t * LOG2E, weight, divisor,
            ROWS=rows, COLS=cols, PER_ROW=reduction == REDUCTION["none"], POWER=power, **statics,
        )  # fmt: skip

    launch(q_s, k_s, q_t, k_t, d_q, rows=True, cols=d_q is d_k)
    if d_q is not d_k:
        launch(k_s, q_s, k_t, q_t, d_k, rows=False, cols=True)
