"""hidden_cosine on CUDA: sum over layers of the mean of 1 - cos(student, teacher) over real tokens.

Bound by memory, as hidden_mse: a program owns a few whole rows of one layer in registers. With u = s / max(|s|, eps)
and v likewise, 1 - cos is half of |u - v|^2 + (1 - |u|^2) + (1 - |v|^2), which is exactly 0 for equal rows; the last
two terms are 0 unless a row is shorter than eps. Gradient: (u cos - v) / |s|, or -v / eps where s is that short.
"""

import torch
import triton
import triton.language as tl

from ._common import LAUNCH, finish, host_divisor, mean_divisor, register
from ._hidden import alike, load_rows, of_layer, own_rows, real_tokens, row_tiles, store_rows

EPS = tl.constexpr(1e-8)


@triton.jit
def _unit(x):
    """Rows [R, D] -> (rows / max(norm, eps); that divisor and what is missing to 1 in their squares, [R, 1])."""
    norm = tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True))
    size = tl.maximum(norm, EPS)
    part = norm / EPS
    return tl.div_rn(x, tl.broadcast_to(size, x.shape)), size, tl.where(norm < EPS, 1.0 - part * part, 0.0)


@triton.jit
def _rows_kernel(
    students, teachers, mask, count, partial, grad, outs, strides_s, strides_t, ROWS, N, divisor: tl.int64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sums of row losses into `partial`, or gradients into `outs`."""
    layer = tl.program_id(1).to(tl.int64)
    row = own_rows(BLOCK_R)
    keep = row < ROWS
    if mask is not None:
        keep = tl.load(mask + row, mask=keep, other=0) != 0
    inside = keep[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    u, size, short = _unit(load_rows(of_layer(students, layer), strides_s, row, inside, N, BLOCK_D))
    v, _, short_v = _unit(load_rows(of_layer(teachers, layer), strides_t, row, inside, N, BLOCK_D))
    difference = u - v
    loss = 0.5 * (tl.sum(difference * difference, 1, keep_dims=True) + short + short_v)
    if partial is not None:
        total = tl.sum(tl.sum(tl.where(keep[:, None], loss, 0.0), 1), 0)
        tl.store(partial + layer * tl.num_programs(0) + tl.program_id(0), total)
    if outs is not None:
        weight = tl.load(grad).to(tl.float32) / mean_divisor(count, 1, divisor, 1).to(tl.float32)
        slope = (u * tl.where(short > 0, 0.0, 1.0 - loss) - v) / size * weight
        store_rows(of_layer(outs, layer), row, tl.where(inside, slope, 0.0), ROWS, D, BLOCK_D)


def _launch(students, teachers, mask, count, partial=None, grad=None, outs=None):
    batch, tokens, width = students[0].shape
    rows, sizes = batch * tokens, row_tiles(width)
    _rows_kernel[(triton.cdiv(rows, sizes["BLOCK_R"]), len(students))](
        tuple(students), tuple(teachers), mask, count, partial, grad, outs, students[0].stride(), teachers[0].stride(),
        rows, tokens, host_divisor(mask, 1, batch, tokens, 1), D=width, **sizes, **LAUNCH,
    )  # fmt: skip


def hidden_cosine(student, teacher, mask, need_grad):
    count, losses = real_tokens(mask), []
    for group in alike(student, teacher):
        batch, tokens, width = student[group[0]].shape
        blocks = triton.cdiv(batch * tokens, row_tiles(width)["BLOCK_R"])
        partial = student[0].new_empty(len(group) * blocks, dtype=torch.float32)
        _launch([student[i] for i in group], [teacher[i] for i in group], mask, count, partial=partial)
        losses.append(finish(partial, count, host_divisor(mask, 1, batch, tokens, 1), 1))
    return sum(losses[1:], losses[0]), []


def hidden_cosine_backward(grad, student, teacher, mask):
    count, grads = real_tokens(mask), [x.new_empty(x.shape) for x in student]
    for group in alike(student, teacher):
        s, t, outs = ([x[i] for i in group] for x in (student, teacher, grads))
        _launch(s, t, mask, count, grad=grad, outs=tuple(outs))
    return grads


register("hidden_cosine", hidden_cosine)
register("hidden_cosine_backward", hidden_cosine_backward)
