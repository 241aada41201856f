"""moment_mse on CUDA: sum over layers of the mean over real tokens of
    mean_weight (m_s - m_t)^2 + variance_weight |v_s - v_t|,   m and v a row's mean and variance.

Bound by memory: a program owns a few whole rows of one layer in registers. The differences are made element by element
before they are rounded or summed: v_s - v_t = mean(d (2 x - d)) for the centred x = s - m_s and d = s - t, so that a
student near its teacher keeps its digits, and equal rows give exactly 0. What rounding leaves of the means of x and d
is put right. Forward leaves m, about a row's mean, and the a and b of its gradient a + b (s - m), from which backward
needs no teacher.
"""

import torch
import triton
import triton.language as tl

from ..ops._common import VARIANCE
from ._common import LAUNCH, finish, host_divisor, mean_divisor, register
from ._hidden import alike, load_rows, of_layer, own_rows, real_tokens, row_tiles, store_rows

SQUARED = tl.constexpr(VARIANCE["squared"])


@triton.jit
def _forward_kernel(
    students, teachers, mask, partial, stats, strides_s, strides_t, ROWS, N, mean_weight, variance_weight,
    VARIANCE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sums of row losses into `partial`; m, a and b of each row into `stats`, a [ROWS, 3] for each layer, or None."""
    layer = tl.program_id(1).to(tl.int64)
    row = own_rows(BLOCK_R)
    keep = row < ROWS
    if mask is not None:
        keep = tl.load(mask + row, mask=keep, other=0) != 0
    inside = keep[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    s = load_rows(of_layer(students, layer), strides_s, row, inside, N, BLOCK_D)
    t = load_rows(of_layer(teachers, layer), strides_t, row, inside, N, BLOCK_D)
    mean, apart = tl.sum(s, 1) / D, tl.sum(s - t, 1) / D
    x = tl.where(inside, s - mean[:, None], 0.0)
    d = tl.where(inside, (s - t) - apart[:, None], 0.0)
    rest, rest_apart = tl.sum(x, 1) / D, tl.sum(d, 1) / D
    variance = tl.sum(d * (2 * x - d), 1) / D - rest_apart * (2 * rest - rest_apart)
    apart += rest_apart
    sign = tl.where(variance > 0, 1.0, tl.where(variance < 0, -1.0, 0.0))
    if VARIANCE == SQUARED:
        spread, slope = variance * variance, 2 * variance
    else:
        spread, slope = sign * variance, sign
    loss = mean_weight * (apart * apart) + variance_weight * spread
    tl.store(partial + layer * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(keep, loss, 0.0), 0))
    if stats is not None:
        at = of_layer(stats, layer) + row * 3
        tl.store(at, tl.where(keep, mean, 0.0), mask=row < ROWS)
        b = 2 * variance_weight * slope / D
        tl.store(at + 1, tl.where(keep, 2 * mean_weight * apart / D - b * rest, 0.0), mask=row < ROWS)
        tl.store(at + 2, tl.where(keep, b, 0.0), mask=row < ROWS)


@triton.jit
def _backward_kernel(
    students, mask, count, stats, grad, outs, strides, ROWS, N, divisor: tl.int64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    row = own_rows(BLOCK_R)
    keep = row < ROWS
    if mask is not None:
        keep = tl.load(mask + row, mask=keep, other=0) != 0
    inside = keep[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    s = load_rows(of_layer(students, layer), strides, row, inside, N, BLOCK_D)
    at = of_layer(stats, layer) + row * 3
    mean = tl.load(at, mask=keep, other=0.0)[:, None]
    a = tl.load(at + 1, mask=keep, other=0.0)[:, None]
    b = tl.load(at + 2, mask=keep, other=0.0)[:, None]
    weight = tl.load(grad).to(tl.float32) / mean_divisor(count, 1, divisor, 1).to(tl.float32)
    value = tl.where(inside, (a + b * (s - mean)) * weight, 0.0)
    store_rows(of_layer(outs, layer), row, value, ROWS, D, BLOCK_D)


def moment_mse(student, teacher, mask, mean_weight, variance_weight, variance, need_grad):
    count, losses = real_tokens(mask), []
    batch, tokens, _ = student[0].shape
    rows = batch * tokens
    stats = student[0].new_empty((len(student) * rows if need_grad else 0, 3), dtype=torch.float32)
    for group in alike(student, teacher):
        s, t = ([x[i] for i in group] for x in (student, teacher))
        sizes = row_tiles(s[0].shape[2])
        blocks = triton.cdiv(rows, sizes["BLOCK_R"])
        partial = stats.new_empty(len(group) * blocks)
        left = tuple(stats[i * rows :] for i in group) if need_grad else None
        _forward_kernel[(blocks, len(group))](
            tuple(s), tuple(t), mask, partial, left, s[0].stride(), t[0].stride(), rows, tokens, mean_weight,
            variance_weight, VARIANCE=variance, D=s[0].shape[2], **sizes, **LAUNCH,
        )  # fmt: skip
        losses.append(finish(partial, count, host_divisor(mask, 1, batch, tokens, 1), 1))
    return sum(losses[1:], losses[0]), stats


def moment_mse_backward(grad, student, mask, stats):
    count, grads = real_tokens(mask), [x.new_empty(x.shape) for x in student]
    batch, tokens, _ = student[0].shape
    rows, divisor = batch * tokens, host_divisor(mask, 1, batch, tokens, 1)
    for group in alike(student, student):
        s, outs = [student[i] for i in group], tuple(grads[i] for i in group)
        sizes = row_tiles(s[0].shape[2])
        _backward_kernel[(triton.cdiv(rows, sizes["BLOCK_R"]), len(group))](
            tuple(s), mask, count, tuple(stats[i * rows :] for i in group), grad, outs, s[0].stride(), rows, tokens,
            divisor, D=s[0].shape[2], **sizes, **LAUNCH,
        )  # fmt: skip
    return grads


register("moment_mse", moment_mse)
register("moment_mse_backward", moment_mse_backward)
