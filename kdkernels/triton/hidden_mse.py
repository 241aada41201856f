"""hidden_mse on CUDA: sum over layers of the mean of (student - teacher)^2 over real tokens x D, like layers at once.

Bound by memory: each state is read once forward and once backward, padded tokens not at all. A program owns a few whole
rows of one layer, in registers, so that both normalisations need no second read:
    l2          y = x / |x|                      dx = (dy - y sum(dy y)) / |x|
    layer_norm  y = (x - mean) / std             dx = (dy - mean(dy) - y mean(dy y)) / std

With a projection the products are cuBLAS's; the kernel adds the bias, and turns W s into its loss and into d loss / d
(W s) in one read. The constant 2 / (real tokens x D) joins in backward, after the products, so that 16-bit ones do not
underflow.
"""

import torch
import triton
import triton.language as tl

from ..ops._common import NORMALIZE
from ._common import LAUNCH, finish, host_divisor, mean_divisor, product, register
from ._hidden import alike, load_rows, of_layer, own_rows, real_tokens, row_tiles, store_rows

L2, LAYER_NORM = tl.constexpr(NORMALIZE["l2"]), tl.constexpr(NORMALIZE["layer_norm"])
EPS = tl.constexpr(1e-12)


@triton.jit
def _normalize(x, inside, D: tl.constexpr, NORMALIZE: tl.constexpr):
    """Rows [R, D] -> (normalised rows, their |x| or standard deviation [R, 1], which divides the derivative)."""
    size = tl.full((x.shape[0], 1), 1.0, tl.float32)
    if NORMALIZE == L2:
        size = tl.maximum(tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True)), EPS)
        x = tl.div_rn(x, tl.broadcast_to(size, x.shape))
    if NORMALIZE == LAYER_NORM:
        x = tl.where(inside, x - tl.sum(x, 1, keep_dims=True) / D, 0.0)
        size = tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True) / D + EPS)
        x = tl.div_rn(x, tl.broadcast_to(size, x.shape))
    return x, size


@triton.jit
def _rows_kernel(
    students, teachers, bias, mask, count, partial, grad, outs, strides_s, strides_t, ROWS, N, divisor: tl.int64,
    D: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Row losses into `partial` and gradients into `outs`, either of them optional.

    The gradients are 2 grad / (real tokens x D) times the rows' own, or the rows' own alone where `grad` is None.
    """
    layer = tl.program_id(1).to(tl.int64)
    row = own_rows(BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    keep = row < ROWS
    if mask is not None:
        keep = tl.load(mask + row, mask=keep, other=0) != 0
    inside = keep[:, None] & (column < D)[None, :]
    x_s = load_rows(of_layer(students, layer), strides_s, row, inside, N, BLOCK_D)
    x_t = load_rows(of_layer(teachers, layer), strides_t, row, inside, N, BLOCK_D)
    if bias is not None:
        x_s = tl.where(inside, x_s + tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)[None, :], 0.0)
    y_s, size = _normalize(x_s, inside, D, NORMALIZE)
    y_t, _ = _normalize(x_t, inside, D, NORMALIZE)
    difference = y_s - y_t
    if partial is not None:
        tl.store(partial + layer * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(difference * difference, 1), 0))
    if outs is not None:
        slope = difference
        if NORMALIZE == L2:
            slope = (slope - y_s * tl.sum(slope * y_s, 1, keep_dims=True)) / size
        if NORMALIZE == LAYER_NORM:
            mean = tl.sum(slope, 1, keep_dims=True) / D
            slope = (slope - mean - y_s * (tl.sum(slope * y_s, 1, keep_dims=True) / D)) / size
        if grad is not None:
            slope *= 2.0 * tl.load(grad).to(tl.float32) / mean_divisor(count, 1, divisor, 1).to(tl.float32)
        store_rows(of_layer(outs, layer), row, tl.where(inside, slope, 0.0), ROWS, D, BLOCK_D)


def _launch(students, teachers, mask, count, normalize, *, bias=None, loss=False, grad=None, outs=None):
    """One launch over layers that are alike; `loss` asks for the float32 scalar."""
    batch, tokens, width = teachers[0].shape
    rows, sizes = batch * tokens, row_tiles(width)
    blocks = triton.cdiv(rows, sizes["BLOCK_R"])
    partial = teachers[0].new_empty(len(students) * blocks, dtype=torch.float32) if loss else None
    divisor = host_divisor(mask, width, batch, tokens, 1)
    _rows_kernel[(blocks, len(students))](
        tuple(students), tuple(teachers), bias, mask, count, partial, grad, outs, students[0].stride(),
        teachers[0].stride(), rows, tokens, divisor, D=width, NORMALIZE=normalize, **sizes, **LAUNCH,
    )  # fmt: skip
    return finish(partial, count, divisor, 1) if loss else None


def hidden_mse(student, teacher, mask, weight, bias, normalize, need_grad):
    count = real_tokens(mask)
    if weight:
        return _projected(student, teacher, mask, count, weight, bias, normalize, need_grad)
    losses = [
        _launch([student[i] for i in group], [teacher[i] for i in group], mask, count, normalize, loss=True)
        for group in alike(student, teacher)
    ]
    return sum(losses[1:], losses[0]), []


def _projected(student, teacher, mask, count, weight, bias, normalize, need_grad):
    """saved: what d_student..., d_weight..., d_bias... are without 2 grad / (real tokens x D), float32."""
    losses, d_student = [], []
    d_weight = [
        torch.zeros_like(w, dtype=torch.float32, memory_format=torch.contiguous_format) for w in weight if need_grad
    ]
    d_bias = [
        torch.zeros_like(b, dtype=torch.float32, memory_format=torch.contiguous_format) for b in bias if need_grad
    ]
    for layer, (s, t) in enumerate(zip(student, teacher, strict=True)):
        own = layer if len(weight) > 1 else 0
        w, b = weight[own], bias[own].contiguous() if bias else None
        if mask is not None:
            s = torch.where(mask[:, :, None], s, 0)  # NaN padding would spread through the product for d_weight
        flat = s.reshape(-1, s.shape[2])
        projected = product(flat, w.t()).view(t.shape)
        slope = torch.empty_like(projected, dtype=torch.promote_types(s.dtype, w.dtype)) if need_grad else None
        outs = (slope,) if need_grad else None
        losses.append(_launch([projected], [t], mask, count, normalize, bias=b, loss=True, outs=outs))
        if need_grad:
            slope = slope.view(-1, t.shape[2])
            d_student.append(product(slope, w).view(s.shape))
            d_weight[own] += product(slope.t(), flat)
            if bias:
                d_bias[own] += slope.sum(0, dtype=torch.float32)
    return sum(losses[1:], losses[0]), [*d_student, *d_weight, *d_bias]


def hidden_mse_backward(grad, student, teacher, mask, weight, bias, saved, normalize):
    count = real_tokens(mask)
    if weight:
        batch, tokens, width = teacher[0].shape
        scale = grad * 2 / (max(batch * tokens, 1) * width if mask is None else count.clamp_min(1) * width)
        return [(kept * scale).to(x.dtype) for kept, x in zip(saved, (*student, *weight, *bias), strict=True)]
    grads = [x.new_empty(x.shape) for x in student]
    for group in alike(student, teacher):
        pick = [[x[i] for i in group] for x in (student, teacher, grads)]
        _launch(*pick[:2], mask, count, normalize, grad=grad, outs=tuple(pick[2]))
    return grads


register("hidden_mse", hidden_mse)
register("hidden_mse_backward", hidden_mse_backward)
