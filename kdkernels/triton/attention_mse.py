"""attention_mse on CUDA: on probabilities with the tiles of _attention.py, on scores with the Gram identity in O(N).

With a, b the scales and X'Y short for the sum over real tokens n of x_n y_n^T:
    |a Q_s K_s' - b Q_t K_t'|^2 = a^2 <Q_s'Q_s, K_s'K_s> - 2ab <Q_t'Q_s, K_t'K_s> + b^2 <Q_t'Q_t, K_t'K_t>
    d Q_s = 2a (a Q_s K_s'K_s - b Q_t K_t'K_s), and d K_s with Q and K exchanged
so that no work grows with N^2.

Where student and teacher are close the terms cancel: of a relative difference r only r^2 is left, which float32 sums
lose from r = 1e-2 on. Every product here is therefore float64, on the tensor cores that A100 and H100 have for it (B200
too, from a later Triton than 3.6). That is the guard: down to r = 1e-7, all that float32 inputs can hold, loss and
gradient are a hundred times more exact than tiles of float32 scores, and no second, data-dependent path is needed. The
terms are combined element by element before they are summed: identical inputs give 0.
"""

import torch
import triton
import triton.language as tl

from ..ops._common import ON, REDUCTION
from . import _attention
from ._common import LAUNCH, finish, host_divisor, mean_divisor, register
from ._heads import head_of, load_tile, new_gradient, positions_of, row_address, sequences_of, tokens_of, view, written


def gram_tiles() -> dict:
    """Three 32 x 32 float64 accumulators and their operands in registers, without spills from Triton 3.6 to 3.9."""
    return {"BLOCK_D": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}


@triton.jit
def _load_float64(head, at, keep, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """load_tile widened. The sum over an axis of one element changes no value; it keeps Triton 3.6 from moving the
    widening of 16-bit inputs behind the layout change for the tensor cores, where its compiler fails."""
    return tl.sum(load_tile(head, at, keep, first, D, D, BLOCK_D, tl.float64)[:, None, :], 1)


@triton.jit
def _grams(x_s, x_t, places, b, tokens, N, i, j, D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_D: tl.constexpr,
           BLOCK_N: tl.constexpr):  # fmt: skip
    """The tile (i, j) of X_s'X_s, X_t'X_s and X_t'X_t for one head, float64; 0 beyond the head sizes."""
    ss = tl.zeros((BLOCK_D, BLOCK_D), tl.float64)
    ts = tl.zeros((BLOCK_D, BLOCK_D), tl.float64)
    tt = tl.zeros((BLOCK_D, BLOCK_D), tl.float64)
    for start in range(0, tokens, BLOCK_N):
        keep = start + tl.arange(0, BLOCK_N) < tokens
        at = positions_of(places, b, start, N, BLOCK_N)
        s_i = tl.trans(_load_float64(x_s, at, keep, i, D_S, BLOCK_D))
        t_i = tl.trans(_load_float64(x_t, at, keep, i, D_T, BLOCK_D))
        s_j = _load_float64(x_s, at, keep, j, D_S, BLOCK_D)
        t_j = _load_float64(x_t, at, keep, j, D_T, BLOCK_D)
        ss = tl.dot(s_i, s_j, ss, out_dtype=tl.float64)
        ts = tl.dot(t_i, s_j, ts, out_dtype=tl.float64)
        tt = tl.dot(t_i, t_j, tt, out_dtype=tl.float64)
    return ss, ts, tt


@triton.jit
def _store_grams(grams, ss, ts, i, j, D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """X_s'X_s into rows 0 ... D_S of [D_S + D_T, D_S], X_t'X_s into those after them."""
    row, column = i + tl.arange(0, BLOCK_D), j + tl.arange(0, BLOCK_D)
    address = grams + row[:, None] * D_S + column[None, :]
    inside = (column < D_S)[None, :]
    tl.store(address, ss, mask=(row < D_S)[:, None] & inside)
    tl.store(address + D_S * D_S, ts, mask=(row < D_T)[:, None] & inside)


@triton.jit
def _gram_kernel(
    q_s, k_s, q_t, k_t, places, partial, grams_k, grams_q, H, N, scale_s: tl.float64, scale_t: tl.float64,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of one head's six Gram matrices: the loss there and, unless None, `grams` for backward."""
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    tiles: tl.constexpr = (max(D_S, D_T) + BLOCK_D - 1) // BLOCK_D
    i, j = tl.program_id(1) // tiles * BLOCK_D, tl.program_id(1) % tiles * BLOCK_D
    q_s, k_s = head_of(q_s, b, h, D_S, D_S), head_of(k_s, b, h, D_S, D_S)
    q_t, k_t = head_of(q_t, b, h, D_T, D_T), head_of(k_t, b, h, D_T, D_T)
    tokens = tokens_of(places, b, N)
    q_ss, q_ts, q_tt = _grams(q_s, q_t, places, b, tokens, N, i, j, D_S, D_T, BLOCK_D, BLOCK_N)
    k_ss, k_ts, k_tt = _grams(k_s, k_t, places, b, tokens, N, i, j, D_S, D_T, BLOCK_D, BLOCK_N)
    if grams_k is not None:
        offset = head * ((D_S + D_T) * D_S)
        _store_grams(grams_k + offset, k_ss, k_ts, i, j, D_S, D_T, BLOCK_D)
        _store_grams(grams_q + offset, q_ss, q_ts, i, j, D_S, D_T, BLOCK_D)
    cross = scale_s * scale_t * (q_ts * k_ts)
    terms = (scale_s * scale_s * (q_ss * k_ss) - cross) + (scale_t * scale_t * (q_tt * k_tt) - cross)
    tl.store(partial + head * (tiles * tiles) + tl.program_id(1), tl.sum(tl.sum(terms, 1), 0))


@triton.jit
def _rows_times_gram(x, at, real, gram, column, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `at` of a head [N, D] times columns of a Gram matrix [D, WIDTH], float64."""
    total = tl.zeros((at.shape[0], BLOCK_D), tl.float64)
    for first in range(0, D, BLOCK_D):
        row = first + tl.arange(0, BLOCK_D)
        inside = (row < D)[:, None] & (column < WIDTH)[None, :]
        tile = tl.load(gram + row[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
        total = tl.dot(_load_float64(x, at, real, first, D, BLOCK_D), tile, total, out_dtype=tl.float64)
    return total


@triton.jit
def _gram_backward_kernel(
    x_s, x_t, grams, grad, places, out, B, H, N, scale_s: tl.float64, scale_t: tl.float64, divisor: tl.int64,
    D_S: tl.constexpr, D_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N rows and BLOCK_D columns of d x_s; `grams` are those of the other operand."""
    tiles = tl.cdiv(N, BLOCK_N)
    start = tl.program_id(0) % tiles * BLOCK_N
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // H, head % H
    grams += head * ((D_S + D_T) * D_S)
    slot = start + tl.arange(0, BLOCK_N)
    tokens = tokens_of(places, b, N)
    real = slot < tokens
    at = positions_of(places, b, start, N, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    student = _rows_times_gram(head_of(x_s, b, h, D_S, D_S), at, real, grams, column, D_S, D_S, BLOCK_D)
    teacher = _rows_times_gram(head_of(x_t, b, h, D_T, D_T), at, real, grams + D_S * D_S, column, D_T, D_S, BLOCK_D)

    weight = 2.0 * scale_s * tl.load(grad).to(tl.float64) / mean_divisor(places[1], B, divisor, 2).to(tl.float64)
    value = tl.where(real[:, None], (scale_s * student - scale_t * teacher) * weight, 0.0)
    inside = (slot < written(places, tokens, N))[:, None] & (column < D_S)[None, :]
    address = row_address(head_of(out, b, h, D_S, D_S), at, column, D_S, D_S, 1, 0)
    tl.store(address, value.to(tl.float32).to(out[0].dtype.element_ty), mask=inside)


def _scores_forward(q_s, k_s, q_t, k_t, sequences, scale_s, scale_t, need_grad):
    """(loss, stats): Grams of K, for d Q, and of Q, float64 [2, B, H, d_s + d_t, d_s]; empty if not need_grad."""
    heads, d_s, d_t, sizes = q_s.shape[1], q_s.shape[-1], q_t.shape[-1], gram_tiles()
    tiles = triton.cdiv(max(d_s, d_t), sizes["BLOCK_D"]) ** 2
    partial = q_s.new_empty(sequences.batch * heads * tiles, dtype=torch.float64)
    stats = grams_k = grams_q = None
    if need_grad:
        stats = q_s.new_empty((2, sequences.batch, heads, d_s + d_t, d_s), dtype=torch.float64)
        grams_k, grams_q = stats
    _gram_kernel[(sequences.batch * heads, tiles)](
        view(q_s), view(k_s), view(q_t), view(k_t), sequences.places, partial, grams_k, grams_q, heads,
        sequences.tokens, scale_s, scale_t, D_S=d_s, D_T=d_t, **sizes, **LAUNCH,
    )  # fmt: skip
    divisor = host_divisor(sequences.count, heads, sequences.batch, sequences.tokens, 2)
    loss = finish(partial, sequences.count, divisor, 2)
    return loss, q_s.new_empty(0, dtype=torch.float32) if stats is None else stats


def _scores_backward(grad, q_s, k_s, q_t, k_t, sequences, stats, scale_s, scale_t):
    heads, d_s, d_t, sizes = q_s.shape[1], q_s.shape[-1], q_t.shape[-1], gram_tiles()
    batch, tokens = sequences.batch, sequences.tokens
    grid = batch * heads * triton.cdiv(tokens, sizes["BLOCK_N"]), triton.cdiv(d_s, sizes["BLOCK_D"])
    divisor = host_divisor(sequences.count, heads, batch, tokens, 2)
    grads = new_gradient(q_s, sequences.packed), new_gradient(k_s, sequences.packed)
    for x_s, x_t, grams, out in zip((q_s, k_s), (q_t, k_t), stats, grads, strict=True):
        _gram_backward_kernel[grid](
            view(x_s), view(x_t), grams, grad, sequences.places, view(out), batch, heads, tokens, scale_s, scale_t,
            divisor, D_S=d_s, D_T=d_t, **sizes, **LAUNCH,
        )  # fmt: skip
    return grads


def attention_mse(q_s, k_s, q_t, k_t, mask, cu_seqlens, max_seqlen, on, scale_s, scale_t, need_grad):
    sequences = sequences_of(q_s, mask, cu_seqlens, max_seqlen)
    if on == ON["scores"]:
        loss, stats = _scores_forward(q_s, k_s, q_t, k_t, sequences, scale_s, scale_t, need_grad)
    else:
        maps = _attention.Maps(q_s, k_s, q_t, k_t, sequences, _attention.PROBS, scale_s, scale_t)
        loss, stats = _attention.forward(maps, REDUCTION["mean"], need_grad)
    return loss, loss.new_empty(0), loss.new_empty(0), stats


def attention_mse_backward(
    grad, q_s, k_s, q_t, k_t, mask, cu_seqlens, grad_q, grad_k, stats, max_seqlen, on, scale_s, scale_t
):
    sequences = sequences_of(q_s, mask, cu_seqlens, max_seqlen)
    if on == ON["scores"]:
        return _scores_backward(grad, q_s, k_s, q_t, k_t, sequences, stats, scale_s, scale_t)
    d_q, d_k = new_gradient(q_s, sequences.packed), new_gradient(k_s, sequences.packed)
    maps = _attention.Maps(q_s, k_s, q_t, k_t, sequences, _attention.PROBS, scale_s, scale_t)
    _attention.backward(maps, grad, stats, REDUCTION["mean"], d_q, d_k)
    return d_q, d_k


register("attention_mse", attention_mse)
register("attention_mse_backward", attention_mse_backward)
