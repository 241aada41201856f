"""topk_kd_loss on CUDA: one pass over a row of logits for its rest, kd_loss over K + 1 outcomes, one pass for the
gradient.

The rest of a row are the classes that the teacher did not name; their logit is T log sum exp(x / T), and all outcomes
are stored relative to it. A program owns a row and walks over blocks of it. A block leaves its named classes out before
it adds up exponentials, so that the rest is no difference of rounded sums. kd_loss (CUDA C++) does what the K + 1
outcomes have in common with the dense loss: kinds, temperatures, reductions. Backward spreads the rest's gradient over
its classes in proportion to their exponentials, then writes the named ones to their places.
"""

import torch
import triton
import triton.language as tl

from ..ops._common import REDUCTION, TAIL
from ._common import LAUNCH, register

BUCKET = TAIL["bucket"]
TILES = {"BLOCK_V": 4096, "num_warps": 8}


@triton.jit
def _row(x, strides, row, INNER):
    """The address of row `row` of [outer, inner, ...]."""
    return x + (row // INNER) * strides[0] + (row % INNER) * strides[1]


@triton.jit
def _rest_kernel(
    student, values, indices, mask, labels, row_temperature, named, rest, hard, strides_s, strides_v, strides_i, INNER,
    V, temperature, ignore_index, K: tl.constexpr, BUCKET: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Both sides' K + 1 outcomes into `named` [2, rows, K + 1], and of each row the rest's maximum and 1 / sum and the
    same of all classes at T = 1 into `rest` [rows, 4], its cross-entropy into `hard`."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    inside = k < K
    out_s, out_t = named + row * (K + 1), named + (tl.num_programs(0) + row) * (K + 1)
    real = True
    if mask is not None:
        real = tl.load(mask + row) != 0
    if real:
        t = temperature
        if row_temperature is not None:
            t = tl.load(row_temperature + row)
        index = tl.load(_row(indices, strides_i, row, INNER) + k * strides_i[2], mask=inside, other=-1).to(tl.int64)
        valid = (index >= 0) & (index < V)
        logits = _row(student, strides_s, row, INNER)

        top, z, z_hard = -float("inf"), 0.0, 0.0
        for start in range(0, V, BLOCK_V):
            at = start + tl.arange(0, BLOCK_V)
            keep = at < V
            here = valid & (index >= start) & (index < start + BLOCK_V)
            for _ in range(tl.sum(here.to(tl.int32), 0)):
                one = tl.max(tl.where(here, index, -1), 0)
                keep = keep & (at != one)
                here = here & (index != one)
            x = tl.load(logits + at.to(tl.int64) * strides_s[2], mask=keep, other=-float("inf")).to(tl.float32)
            seen = tl.maximum(top, tl.max(x, 0))
            base = tl.where(seen == -float("inf"), 0.0, seen)
            z = z * tl.exp((top - base) / t) + tl.sum(tl.exp((x - base) / t), 0)
            if labels is not None:
                z_hard = z_hard * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)
            top = seen

        # float64 where a rounded logit of the rest would be the largest error of the loss
        empty = z == 0
        above = tl.where(empty, 0.0, t * tl.log(z.to(tl.float64)))
        base = tl.where(empty, 0.0, top + above)
        s = tl.load(logits + index * strides_s[2], mask=valid, other=float("nan")).to(tl.float32)
        tl.store(out_s + k, (s.to(tl.float64) - base).to(tl.float32), mask=inside)
        tl.store(out_s + K, tl.where(empty, -float("inf"), base - base).to(tl.float32))  # NaN stays
        tl.store(rest + row * 4, tl.where(top == -float("inf"), 0.0, top))
        tl.store(rest + row * 4 + 1, tl.where(empty, 0.0, 1 / z))

        v = tl.load(_row(values, strides_v, row, INNER) + k * strides_v[2], mask=inside, other=-float("inf"))
        v = v.to(tl.float32)
        of_rest = tl.full((), -float("inf"), tl.float64)
        if BUCKET:
            left = 1 - tl.sum(tl.exp(v.to(tl.float64)), 0)
            of_rest = tl.where((left > 0) & (V > K), t * tl.log(tl.where(left > 0, left, 1.0)), of_rest)
            v *= t
        tl.store(out_t + k, v, mask=inside)
        tl.store(out_t + K, of_rest.to(tl.float32))

        if labels is not None:
            # From the logits themselves: T log Z away from their maximum they have lost digits that T = 1 asks for.
            all_top = tl.maximum(tl.max(tl.where(inside, s, -float("inf")), 0), top)
            z = z_hard * tl.exp(top - all_top) + tl.sum(tl.where(inside, tl.exp(s - all_top), 0.0), 0)
            tl.store(rest + row * 4 + 2, all_top)
            tl.store(rest + row * 4 + 3, 1 / z)
            label = tl.load(labels + row)
            has_label, right = label != ignore_index, (label >= 0) & (label < V)
            x = tl.load(logits + label * strides_s[2], mask=has_label & right, other=float("nan")).to(tl.float32)
            tl.store(hard + row, tl.where(has_label, tl.log(z) - (x - all_top), 0.0))
    else:
        tl.store(out_s + k, tl.zeros((BLOCK_K,), tl.float32), mask=inside)
        tl.store(out_t + k, tl.zeros((BLOCK_K,), tl.float32), mask=inside)
        tl.store(out_s + K, 0.0)
        tl.store(out_t + K, 0.0)
        tl.store(rest + row * 4 + tl.arange(0, 4), tl.zeros((4,), tl.float32))
        if labels is not None:
            tl.store(hard + row, 0.0)


@triton.jit
def _gradient_kernel(
    student, indices, mask, labels, row_temperature, named, rest, grad_named, grad_hard, out, strides_s, strides_i,
    INNER, V, temperature, ignore_index, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradient [rows, V] from that of the outcomes [rows, K + 1] and, per row, of the cross-entropy."""
    row = tl.program_id(0).to(tl.int64)
    real = True
    if mask is not None:
        real = tl.load(mask + row) != 0
    if real:
        t = temperature
        if row_temperature is not None:
            t = tl.load(row_temperature + row)
        k = tl.arange(0, BLOCK_K).to(tl.int64)
        inside = k < K
        index = tl.load(_row(indices, strides_i, row, INNER) + k * strides_i[2], mask=inside, other=-1).to(tl.int64)
        s = tl.load(named + row * (K + 1) + k, mask=inside, other=-float("inf"))
        g = tl.load(grad_named + row * (K + 1) + k, mask=inside, other=0.0)
        top, inverse = tl.load(rest + row * 4), tl.load(rest + row * 4 + 1)
        # Gradients of all outcomes add up to 0: where the rest, whose logit is 0, is most of the mass, that keeps the
        # digits that p_s - p_t would lose.
        most = (inverse > 0) & (tl.sum(tl.exp(s / t), 0) <= 1)
        soft = tl.where(most, -tl.sum(g, 0), tl.load(grad_named + row * (K + 1) + K)) * inverse
        if labels is not None:
            label = tl.load(labels + row)
            has_label = label != ignore_index
            scale_hard = tl.where(has_label, tl.load(grad_hard + row), 0.0)
            top_hard, inverse_hard = tl.load(rest + row * 4 + 2), tl.load(rest + row * 4 + 3)
            address = _row(student, strides_s, row, INNER) + index * strides_s[2]
            own = tl.load(address, mask=(index >= 0) & (index < V), other=-float("inf")).to(tl.float32)
            g += tl.where(has_label, scale_hard * (tl.exp(own - top_hard) * inverse_hard), 0.0)
            g -= tl.where(index == label, scale_hard, 0.0)
            at_top = tl.where(inverse > 0, top, -float("inf"))
            hard = tl.where(has_label, scale_hard * (tl.exp(at_top - top_hard) * inverse_hard), 0.0)
        for start in range(0, V, BLOCK_V):
            at = (start + tl.arange(0, BLOCK_V)).to(tl.int64)
            x = tl.load(_row(student, strides_s, row, INNER) + at * strides_s[2], mask=at < V, other=0.0)
            below = tl.minimum(
                x.to(tl.float32) - top, 0.0, propagate_nan=tl.PropagateNan.ALL
            )  # named ones may lie above
            y = tl.exp(below / t) * soft
            if labels is not None:
                y += tl.exp(below) * hard
                y -= tl.where(at == label, scale_hard, 0.0)
            tl.store(out + row * V + at, y.to(out.dtype.element_ty), mask=at < V)
        tl.debug_barrier()
        tl.store(out + row * V + index, g.to(out.dtype.element_ty), mask=(index >= 0) & (index < V))
    else:
        for start in range(0, V, BLOCK_V):
            at = (start + tl.arange(0, BLOCK_V)).to(tl.int64)
            tl.store(out + row * V + at, tl.zeros((BLOCK_V,), out.dtype.element_ty), mask=at < V)


def _of_outcomes(mask, row_temperature, kind, temperature, scale_t2, beta, ignore_index, reduction):
    """What kd_loss takes beside the outcomes: no labels, and "mean" as "batchmean", since its classes are V."""
    reduction = REDUCTION["batchmean"] if reduction == REDUCTION["mean"] else reduction
    return (mask, None, row_temperature), (kind, temperature, scale_t2, beta, 1.0, ignore_index, reduction)


def _hard_divisor(mask, labels, ignore_index, reduction):
    """What the rows' cross-entropies are divided by: the labelled rows of a mean."""
    if reduction in (REDUCTION["none"], REDUCTION["sum"]):
        return 1
    counted = labels != ignore_index
    return (counted if mask is None else counted & mask).sum().clamp_min(1)


def topk_kd_loss(
    student, values, indices, mask, labels, row_temperature, tail, kind, temperature, scale_t2, beta, alpha,
    ignore_index, reduction,
):  # fmt: skip
    outer, inner, classes = student.shape
    rows, count = outer * inner, values.shape[2]
    named = student.new_empty((2, rows, count + 1), dtype=torch.float32)
    rest = student.new_zeros((rows, 4), dtype=torch.float32)
    hard = None if labels is None else student.new_empty((outer, inner), dtype=torch.float32)
    if rows:
        _rest_kernel[(rows,)](
            student, values, indices, mask, labels, row_temperature, named, rest, hard, student.stride(),
            values.stride(), indices.stride(), inner, classes, temperature, ignore_index, K=count,
            BUCKET=tail == BUCKET, BLOCK_K=triton.next_power_of_2(count), **TILES, **LAUNCH,
        )  # fmt: skip
    tensors, scalars = _of_outcomes(mask, row_temperature, kind, temperature, scale_t2, beta, ignore_index, reduction)
    outcomes = named.view(2, outer, inner, count + 1)
    loss, stats = torch.ops.kdkernels.kd_loss.default(outcomes[0], outcomes[1], *tensors, *scalars)
    if reduction == REDUCTION["mean"]:
        loss = loss / classes
    if labels is not None:
        hard = hard if reduction == REDUCTION["none"] else hard.sum()
        loss = alpha * loss + (1 - alpha) * (hard / _hard_divisor(mask, labels, ignore_index, reduction))
    return loss, named, stats, rest


def topk_kd_loss_backward(
    grad, student, values, indices, mask, labels, row_temperature, named, stats, rest, tail, kind, temperature,
    scale_t2, beta, alpha, ignore_index, reduction,
):  # fmt: skip
    outer, inner, classes = student.shape
    rows, count = outer * inner, values.shape[2]
    tensors, scalars = _of_outcomes(mask, row_temperature, kind, temperature, scale_t2, beta, ignore_index, reduction)
    outcomes = named.view(2, outer, inner, count + 1)
    weight = (1 if labels is None else alpha) / (classes if reduction == REDUCTION["mean"] else 1)
    grad_named = torch.ops.kdkernels.kd_loss_backward.default(
        grad * weight, outcomes[0], outcomes[1], *tensors, stats, *scalars
    )
    grad_hard = None
    if labels is not None:
        grad_hard = grad * (1 - alpha) / _hard_divisor(mask, labels, ignore_index, reduction)
        grad_hard = grad_hard.expand(outer, inner).contiguous()
    out = student.new_empty(student.shape)
    if rows:
        _gradient_kernel[(rows,)](
            student, indices, mask, labels, row_temperature, named, rest, grad_named, grad_hard, out, student.stride(),
            indices.stride(), inner, classes, temperature, ignore_index, K=count,
            BLOCK_K=triton.next_power_of_2(count), **TILES, **LAUNCH,
        )  # fmt: skip
    return out


register("topk_kd_loss", topk_kd_loss)
register("topk_kd_loss_backward", topk_kd_loss_backward)
