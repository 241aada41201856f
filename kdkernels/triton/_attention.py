"""Two attention maps side by side, the student's and the teacher's, never stored: tiles for the three losses that compare them.

With x = scale q k^T / T * log2(e) and p = softmax(x), i a query and j a key:
    kl     row loss sum_j p_t (x_t - x_s) - (lse_t - lse_s)          d/dx_s = p_s - p_t
    probs  row loss sum_j (p_s - p_t)^2                              d/dx_s = 2 p_s (p_s - p_t - delta), delta = sum_j p_s (p_s - p_t)
(up to the constant log 2: both maps live in base 2, where the exponential is one instruction).

Forward: a program owns BLOCK_M queries and streams the keys. kl takes one pass, both online softmaxes coupled with the sum
of p_t (x_t - x_s). probs takes two, because sum p_s^2 - 2 p_s p_t + p_t^2 of one pass would cancel where the maps agree.
It leaves per row max and 1 / sum of both maps (and delta): exp2(x - max) / sum is exact where x - lse would round with lse.

Backward recomputes. A program owns BLOCK_M rows of one operand and streams the other: dQ owns queries (ROWS), dK owns keys (COLS),
and where queries and keys are the same tensor (relations) both at once, which saves a third of the products. No two programs write
one output, so nothing is atomic and results repeat bit by bit.

Head sizes above one tile (BLOCK_D) are walked through in chunks; the gradient's columns are then split over programs.
"""

import torch
import triton
import triton.language as tl

from ..ops._common import REDUCTION
from ._common import LAUNCH, dot_dtype, finish, host_divisor, load_tile, mean_divisor, positions, token_order, tokens_of

KL, PROBS = tl.constexpr(0), tl.constexpr(1)
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)


def tile_sizes(dtypes, dims, backward: bool) -> dict:
    """Block shapes and launch settings. BLOCK_S and BLOCK_T: columns of a head in one product, BLOCK_G: of the gradient.

    16-bit products run on tensor cores (64 rows a tile, whole heads up to 128). float32 ones keep float32 precision, on the ordinary
    cores: operands sit in registers, 16 columns of 32 rows at a time is what fits without spills.
    """
    half = all(dtype != tl.float32 for dtype in dtypes)
    block, widest = (64, 128) if half else (32, 16)
    power_s, power_t = (max(16, triton.next_power_of_2(d)) for d in dims)
    sizes = {"BLOCK_M": block, "BLOCK_N": block, "BLOCK_S": min(power_s, widest), "BLOCK_T": min(power_t, widest)}
    if backward:
        sizes["BLOCK_G"] = min(power_s, 128 if half else 64)
    return {**sizes, "num_warps": 4, "num_stages": 2}


@triton.jit
def _scores(own, other, own_head, own_at, own_keep, own_strides, other_head, other_at, other_keep, other_strides,
            D: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """own other^T [BLOCK_M, BLOCK_N] float32. `own` and `other` hold whole heads where D fits BLOCK_D, and else go unused."""
    if BLOCK_D >= D:
        return tl.dot(own, tl.trans(other), input_precision="ieee")
    product = tl.zeros((own_at.shape[0], other_at.shape[0]), tl.float32)
    for first in range(0, D, BLOCK_D):
        a = load_tile(own_head, own_at, own_keep, first, own_strides, D, BLOCK_D, DTYPE)
        b = load_tile(other_head, other_at, other_keep, first, other_strides, D, BLOCK_D, DTYPE)
        product = tl.dot(a, tl.trans(b), product, input_precision="ieee")
    return product


@triton.jit
def _online_softmax(x, top, total):
    """One more tile of a softmax: (exp2(x - new max), the factor for older sums, new max, new sum)."""
    new = tl.maximum(top, tl.max(x, 1))
    fade = tl.exp2(top - new)
    e = tl.exp2(x - new[:, None])
    return e, fade, new, total * fade + tl.sum(e, 1)


@triton.jit
def _forward_kernel(
    q_s, k_s, q_t, k_t, order, count, rows, partial, stats,
    strides_qs, strides_ks, strides_qt, strides_kt, H, N, factor_s, factor_t,
    LOSS: tl.constexpr, D_S: tl.constexpr, D_T: tl.constexpr, DTYPE_S: tl.constexpr, DTYPE_T: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_s += b * strides_qs[0] + h * strides_qs[1]
    k_s += b * strides_ks[0] + h * strides_ks[1]
    q_t += b * strides_qt[0] + h * strides_qt[1]
    k_t += b * strides_kt[0] + h * strides_kt[1]

    tokens = tokens_of(count, b, N)
    slot = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = slot < tokens
    at = positions(order, b, tile * BLOCK_M, N, BLOCK_M)
    keys = tl.where(tile * BLOCK_M < tokens, tokens, 0)  # a tile of padding has nothing to stream
    own_s = load_tile(q_s, at, real, 0, strides_qs, D_S, BLOCK_S, DTYPE_S)
    own_t = load_tile(q_t, at, real, 0, strides_qt, D_T, BLOCK_T, DTYPE_T)

    top_s = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    top_t = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_s = tl.zeros((BLOCK_M,), tl.float32)
    total_t = tl.zeros((BLOCK_M,), tl.float32)
    gap = tl.zeros((BLOCK_M,), tl.float32)  # sum of exp2(x_t - top_t) (x_t - x_s)
    for start in range(0, keys, BLOCK_N):
        keep = start + tl.arange(0, BLOCK_N) < tokens
        key = positions(order, b, start, N, BLOCK_N)
        other_s = load_tile(k_s, key, keep, 0, strides_ks, D_S, BLOCK_S, DTYPE_S)
        other_t = load_tile(k_t, key, keep, 0, strides_kt, D_T, BLOCK_T, DTYPE_T)
        x_s = factor_s * _scores(own_s, other_s, q_s, at, real, strides_qs, k_s, key, keep, strides_ks, D_S, BLOCK_S, DTYPE_S)
        x_t = factor_t * _scores(own_t, other_t, q_t, at, real, strides_qt, k_t, key, keep, strides_kt, D_T, BLOCK_T, DTYPE_T)
        masked_s = tl.where(keep[None, :], x_s, float("-inf"))
        masked_t = tl.where(keep[None, :], x_t, float("-inf"))
        _, _, top_s, total_s = _online_softmax(masked_s, top_s, total_s)
        e_t, fade_t, top_t, total_t = _online_softmax(masked_t, top_t, total_t)
        if LOSS == KL:
            gap = gap * fade_t + tl.sum(e_t * (x_t - x_s), 1)

    inverse_s, inverse_t = 1.0 / total_s, 1.0 / total_t
    delta = tl.zeros((BLOCK_M,), tl.float32)
    if LOSS == KL:
        loss = gap * inverse_t - (top_t - top_s) - tl.log2(total_t / total_s)
    else:
        loss = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, keys, BLOCK_N):
            keep = start + tl.arange(0, BLOCK_N) < tokens
            key = positions(order, b, start, N, BLOCK_N)
            other_s = load_tile(k_s, key, keep, 0, strides_ks, D_S, BLOCK_S, DTYPE_S)
            other_t = load_tile(k_t, key, keep, 0, strides_kt, D_T, BLOCK_T, DTYPE_T)
            x_s = factor_s * _scores(own_s, other_s, q_s, at, real, strides_qs, k_s, key, keep, strides_ks, D_S, BLOCK_S, DTYPE_S)
            x_t = factor_t * _scores(own_t, other_t, q_t, at, real, strides_qt, k_t, key, keep, strides_kt, D_T, BLOCK_T, DTYPE_T)
            p_s = tl.exp2(x_s - top_s[:, None]) * inverse_s[:, None]
            p_t = tl.exp2(x_t - top_t[:, None]) * inverse_t[:, None]
            difference = tl.where(keep[None, :], p_s - p_t, 0.0)
            loss += tl.sum(difference * difference, 1)
            delta += tl.sum(tl.where(keep[None, :], p_s, 0.0) * difference, 1)

    loss = tl.where(real, loss, 0.0)
    row = head.to(tl.int64) * N + at
    if rows is None:
        tl.store(partial + tl.program_id(0), tl.sum(loss, 0))
    else:
        tl.store(rows + row, loss * LN2, mask=slot < N)
    if stats is not None:
        stats += row * WIDTH
        tl.store(stats, top_s, mask=real)
        tl.store(stats + 1, inverse_s, mask=real)
        tl.store(stats + 2, top_t, mask=real)
        tl.store(stats + 3, inverse_t, mask=real)
        if LOSS == PROBS:
            tl.store(stats + 4, delta, mask=real)


@triton.jit
def _slope(x_s, x_t, stats, head, N, query, keep, grad, strides_grad, AXIS: tl.constexpr, LOSS: tl.constexpr, WIDTH: tl.constexpr):
    """d(row losses)/dx_s up to constants, for a tile of scores whose queries lie along axis 1 - AXIS.

    With reduction "none", `grad` points at this head's upstream gradients, one per query; else it is None.
    """
    stats += (head.to(tl.int64) * N + query) * WIDTH
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
        slope *= tl.expand_dims(tl.load(grad + query * strides_grad[2], mask=keep, other=0.0), AXIS).to(tl.float32)
    return slope


@triton.jit
def _backward_kernel(
    own_s, other_s, own_t, other_t, order, count, stats, grad, out,
    strides_own_s, strides_other_s, strides_own_t, strides_other_t, strides_grad, strides_out,
    B, H, N, factor_s, factor_t, weight, divisor: tl.int64,
    LOSS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PER_ROW: tl.constexpr, POWER: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, DTYPE_S: tl.constexpr, DTYPE_T: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    first = tl.program_id(1) * BLOCK_G  # of the gradient's columns
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    own_s += b * strides_own_s[0] + h * strides_own_s[1]
    other_s += b * strides_other_s[0] + h * strides_other_s[1]
    own_t += b * strides_own_t[0] + h * strides_own_t[1]
    other_t += b * strides_other_t[0] + h * strides_other_t[1]

    tokens = tokens_of(count, b, N)
    slot = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = slot < tokens
    at = positions(order, b, tile * BLOCK_M, N, BLOCK_M)
    streamed = tl.where(tile * BLOCK_M < tokens, tokens, 0)  # a tile of padding has nothing to stream
    a_s = load_tile(own_s, at, real, 0, strides_own_s, D_S, BLOCK_S, DTYPE_S)
    a_t = load_tile(own_t, at, real, 0, strides_own_t, D_T, BLOCK_T, DTYPE_T)
    upstream = None
    if PER_ROW:
        upstream = grad + b * strides_grad[0] + h * strides_grad[1]

    total = tl.zeros((BLOCK_M, BLOCK_G), tl.float32)
    for start in range(0, streamed, BLOCK_N):
        keep = start + tl.arange(0, BLOCK_N) < tokens
        it = positions(order, b, start, N, BLOCK_N)
        b_s = load_tile(other_s, it, keep, 0, strides_other_s, D_S, BLOCK_S, DTYPE_S)
        b_t = load_tile(other_t, it, keep, 0, strides_other_t, D_T, BLOCK_T, DTYPE_T)
        x_s = factor_s * _scores(
            a_s, b_s, own_s, at, real, strides_own_s, other_s, it, keep, strides_other_s, D_S, BLOCK_S, DTYPE_S
        )
        x_t = factor_t * _scores(
            a_t, b_t, own_t, at, real, strides_own_t, other_t, it, keep, strides_other_t, D_T, BLOCK_T, DTYPE_T
        )
        slope = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if ROWS:
            slope += _slope(x_s, x_t, stats, head, N, at, real, upstream, strides_grad, 1, LOSS, WIDTH)
        if COLS:
            slope += _slope(x_s, x_t, stats, head, N, it, keep, upstream, strides_grad, 0, LOSS, WIDTH)
        slope = tl.where(keep[None, :], slope, 0.0)
        if BLOCK_S < D_S:
            b_s = load_tile(other_s, it, keep, first, strides_other_s, D_S, BLOCK_G, DTYPE_S)
        total = tl.dot(slope.to(DTYPE_S), b_s, total, input_precision="ieee")

    weight /= mean_divisor(count, B, divisor, POWER).to(tl.float32)
    if not PER_ROW:
        weight *= tl.load(grad).to(tl.float32)
    column = first + tl.arange(0, BLOCK_G)
    address = out + b * strides_out[0] + h * strides_out[1] + at[:, None] * strides_out[2] + column[None, :] * strides_out[3]
    value = tl.where(real[:, None], total * weight, 0.0)
    tl.store(address, value.to(out.dtype.element_ty), mask=(slot < N)[:, None] & (column < D_S)[None, :])


def _statics(q_s, k_s, q_t, k_t, loss, backward=False) -> dict:
    """The compile-time arguments that both kernels share, tile sizes and launch settings among them."""
    dtypes, dims = (dot_dtype(q_s, k_s), dot_dtype(q_t, k_t)), (q_s.shape[3], q_t.shape[3])
    return {
        "LOSS": loss, "WIDTH": 4 if loss == KL else 5, "DTYPE_S": dtypes[0], "DTYPE_T": dtypes[1], "D_S": dims[0], "D_T": dims[1],
        **tile_sizes(dtypes, dims, backward), **LAUNCH,
    }  # fmt: skip


def forward(q_s, k_s, q_t, k_t, mask, loss, scale_s, scale_t, reduction, need_grad):
    """q, k [B, H, N, d] -> (loss, stats). scale: all that multiplies q k^T. stats: float32 [B, H, N, 4 or 5] if need_grad, else empty."""
    batch, heads, tokens, _ = q_s.shape
    statics = _statics(q_s, k_s, q_t, k_t, loss)
    order, count = token_order(mask)
    stats = q_s.new_empty((batch, heads, tokens, statics["WIDTH"]), dtype=torch.float32) if need_grad else None
    programs = batch * heads * triton.cdiv(tokens, statics["BLOCK_M"])
    rows = partial = None
    if reduction == REDUCTION["none"]:
        rows = q_s.new_empty((batch, heads, tokens), dtype=torch.float32)
    else:
        partial = q_s.new_empty(programs, dtype=torch.float32)
    _forward_kernel[(programs,)](
        q_s, k_s, q_t, k_t, order, count, rows, partial, stats,
        q_s.stride(), k_s.stride(), q_t.stride(), k_t.stride(), heads, tokens, scale_s * LOG2E, scale_t * LOG2E, **statics,
    )  # fmt: skip
    if rows is None:
        power = _power(loss, reduction)
        divisor = host_divisor(mask, heads, batch, tokens, power)
        rows = finish(partial, count, divisor, power, scale=LN2.value if loss == KL else 1.0)
    return rows, q_s.new_empty(0, dtype=torch.float32) if stats is None else stats


def backward(grad, own_s, other_s, own_t, other_t, mask, stats, out, loss, scale_s, scale_t, reduction, rows, cols):
    """Writes into `out` [B, H, N, d_s] the gradient of `own_s`, whose rows are queries (`rows`), keys (`cols`) or both."""
    batch, heads, tokens, d_s = own_s.shape
    statics = _statics(own_s, other_s, own_t, other_t, loss, backward=True)
    power = _power(loss, reduction)
    order, count = token_order(mask)
    grid = batch * heads * triton.cdiv(tokens, statics["BLOCK_M"]), triton.cdiv(d_s, statics["BLOCK_G"])
    divisor = host_divisor(mask, heads, batch, tokens, power)
    _backward_kernel[grid](
        own_s, other_s, own_t, other_t, order, count, stats, grad, out,
        own_s.stride(), other_s.stride(), own_t.stride(), other_t.stride(), grad.stride(), out.stride(),
        batch, heads, tokens, scale_s * LOG2E, scale_t * LOG2E, scale_s * (1.0 if loss == KL else 2.0), divisor,
        ROWS=rows, COLS=cols, PER_ROW=reduction == REDUCTION["none"], POWER=power, **statics,
    )  # fmt: skip


def _power(loss, reduction) -> int:
    """The mean runs over real rows (1), over real elements of the maps (2), or is none (0)."""
    return 2 if loss == PROBS else int(reduction == REDUCTION["batchmean"])
