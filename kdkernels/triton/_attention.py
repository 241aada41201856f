"""Two attention maps side by side, the student's and the teacher's, never stored: the tiles of three losses.

With x = (scale q k^T + bias) / T * log2(e) and p = softmax(x) in base 2, i a query and j a key that it sees:
    kl          row loss sum_j p_t (x_t - x_s) - (lse_t - lse_s), times log 2     slope p_s - p_t
    reverse kl  the same with s and t exchanged     slope p_s (m - sum_j p_s m), m = (x_s - x_t) log 2
    probs       row loss sum_j (p_s - p_t)^2     slope p_s (p_s - p_t - delta), delta = sum_j p_s (p_s - p_t)
The slope is the derivative by the student's scores, up to a factor 2 for probs.

Forward: a program owns BLOCK_M queries and streams the keys. Either kl takes one pass, both online softmaxes coupled
with the sum of p (x - x); a side whose lse is given needs no softmax at all. probs takes two, since the sum
p_s^2 - 2 p_s p_t + p_t^2 of a single one would cancel where the maps agree. What stays per row is max and 1 / sum of
both maps (and delta): exp2(x - max) / sum does not round with the size of lse.

Backward recomputes. A program owns BLOCK_M rows of one operand and streams the other: d q owns queries (ROWS), d k owns
keys (COLS), of all heads that share them. Where queries and keys are one tensor, scores are symmetric and one launch
does both, with half of the products. No two programs write one output, so nothing is atomic and results repeat bit by
bit. Under a causal mask tiles that no query sees are not visited.

A head wider than a tile is walked through in chunks; the columns of its gradient are split over programs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..ops._common import REDUCTION
from ._common import LAUNCH, dot_dtype, finish, host_divisor, mean_divisor
from ._heads import (
    Sequences,
    first_of,
    head_of,
    load_tile,
    positions_of,
    row_address,
    row_strides,
    tokens_of,
    view,
    written,
)

KL, PROBS, REVERSE_KL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2E = 1.4426950408889634
LN2, KERNEL_LOG2E = tl.constexpr(0.6931471805599453), tl.constexpr(LOG2E)


def tile_sizes(dtypes, dims, backward: bool, crowded: bool) -> dict:
    """Block shapes and launch settings. BLOCK_S and BLOCK_T: columns of a head in one product, BLOCK_G: of the
    gradient.

    16-bit products run on tensor cores (64 rows a tile, whole heads up to 128). float32 ones keep float32 precision, on
    the ordinary cores: operands sit in registers, and 16 columns at a time is what fits without spills; with addresses
    of a bias or a group of heads beside them (`crowded`), half as many rows.
    """
    half = all(dtype != tl.float32 for dtype in dtypes)
    power_s, power_t = (max(16, triton.next_power_of_2(d)) for d in dims)
    widest = 128 if half else 16
    rows = 64 if half or not crowded else 32
    sizes = {"BLOCK_M": rows, "BLOCK_S": min(power_s, widest), "BLOCK_T": min(power_t, widest)}
    sizes["BLOCK_N"] = 64 if half and max(power_s, power_t) <= 64 else 32
    if backward:
        sizes["BLOCK_G"] = min(power_s, 128 if half else 64)
    return {**sizes, "num_warps": 4, "num_stages": 2 if half else 1}


@triton.jit
def _product(
    a, b, tile_a, tile_b, at, real, it, keep, D: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """a b^T for rows `at`, `it` of two heads, float32. The tiles hold these rows if D fits BLOCK_D, else go unused."""
    if BLOCK_D >= D:
        return tl.dot(tile_a, tl.trans(tile_b), input_precision="ieee")
    total = tl.zeros((at.shape[0], it.shape[0]), tl.float32)
    for first in range(0, D, BLOCK_D):
        chunk_a = load_tile(a, at, real, first, D, SIZE, BLOCK_D, DTYPE)
        chunk_b = load_tile(b, it, keep, first, D, SIZE, BLOCK_D, DTYPE)
        total = tl.dot(chunk_a, tl.trans(chunk_b), total, input_precision="ieee")
    return total


@triton.jit
def _bias_of(bias, b, h, JOINED: tl.constexpr):
    """One head's bias, or all heads': (pointer, strides of own and streamed token, stride of heads, heads, factor)."""
    pointer, of_batch, of_head, of_own, of_streamed, heads, factor = bias
    pointer += b * of_batch
    if not JOINED:
        pointer += h * of_head
    return pointer, of_own, of_streamed, of_head, heads, factor


@triton.jit
def _scores(
    a, b, tile_a, tile_b, at, real, it, keep, factor, bias, base, D: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """factor a b^T + bias in base 2, whose positions count from `base`."""
    x = factor * _product(a, b, tile_a, tile_b, at, real, it, keep, D, SIZE, BLOCK_D, DTYPE)
    if bias is not None:
        address = bias[0] + (at - base)[:, None] * bias[1] + (it - base)[None, :] * bias[2]
        inside = real[:, None] & keep[None, :]
        for _ in range(bias[4]):
            x += bias[5] * tl.load(address, mask=inside, other=0.0).to(tl.float32)
            address += bias[3]
    return x


@triton.jit
def _online_softmax(x, top, total, BIASED: tl.constexpr):
    """One more tile of a softmax: (exp2(x - new max), the factor for older sums, new max, new sum)."""
    new = tl.maximum(top, tl.max(x, 1))
    base = tl.where(new == float("-inf"), 0.0, new) if BIASED else new
    fade = tl.exp2(top - base)
    e = tl.exp2(x - base[:, None])
    return e, fade, new, total * fade + tl.sum(e, 1)


@triton.jit
def _inverse(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def _weigh(p, x):
    """p x, and 0 where p is 0, whatever x is."""
    return tl.where(p == 0.0, 0.0, p * x)


@triton.jit
def _known_lse(lse, b, h, at, real):
    """lse of rows `at` in base 2; `lse` is (tensor, its strides of batch, head and token)."""
    pointer, of_batch, of_head, of_token = lse
    address = pointer + b * of_batch + h * of_head + at * of_token
    return tl.load(address, mask=real, other=0.0) * KERNEL_LOG2E


@triton.jit
def _teachers_head(h, HEAD_MAP: tl.constexpr):
    if len(HEAD_MAP) == 0:
        return h
    mapped = h * 0
    for head in tl.static_range(len(HEAD_MAP)):
        mapped = tl.where(h == head, HEAD_MAP[head], mapped)
    return mapped


@triton.jit
def _forward_kernel(
    q_s, k_s, q_t, k_t, bias_s, bias_t, lse_s, lse_t, places, strides_rows, rows, partial, stats, H, N,
    factor_s, factor_t, LOSS: tl.constexpr, WIDTH: tl.constexpr, HEAD_MAP: tl.constexpr, CAUSAL: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, SIZE_S: tl.constexpr, SIZE_T: tl.constexpr,
    DTYPE_S: tl.constexpr, DTYPE_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Losses of BLOCK_M rows into `rows` or their sum into `partial`, and, unless None, their `stats`."""
    tiles = tl.cdiv(N, BLOCK_M)
    start_m = tl.program_id(0) % tiles * BLOCK_M
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // H, head % H
    g = _teachers_head(h, HEAD_MAP)
    q_s, k_s = head_of(q_s, b, h, D_S, SIZE_S), head_of(k_s, b, h, D_S, SIZE_S)
    q_t, k_t = head_of(q_t, b, g, D_T, SIZE_T), head_of(k_t, b, g, D_T, SIZE_T)
    of_s = _bias_of(bias_s, b, h, SIZE_S < D_S) if bias_s is not None else None
    of_t = _bias_of(bias_t, b, g, SIZE_T < D_T) if bias_t is not None else None
    BIASED: tl.constexpr = (bias_s is not None) or (bias_t is not None)

    tokens, base = tokens_of(places, b, N), first_of(places, b)
    slot = start_m + tl.arange(0, BLOCK_M)
    real = slot < tokens
    at = positions_of(places, b, start_m, N, BLOCK_M)
    keys = tl.where(start_m < tokens, tokens, 0)  # a tile of padding has nothing to stream
    if CAUSAL:
        keys = tl.minimum(keys, start_m + BLOCK_M)
    tile_qs = load_tile(q_s, at, real, 0, D_S, SIZE_S, BLOCK_S, DTYPE_S)
    tile_qt = load_tile(q_t, at, real, 0, D_T, SIZE_T, BLOCK_T, DTYPE_T)

    top_s = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    top_t = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_s = tl.zeros((BLOCK_M,), tl.float32)
    total_t = tl.zeros((BLOCK_M,), tl.float32)
    if lse_s is not None:
        top_s, total_s = _known_lse(lse_s, b, h, at, real), total_s + 1.0
    if lse_t is not None:
        top_t, total_t = _known_lse(lse_t, b, g, at, real), total_t + 1.0
    gap = tl.zeros((BLOCK_M,), tl.float32)  # kl: sum of exp2(x_t - top_t) (x_t - x_s); reverse: s and t exchanged
    for start in range(0, keys, BLOCK_N):
        it_slot = start + tl.arange(0, BLOCK_N)
        keep = it_slot < tokens
        it = positions_of(places, b, start, N, BLOCK_N)
        tile_ks = load_tile(k_s, it, keep, 0, D_S, SIZE_S, BLOCK_S, DTYPE_S)
        tile_kt = load_tile(k_t, it, keep, 0, D_T, SIZE_T, BLOCK_T, DTYPE_T)
        x_s = _scores(
            q_s, k_s, tile_qs, tile_ks, at, real, it, keep, factor_s, of_s, base, D_S, SIZE_S, BLOCK_S, DTYPE_S
        )
        x_t = _scores(
            q_t, k_t, tile_qt, tile_kt, at, real, it, keep, factor_t, of_t, base, D_T, SIZE_T, BLOCK_T, DTYPE_T
        )
        seen = keep[None, :] & (it_slot[None, :] <= slot[:, None]) if CAUSAL else keep[None, :]
        masked_s = tl.where(seen, x_s, float("-inf"))
        masked_t = tl.where(seen, x_t, float("-inf"))
        if lse_s is None:
            e_s, fade_s, top_s, total_s = _online_softmax(masked_s, top_s, total_s, BIASED)
        if lse_t is None:
            e_t, fade_t, top_t, total_t = _online_softmax(masked_t, top_t, total_t, BIASED)
        if LOSS == KL:
            if lse_t is None:
                gap *= fade_t
            else:
                e_t = tl.exp2(masked_t - top_t[:, None])
            gap += tl.sum(_weigh(e_t, x_t - x_s) if BIASED or CAUSAL else e_t * (x_t - x_s), 1)
        if LOSS == REVERSE_KL:
            if lse_s is None:
                gap *= fade_s
            else:
                e_s = tl.exp2(masked_s - top_s[:, None])
            gap += tl.sum(_weigh(e_s, x_s - x_t) if BIASED or CAUSAL else e_s * (x_s - x_t), 1)

    inverse_s, inverse_t = _inverse(total_s), _inverse(total_t)
    loss = tl.zeros((BLOCK_M,), tl.float32)
    delta = tl.zeros((BLOCK_M,), tl.float32)
    if LOSS == KL:
        loss = (gap * inverse_t - (top_t - top_s) - tl.log2(tl.div_rn(total_t, total_s))) * LN2
    elif LOSS == REVERSE_KL:
        delta = gap * inverse_s - (top_s - top_t)
        loss = (delta - tl.log2(tl.div_rn(total_s, total_t))) * LN2
    else:
        for start in range(0, keys, BLOCK_N):
            keep = start + tl.arange(0, BLOCK_N) < tokens
            it = positions_of(places, b, start, N, BLOCK_N)
            tile_ks = load_tile(k_s, it, keep, 0, D_S, SIZE_S, BLOCK_S, DTYPE_S)
            tile_kt = load_tile(k_t, it, keep, 0, D_T, SIZE_T, BLOCK_T, DTYPE_T)
            x_s = _scores(
                q_s, k_s, tile_qs, tile_ks, at, real, it, keep, factor_s, of_s, base, D_S, SIZE_S, BLOCK_S, DTYPE_S
            )
            x_t = _scores(
                q_t, k_t, tile_qt, tile_kt, at, real, it, keep, factor_t, of_t, base, D_T, SIZE_T, BLOCK_T, DTYPE_T
            )
            p_s = tl.where(keep[None, :], tl.exp2(x_s - top_s[:, None]) * inverse_s[:, None], 0.0)
            p_t = tl.where(keep[None, :], tl.exp2(x_t - top_t[:, None]) * inverse_t[:, None], 0.0)
            loss += tl.sum((p_s - p_t) * (p_s - p_t), 1)
            delta += tl.sum(p_s * (p_s - p_t), 1)

    loss = tl.where(real, loss, 0.0)
    row = b * strides_rows[0] + h * strides_rows[1] + at * strides_rows[2]
    if rows is None:
        tl.store(partial + tl.program_id(0), tl.sum(loss, 0))
    else:
        tl.store(rows + row, loss, mask=slot < written(places, tokens, N))
    if stats is not None:
        stats += row * WIDTH
        tl.store(stats, top_s, mask=real)
        tl.store(stats + 1, inverse_s, mask=real)
        tl.store(stats + 2, top_t, mask=real)
        tl.store(stats + 3, delta if LOSS == REVERSE_KL else inverse_t, mask=real)
        if LOSS == PROBS:
            tl.store(stats + 4, delta, mask=real)


@triton.jit
def _slope(x_s, x_t, stats, grad, row, query, keep, AXIS: tl.constexpr, LOSS: tl.constexpr, WIDTH: tl.constexpr):
    """The slope of a tile of scores whose queries lie along the axis that is not AXIS, from their stats.

    With reduction "none", `grad` = (this head's upstream gradients, their stride), one per query; else it is None.
    """
    stats += row * WIDTH
    top_s = tl.expand_dims(tl.load(stats, mask=keep, other=0.0), AXIS)
    inverse_s = tl.expand_dims(tl.load(stats + 1, mask=keep, other=0.0), AXIS)
    top_t = tl.expand_dims(tl.load(stats + 2, mask=keep, other=0.0), AXIS)
    fourth = tl.expand_dims(tl.load(stats + 3, mask=keep, other=0.0), AXIS)
    p_s = tl.exp2(x_s - top_s) * inverse_s
    if LOSS == REVERSE_KL:
        slope = _weigh(p_s, (((x_s - top_s) - (x_t - top_t)) - fourth) * LN2)
    else:
        slope = p_s - tl.exp2(x_t - top_t) * fourth
    if LOSS == PROBS:
        delta = tl.expand_dims(tl.load(stats + 4, mask=keep, other=0.0), AXIS)
        slope = p_s * (slope - delta)
    if grad is not None:
        slope *= tl.expand_dims(tl.load(grad[0] + query * grad[1], mask=keep, other=0.0), AXIS).to(tl.float32)
    return slope


@triton.jit
def _backward_kernel(
    own_s, other_s, own_t, other_t, bias_s, bias_t, places, strides_rows, stats, grad, out, B, H, N,
    factor_s, factor_t, weight, divisor: tl.int64,
    LOSS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PER_ROW: tl.constexpr, POWER: tl.constexpr,
    WIDTH: tl.constexpr, HEAD_MAP: tl.constexpr, CAUSAL: tl.constexpr, MEMBERS: tl.constexpr, SPREAD: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, SIZE_S: tl.constexpr, SIZE_T: tl.constexpr, D_OUT: tl.constexpr,
    DTYPE_S: tl.constexpr, DTYPE_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows and BLOCK_G columns of the gradient of `own_s`, which holds queries (ROWS), keys (COLS) or both.

    Keys that MEMBERS heads share add up what comes from each; where heads are joined, a column of the keys' gradient
    meets SPREAD columns of the queries.
    """
    tiles = tl.cdiv(N, BLOCK_M)
    start_m = tl.program_id(0) % tiles * BLOCK_M
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(1) * BLOCK_G
    b, h = head // H, head % H * MEMBERS
    BIASED: tl.constexpr = bias_s is not None or bias_t is not None

    tokens, base = tokens_of(places, b, N), first_of(places, b)
    slot = start_m + tl.arange(0, BLOCK_M)
    real = slot < tokens
    at = positions_of(places, b, start_m, N, BLOCK_M)
    begin, end = 0, tl.where(start_m < tokens, tokens, 0)  # a tile of padding has nothing to stream
    if CAUSAL:
        if ROWS:
            end = tl.minimum(end, start_m + BLOCK_M)
        else:
            begin = start_m
    mine_s = head_of(own_s, b, h, D_S, SIZE_S)
    tile_own_s = load_tile(mine_s, at, real, 0, D_S, SIZE_S, BLOCK_S, DTYPE_S)

    total = tl.zeros((BLOCK_M, BLOCK_G), tl.float32)
    for member in range(MEMBERS):
        m = h + member
        g = _teachers_head(m, HEAD_MAP)
        its_s, its_t = head_of(other_s, b, m, D_S, SIZE_S), head_of(other_t, b, g, D_T, SIZE_T)
        mine_t = head_of(own_t, b, g, D_T, SIZE_T)
        of_s = _bias_of(bias_s, b, m, SIZE_S < D_S) if bias_s is not None else None
        of_t = _bias_of(bias_t, b, g, SIZE_T < D_T) if bias_t is not None else None
        upstream = (grad[0] + b * grad[1] + m * grad[2], grad[3]) if PER_ROW else None
        row = b * strides_rows[0] + m * strides_rows[1]
        tile_own_t = load_tile(mine_t, at, real, 0, D_T, SIZE_T, BLOCK_T, DTYPE_T)
        for start in range(begin, end, BLOCK_N):
            it_slot = start + tl.arange(0, BLOCK_N)
            keep = it_slot < tokens
            it = positions_of(places, b, start, N, BLOCK_N)
            tile_s = load_tile(its_s, it, keep, 0, D_S, SIZE_S, BLOCK_S, DTYPE_S)
            tile_t = load_tile(its_t, it, keep, 0, D_T, SIZE_T, BLOCK_T, DTYPE_T)
            x_s = _scores(
                mine_s, its_s, tile_own_s, tile_s, at, real, it, keep, factor_s, of_s, base,
                D_S, SIZE_S, BLOCK_S, DTYPE_S,
            )  # fmt: skip
            x_t = _scores(
                mine_t, its_t, tile_own_t, tile_t, at, real, it, keep, factor_t, of_t, base,
                D_T, SIZE_T, BLOCK_T, DTYPE_T,
            )  # fmt: skip
            slope = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if ROWS:
                slope += _slope(x_s, x_t, stats, upstream, row + at * strides_rows[2], at, real, 1, LOSS, WIDTH)
            if COLS:
                slope += _slope(x_s, x_t, stats, upstream, row + it * strides_rows[2], it, keep, 0, LOSS, WIDTH)
            seen = keep[None, :]
            if CAUSAL:
                seen &= (it_slot[None, :] <= slot[:, None]) if ROWS else (slot[:, None] <= it_slot[None, :])
            if BIASED:
                seen &= real[:, None]
            slope = tl.where(seen, slope, 0.0).to(DTYPE_S)
            if BLOCK_S >= D_S and SPREAD == 1:
                total = tl.dot(slope, tile_s, total, input_precision="ieee")
            else:
                column = first + tl.arange(0, BLOCK_G)
                inside = keep[:, None] & (column < D_OUT)[None, :]
                for spread in range(SPREAD):
                    address = row_address(its_s, it, column, D_S, SIZE_S, SPREAD, spread)
                    tile = tl.load(address, mask=inside, other=0.0).to(DTYPE_S)
                    total = tl.dot(slope, tile, total, input_precision="ieee")

    weight /= mean_divisor(places[1], B, divisor, POWER).to(tl.float32)
    if not PER_ROW:
        weight *= tl.load(grad[0]).to(tl.float32)
    column = first + tl.arange(0, BLOCK_G)
    address = row_address(head_of(out, b, h, D_S, SIZE_S), at, column, D_S, SIZE_S, SPREAD, 0)
    value = tl.where(real[:, None], total * weight, 0.0).to(out[0].dtype.element_ty)
    tl.store(address, value, mask=(slot < written(places, tokens, N))[:, None] & (column < D_OUT)[None, :])


@dataclass(frozen=True)
class Maps:
    """Both maps of one call: q, k [B, H, N, d] or packed [tokens, H, d], x = scale q k^T + bias_factor bias.

    joined: scores are summed over heads. bias_s, bias_t: [B, H, N, N]; lse_s, lse_t: a value per row of its side.
    """

    q_s: torch.Tensor
    k_s: torch.Tensor
    q_t: torch.Tensor
    k_t: torch.Tensor
    sequences: Sequences
    loss: tl.constexpr
    scale_s: float
    scale_t: float
    joined: bool = False
    head_map: tuple[int, ...] = ()
    causal: bool = False
    bias_s: torch.Tensor | None = None
    bias_t: torch.Tensor | None = None
    bias_factor_s: float = 1.0
    bias_factor_t: float = 1.0
    lse_s: torch.Tensor | None = None
    lse_t: torch.Tensor | None = None

    @property
    def heads(self) -> int:
        """Maps of one sequence."""
        return 1 if self.joined else self.q_s.shape[1]

    @property
    def row_shape(self) -> tuple[int, ...]:
        shape = tuple(self.q_s.shape[:-1])
        return (shape[0], *shape[2:]) if self.joined else shape

    @property
    def strides_of_rows(self) -> tuple[int, int, int]:
        """Those of [batch, head, token] in a contiguous tensor of that shape."""
        heads, tokens = self.heads, self.sequences.tokens
        return (0, 1, heads) if self.sequences.packed else (heads * tokens, tokens, 1)

    @property
    def width(self) -> int:
        """Numbers that backward needs of each row."""
        return 5 if self.loss == PROBS else 4

    @property
    def crowded(self) -> bool:
        """Whether a program has more to hold than the tiles themselves."""
        grouped = self.q_s.shape[1] != self.k_s.shape[1]
        return grouped or self.bias_s is not None or self.bias_t is not None

    def views(self) -> list[tuple]:
        pairs = (self.q_s, self.k_s), (self.q_t, self.k_t)
        return [view(x, q.shape[1] // x.shape[1]) for q, k in pairs for x in (q, k)]

    def biases(self, transposed: bool) -> list[tuple | None]:
        """For the kernels; `transposed`: keys come first. A bias that all heads share is read once for all."""
        found = []
        for bias, factor in ((self.bias_s, self.bias_factor_s), (self.bias_t, self.bias_factor_t)):
            if bias is None:
                found.append(None)
                continue
            strides, heads = bias.stride(), bias.shape[1] if self.joined else 1
            if strides[1] == 0:
                heads, factor = 1, factor * heads
            if transposed:
                strides = (*strides[:2], strides[3], strides[2])
            found.append((bias, *strides, heads, factor * LOG2E))
        return found

    def row_strides(self, x: torch.Tensor) -> tuple[int, int, int]:
        return row_strides(x, self.sequences.packed, self.joined)

    def statics(self, backward: bool) -> dict:
        """The compile-time arguments that both kernels share, tile sizes and launch settings among them."""
        dtypes = dot_dtype(self.q_s, self.k_s), dot_dtype(self.q_t, self.k_t)
        sizes = self.q_s.shape[-1], self.q_t.shape[-1]
        dims = [size * (q.shape[1] if self.joined else 1) for size, q in zip(sizes, (self.q_s, self.q_t), strict=True)]
        return {
            **{"LOSS": self.loss, "WIDTH": self.width, "HEAD_MAP": self.head_map, "CAUSAL": self.causal},
            **{"D_S": dims[0], "D_T": dims[1], "SIZE_S": sizes[0], "SIZE_T": sizes[1]},
            **{"DTYPE_S": dtypes[0], "DTYPE_T": dtypes[1]},
            **tile_sizes(dtypes, dims, backward, self.crowded),
            **LAUNCH,
        }

    def divisor(self, power: int) -> int:
        return host_divisor(self.sequences.count, self.heads, self.sequences.batch, self.sequences.tokens, power)

    def power(self, reduction: int) -> int:
        """The mean runs over real rows (1), over real elements of the maps (2), or there is none (0)."""
        return 2 if self.loss == PROBS else int(reduction == REDUCTION["batchmean"])


def forward(maps: Maps, reduction, need_grad):
    """(loss, stats float32 [rows of "none", maps.width], empty if not need_grad)."""
    statics, sequences = maps.statics(backward=False), maps.sequences
    programs = sequences.batch * maps.heads * triton.cdiv(sequences.tokens, statics["BLOCK_M"])
    empty = maps.q_s.new_zeros if sequences.packed else maps.q_s.new_empty  # no program owns what lies behind the last
    rows = partial = stats = None
    if need_grad:
        stats = maps.q_s.new_empty((*maps.row_shape, maps.width), dtype=torch.float32)
    if reduction == REDUCTION["none"]:
        rows = empty(maps.row_shape, dtype=torch.float32)
    else:
        partial = maps.q_s.new_empty(programs, dtype=torch.float32)
    lse = [None if x is None else (x, *maps.row_strides(x)) for x in (maps.lse_s, maps.lse_t)]
    _forward_kernel[(programs,)](
        *maps.views(), *maps.biases(transposed=False), *lse, sequences.places, maps.strides_of_rows, rows, partial,
        stats, maps.heads, sequences.tokens, maps.scale_s * LOG2E, maps.scale_t * LOG2E, **statics,
    )  # fmt: skip
    if rows is None:
        power = maps.power(reduction)
        rows = finish(partial, sequences.count, maps.divisor(power), power)
    return rows, maps.q_s.new_empty(0, dtype=torch.float32) if stats is None else stats


def backward(maps: Maps, grad, stats, reduction, d_q, d_k):
    """Writes the gradients of q_s and k_s into d_q and d_k, any strides; if those are one tensor, so are q_s, k_s."""
    statics, sequences = maps.statics(backward=True), maps.sequences
    tiles, power = triton.cdiv(sequences.tokens, statics["BLOCK_M"]), maps.power(reduction)
    per_row = reduction == REDUCTION["none"]
    upstream = (grad, *maps.row_strides(grad)) if per_row else (grad,)
    weight, size = maps.scale_s * (2.0 if maps.loss == PROBS else 1.0), statics["SIZE_S"]
    q_s, k_s, q_t, k_t = maps.views()

    def launch(own_s, other_s, own_t, other_t, out, shared, rows, cols):
        """`shared`: heads of the loss that share one of `out`'s."""
        members, spread = (1, shared) if maps.joined else (shared, 1)
        columns = size * (out.shape[1] if maps.joined else 1)
        grid = sequences.batch * maps.heads // members * tiles, triton.cdiv(columns, statics["BLOCK_G"])
        _backward_kernel[grid](
            own_s, other_s, own_t, other_t, *maps.biases(transposed=not rows), sequences.places, maps.strides_of_rows,
            stats, upstream, view(out, shared), sequences.batch, maps.heads // members, sequences.tokens,
            maps.scale_s * LOG2E, maps.scale_t * LOG2E, weight, maps.divisor(power), D_OUT=columns,
            ROWS=rows, COLS=cols, PER_ROW=per_row, POWER=power, MEMBERS=members, SPREAD=spread, **statics,
        )  # fmt: skip

    launch(q_s, k_s, q_t, k_t, d_q, 1, rows=True, cols=d_q is d_k)
    if d_q is not d_k:
        launch(k_s, q_s, k_t, q_t, d_k, k_s[-1], rows=False, cols=True)
