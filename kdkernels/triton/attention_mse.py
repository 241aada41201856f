"""attention_mse on CUDA: on probabilities with the tiles of _attention.py, on scores with the Gram identity in O(N).

With a, b the scales and X Y short for the sum over real tokens of x_n y_n^T:
    |a Q_s K_s^T - b Q_t K_t^T|^2 = <a^2 Q_s Q_s, K_s K_s> - 2ab <Q_t Q_s, K_t K_s> + b^2 <Q_t Q_t, K_t K_t>
    dQ_s = 2a (a Q_s (K_s K_s) - b Q_t (K_t K_s)), and dK_s with Q and K exchanged
so that no work grows with N^2.

Where student and teacher are close the terms cancel: with a relative difference d, d^2 of them is left, which float32 sums would lose
from d = 1e-2 on. Every product here is therefore float64, on the tensor cores that A100, H100 and B200 have for it: what is
left is then more exact than float32 score tiles for any difference that float32 inputs can hold, so there is no data-dependent
second path. The terms are combined element by element before they are summed: identical inputs give exactly 0.
"""

import torch
import triton
import triton.language as tl

from ..ops._common import ON, REDUCTION
from . import _attention
from ._common import LAUNCH, finish, host_divisor, load_tile, mean_divisor, positions, register, token_order, tokens_of


def gram_tiles() -> dict:
    """A 32 x 32 float64 accumulator takes 16 registers a thread of 4 warps; three of them and their operands fit."""
    return {"BLOCK_D": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}


@triton.jit
def _grams(x_s, x_t, order, b, tokens, N, i, j, strides_s, strides_t, D_S: tl.constexpr, D_T: tl.constexpr,
           BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The tile (i, j) of X_s X_s, X_t X_s and X_t X_t for one head, float64; 0 beyond the head sizes."""
    ss = tl.zeros((BLOCK_D, BLOCK_D), tl.float64)
    ts = tl.zeros((BLOCK_D, BLOCK_D), tl.float64)
    tt = tl.zeros((BLOCK_D, BLOCK_D), tl.float64)
    for start in range(0, tokens, BLOCK_N):
        keep = start + tl.arange(0, BLOCK_N) < tokens
        at = positions(order, b, start, N, BLOCK_N)
        s_i = tl.trans(load_tile(x_s, at, keep, i, strides_s, D_S, BLOCK_D, tl.float64))
        t_i = tl.trans(load_tile(x_t, at, keep, i, strides_t, D_T, BLOCK_D, tl.float64))
        s_j = load_tile(x_s, at, keep, j, strides_s, D_S, BLOCK_D, tl.float64)
        t_j = load_tile(x_t, at, keep, j, strides_t, D_T, BLOCK_D, tl.float64)
        ss = tl.dot(s_i, s_j, ss, out_dtype=tl.float64)
        ts = tl.dot(t_i, s_j, ts, out_dtype=tl.float64)
        tt = tl.dot(t_i, t_j, tt, out_dtype=tl.float64)
    return ss, ts, tt


@triton.jit
def _store_grams(grams, ss, ts, i, j, D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """X_s X_s into rows 0 ... D_S of [D_S + D_T, D_S], X_t X_s into those after them."""
    row, column = i + tl.arange(0, BLOCK_D), j + tl.arange(0, BLOCK_D)
    address = grams + row[:, None] * D_S + column[None, :]
    inside = (column < D_S)[None, :]
    tl.store(address, ss, mask=(row < D_S)[:, None] & inside)
    tl.store(address + D_S * D_S, ts, mask=(row < D_T)[:, None] & inside)


@triton.jit
def _gram_kernel(
    q_s, k_s, q_t, k_t, order, count, partial, grams_k, grams_q, strides_qs, strides_ks, strides_qt, strides_kt, H, N,
    scale_s: tl.float64, scale_t: tl.float64, D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of the six Gram matrices of one head: it adds up the loss there and keeps what backward needs."""
    head = tl.program_id(0)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    tiles: tl.constexpr = (max(D_S, D_T) + BLOCK_D - 1) // BLOCK_D
    i, j = tl.program_id(1) // tiles * BLOCK_D, tl.program_id(1) % tiles * BLOCK_D
    q_s += b * strides_qs[0] + h * strides_qs[1]
    k_s += b * strides_ks[0] + h * strides_ks[1]
    q_t += b * strides_qt[0] + h * strides_qt[1]
    k_t += b * strides_kt[0] + h * strides_kt[1]
    tokens = tokens_of(count, b, N)
    q_ss, q_ts, q_tt = _grams(q_s, q_t, order, b, tokens, N, i, j, strides_qs, strides_qt, D_S, D_T, BLOCK_D, BLOCK_N)
    k_ss, k_ts, k_tt = _grams(k_s, k_t, order, b, tokens, N, i, j, strides_ks, strides_kt, D_S, D_T, BLOCK_D, BLOCK_N)
    if grams_k is not None:
        offset = head.to(tl.int64) * ((D_S + D_T) * D_S)
        _store_grams(grams_k + offset, k_ss, k_ts, i, j, D_S, D_T, BLOCK_D)
        _store_grams(grams_q + offset, q_ss, q_ts, i, j, D_S, D_T, BLOCK_D)
    cross = scale_s * scale_t * (q_ts * k_ts)
    terms = (scale_s * scale_s * (q_ss * k_ss) - cross) + (scale_t * scale_t * (q_tt * k_tt) - cross)
    tl.store(partial + head * (tiles * tiles) + tl.program_id(1), tl.sum(tl.sum(terms, 1), 0))


@triton.jit
def _gram_backward_kernel(
    x_s, x_t, grams, grad, order, count, out, strides_s, strides_t, B, H, N, scale_s: tl.float64, scale_t: tl.float64,
    divisor: tl.int64,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N rows and BLOCK_D columns of d x_s; `grams` are those of the other operand."""
    tiles = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    x_s += b * strides_s[0] + h * strides_s[1]
    x_t += b * strides_t[0] + h * strides_t[1]
    grams += head.to(tl.int64) * ((D_S + D_T) * D_S)
    tokens = tokens_of(count, b, N)
    slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    real = slot < tokens
    at = positions(order, b, tile * BLOCK_N, N, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)

    student = tl.zeros((BLOCK_N, BLOCK_D), tl.float64)
    teacher = tl.zeros((BLOCK_N, BLOCK_D), tl.float64)
    for first in range(0, D_S, BLOCK_D):
        row = first + tl.arange(0, BLOCK_D)
        gram = tl.load(grams + row[:, None] * D_S + column[None, :], mask=(row < D_S)[:, None] & (column < D_S)[None, :], other=0.0)
        student = tl.dot(load_tile(x_s, at, real, first, strides_s, D_S, BLOCK_D, tl.float64), gram, student, out_dtype=tl.float64)
    grams += D_S * D_S
    for first in range(0, D_T, BLOCK_D):
        row = first + tl.arange(0, BLOCK_D)
        gram = tl.load(grams + row[:, None] * D_S + column[None, :], mask=(row < D_T)[:, None] & (column < D_S)[None, :], other=0.0)
        teacher = tl.dot(load_tile(x_t, at, real, first, strides_t, D_T, BLOCK_D, tl.float64), gram, teacher, out_dtype=tl.float64)

    weight = 2.0 * scale_s * tl.load(grad).to(tl.float64) / mean_divisor(count, B, divisor, 2).to(tl.float64)
    value = tl.where(real[:, None], (scale_s * student - scale_t * teacher) * weight, 0.0)
    address = out + (head.to(tl.int64) * N + at)[:, None] * D_S + column[None, :]
    tl.store(address, value.to(tl.float32).to(out.dtype.element_ty), mask=(slot < N)[:, None] & (column < D_S)[None, :])


def _scores_forward(q_s, k_s, q_t, k_t, mask, scale_s, scale_t, need_grad):
    batch, heads, tokens, d_s = q_s.shape
    d_t, sizes = q_t.shape[3], gram_tiles()
    order, count = token_order(mask)
    tiles = triton.cdiv(max(d_s, d_t), sizes["BLOCK_D"]) ** 2
    partial = q_s.new_empty(batch * heads * tiles, dtype=torch.float64)
    # [of k, of q]: what dQ needs and what dK needs
    stats = q_s.new_empty((2, batch, heads, d_s + d_t, d_s) if need_grad else 0, dtype=torch.float64)
    grams_k, grams_q = stats if need_grad else (None, None)
    _gram_kernel[(batch * heads, tiles)](
        q_s, k_s, q_t, k_t, order, count, partial, grams_k, grams_q, q_s.stride(), k_s.stride(), q_t.stride(), k_t.stride(),
        heads, tokens, scale_s, scale_t, D_S=d_s, D_T=d_t, **sizes, **LAUNCH,
    )  # fmt: skip
    return finish(partial, count, host_divisor(mask, heads, batch, tokens, 2), 2), stats


def _scores_backward(grad, x_s, x_t, mask, grams, scale_s, scale_t):
    batch, heads, tokens, d_s = x_s.shape
    out, sizes = x_s.new_empty(x_s.shape), gram_tiles()
    order, count = token_order(mask)
    grid = batch * heads * triton.cdiv(tokens, sizes["BLOCK_N"]), triton.cdiv(d_s, sizes["BLOCK_D"])
    _gram_backward_kernel[grid](
        x_s, x_t, grams, grad, order, count, out, x_s.stride(), x_t.stride(), batch, heads, tokens, scale_s, scale_t,
        host_divisor(mask, heads, batch, tokens, 2), D_S=d_s, D_T=x_t.shape[3], **sizes, **LAUNCH,
    )  # fmt: skip
    return out


def attention_mse(q_s, k_s, q_t, k_t, mask, on, scale_s, scale_t, need_grad):
    if on == ON["scores"]:
        loss, stats = _scores_forward(q_s, k_s, q_t, k_t, mask, scale_s, scale_t, need_grad)
    else:
        loss, stats = _attention.forward(
            q_s, k_s, q_t, k_t, mask, _attention.PROBS, scale_s, scale_t, REDUCTION["mean"], need_grad
        )
    return loss, q_s.new_empty(0, dtype=torch.float32), q_s.new_empty(0, dtype=torch.float32), stats


def attention_mse_backward(grad, q_s, k_s, q_t, k_t, mask, grad_q, grad_k, stats, on, scale_s, scale_t):
    if on == ON["scores"]:
        d_q = _scores_backward(grad, q_s, q_t, mask, stats[0], scale_s, scale_t)
        return d_q, _scores_backward(grad, k_s, k_t, mask, stats[1], scale_s, scale_t)
    d_q, d_k = q_s.new_empty(q_s.shape), k_s.new_empty(k_s.shape)
    rest = _attention.PROBS, scale_s, scale_t, REDUCTION["mean"]
    _attention.backward(grad, q_s, k_s, q_t, k_t, mask, stats, d_q, *rest, rows=True, cols=False)
    _attention.backward(grad, k_s, q_s, k_t, q_t, mask, stats, d_k, *rest, rows=False, cols=True)
    return d_q, d_k


register("attention_mse", attention_mse)
register("attention_mse_backward", attention_mse_backward)
