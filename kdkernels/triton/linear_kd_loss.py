"""linear_kd_loss on CUDA: chunks of rows through cuBLAS, and a kernel that turns a chunk's logits into their gradient.

The products are cuBLAS's, of 16-bit inputs with float32 logits. A program owns a row of the chunk and walks over it:
maxima and sums, then the loss, then the gradient, which goes to the next two products in the student's type. A chunk's
buffers are small enough for most of those walks to stay in the L2 cache. The weight's gradient is added up in float32
over chunks, by panels of classes so that no second copy of it is needed.

Padded rows are zeros to the products: to leave them out would need their number on the host.
"""

import torch
import triton
import triton.language as tl

from ..ops._common import KIND, REDUCTION
from ._common import LAUNCH, product, register

KL, CE, REVERSE_KL = (tl.constexpr(KIND[name]) for name in ("kl", "ce", "reverse_kl"))
JSD, TV = (tl.constexpr(KIND[name]) for name in ("jsd", "tv"))
CHUNK_BYTES = 28 << 20  # of both sides' logits and the gradient
LEAST_ROWS = 128  # of a chunk, whatever the vocabulary: products of fewer wait for the weights
PANEL = 8192  # classes of the weight's gradient at a time
TILES = {"BLOCK": 4096, "num_warps": 8}


@triton.jit
def _logits(x, bias, row, at, V):
    """Logits `at` of a row [V] as float32, the bias added; -inf behind its end."""
    inside = at < V
    value = tl.load(x + row * V + at, mask=inside, other=-float("inf")).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _add(top, z, x, t):
    """The running maximum and sum of exponentials of x / t, joined by a block."""
    seen = tl.maximum(top, tl.max(x, 0))
    base = tl.where(seen == -float("inf"), 0.0, seen)
    return seen, z * tl.exp((top - base) / t) + tl.sum(tl.exp((x - base) / t), 0)


@triton.jit
def _weigh(p, value):
    """p * value, and 0 where p is 0: a class without probability contributes nothing even at infinity."""
    return tl.where(p == 0, 0.0, p * value)


@triton.jit
def _over_mixture(d, beta):
    """log(m / p_s) from d = log p_t - log p_s, m = beta p_t + (1 - beta) p_s, relative to the larger of the two."""
    share = tl.where(d > 0, 1 - beta, beta)
    over = tl.log(1 + share * (tl.exp(-tl.abs(d)) - 1))
    return tl.where(d > 0, over + d, over)


@triton.jit
def _rows_kernel(
    student, teacher, bias_s, bias_t, mask, labels, row_temperature, upstream, weights, soft, hard, out, first, V,
    temperature, beta, ignore_index, KIND: tl.constexpr, SCALE_T2: tl.constexpr, FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Row losses into `soft` and `hard`, and the gradient of the logits into `out` if there is one, which may be
    `student`. weights: [2], of the two terms; upstream: of each row, or None."""
    row = tl.program_id(0).to(tl.int64)
    r = first + row
    real = True
    if mask is not None:
        real = tl.load(mask + r) != 0
    if real:
        t = temperature
        if row_temperature is not None:
            t = tl.load(row_temperature + r)
        top_s, z_s, top_t, z_t = -float("inf"), 0.0, -float("inf"), 0.0
        top, z = -float("inf"), 0.0
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x_s, x_t = _logits(student, bias_s, row, at, V), _logits(teacher, bias_t, row, at, V)
            top_s, z_s = _add(top_s, z_s, x_s, t)
            top_t, z_t = _add(top_t, z_t, x_t, t)
            if labels is not None:
                top, z = _add(top, z, x_s, 1.0)
        base_s, base_t = tl.where(top_s == -float("inf"), 0.0, top_s), tl.where(top_t == -float("inf"), 0.0, top_t)
        gap = tl.log(z_s) - tl.log(z_t)

        loss, mean = 0.0, 0.0
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            d_s = (_logits(student, bias_s, row, at, V) - base_s) / t
            d_t = (_logits(teacher, bias_t, row, at, V) - base_t) / t
            p_s, p_t = tl.exp(d_s) / z_s, tl.exp(d_t) / z_t
            d = (d_t - d_s) + gap
            if KIND == KL:
                loss += tl.sum(_weigh(p_t, d), 0)
            if KIND == CE:
                loss += tl.sum(_weigh(p_t, tl.log(z_s) - d_s), 0)
            if KIND == REVERSE_KL:
                loss += tl.sum(_weigh(p_s, -d), 0)
            if KIND == JSD:
                over = _over_mixture(d, beta)
                mean -= tl.sum(_weigh(p_s, over), 0)
                loss -= tl.sum((1 - beta) * _weigh(p_s, over) + beta * _weigh(p_t, over - d), 0)
            if KIND == TV:
                loss += 0.5 * tl.sum(tl.abs(p_s - p_t), 0)
                mean += 0.5 * tl.sum(tl.where(p_s > p_t, p_s, 0.0) - tl.where(p_s < p_t, p_s, 0.0), 0)
        if KIND == REVERSE_KL:
            mean = loss
        if FLAT:
            loss = loss * 0.0
        tl.store(soft + r, loss * t * t if SCALE_T2 else loss)

        has_label, label = row < 0, row
        if labels is not None:
            label = tl.load(labels + r)
            has_label, right = label != ignore_index, (label >= 0) & (label < V)
            x = tl.load(student + row * V + label, mask=has_label & right, other=float("nan")).to(tl.float32)
            if bias_s is not None:
                x += tl.load(bias_s + label, mask=has_label & right, other=0.0).to(tl.float32)
            tl.store(hard + r, tl.where(has_label, tl.log(z) - (x - base_s), 0.0))

        if out is not None:
            above = 1.0
            if upstream is not None:
                above = tl.load(upstream + r)
            scale = above * tl.load(weights) * (t if SCALE_T2 else 1 / t)
            if FLAT:
                scale = scale * 0.0
            # An infinite KL(student || teacher) has no useful direction.
            scale = tl.where(mean == float("inf"), 0.0, scale)
            mean = tl.where(mean == float("inf"), 0.0, mean)
            of_label = tl.where(has_label, above * tl.load(weights + 1), 0.0)
            tl.debug_barrier()  # the label's logit is read before its place is written to
            for start in range(0, V, BLOCK):
                at = start + tl.arange(0, BLOCK)
                x_s = _logits(student, bias_s, row, at, V)
                d_s, d_t = (x_s - base_s) / t, (_logits(teacher, bias_t, row, at, V) - base_t) / t
                p_s, p_t = tl.exp(d_s) / z_s, tl.exp(d_t) / z_t
                if KIND == KL or KIND == CE:
                    y = p_s - p_t
                elif KIND == REVERSE_KL:
                    d = (d_t - d_s) + gap
                    y = _weigh(p_s, tl.where(d == -float("inf"), 0.0, -d) - mean)
                elif KIND == JSD:
                    y = (1 - beta) * _weigh(p_s, -_over_mixture((d_t - d_s) + gap, beta) - mean)
                else:
                    y = p_s * (tl.where(p_s > p_t, 0.5, 0.0) - tl.where(p_s < p_t, 0.5, 0.0) - mean)
                y *= scale
                if labels is not None:
                    y += tl.where(has_label, of_label * (tl.exp(x_s - base_s) / z), 0.0)
                    y -= tl.where(at == label, of_label, 0.0)
                tl.store(out + row * V + at, y.to(out.dtype.element_ty), mask=at < V)
    else:
        tl.store(soft + r, 0.0)
        if labels is not None:
            tl.store(hard + r, 0.0)
        if out is not None:
            for start in range(0, V, BLOCK):
                at = start + tl.arange(0, BLOCK)
                tl.store(out + row * V + at, tl.zeros((BLOCK,), out.dtype.element_ty), mask=at < V)


def _run(tensors, kind, temperature, scale_t2, beta, ignore_index, weights, upstream, gradient):
    """(soft, hard, gradients): row losses [rows], and float32 gradients of hidden states, weight and bias or None."""
    student, w_s, b_s, teacher, w_t, b_t, mask, labels, row_temperature = tensors
    if mask is not None:  # NaN in padding would spread through the product for the weight's gradient
        student, teacher = (torch.where(mask.unsqueeze(-1), x, 0) for x in (student, teacher))
    h_s, h_t = student.flatten(0, 1), teacher.flatten(0, 1)
    b_s, b_t = (x if x is None else x.contiguous() for x in (b_s, b_t))
    rows, classes = h_s.shape[0], w_s.shape[0]
    soft = h_s.new_empty(rows, dtype=torch.float32)
    hard = None if labels is None else torch.empty_like(soft)
    dtype = torch.promote_types(h_s.dtype, w_s.dtype)
    d_student = d_weight = d_bias = None
    if gradient:
        d_student = h_s.new_zeros(h_s.shape, dtype=torch.float32)
        d_weight = w_s.new_zeros(w_s.shape, dtype=torch.float32)
        d_bias = None if b_s is None else b_s.new_zeros(classes, dtype=torch.float32)
    chunk = max(LEAST_ROWS, CHUNK_BYTES // (10 * classes))
    flat = kind == KIND["jsd"] and beta in (0.0, 1.0)
    for first in range(0, rows, chunk):
        part = slice(first, min(first + chunk, rows))
        logits_s, logits_t = product(h_s[part], w_s.t()), product(h_t[part], w_t.t())
        slope = None
        if gradient:
            slope = logits_s if dtype == torch.float32 else logits_s.new_empty(logits_s.shape, dtype=dtype)
        _rows_kernel[(part.stop - first,)](
            logits_s, logits_t, b_s, b_t, mask, labels, row_temperature, upstream, weights, soft, hard, slope, first,
            classes, temperature, beta, ignore_index, KIND=kind, SCALE_T2=scale_t2, FLAT=flat, **TILES, **LAUNCH,
        )  # fmt: skip
        if gradient:
            d_student[part] = product(slope, w_s)
            for panel in range(0, classes, PANEL):
                d_weight[panel : panel + PANEL] += product(slope[:, panel : panel + PANEL].t(), h_s[part])
            if d_bias is not None:
                d_bias += slope.sum(0, dtype=torch.float32)
    return soft, hard, (d_student, d_weight, d_bias)


def _weights(student, classes, mask, labels, alpha, ignore_index, reduction):
    """(factors [2] of the two terms relative to `unit`, unit), float32 on the device. `unit` joins after the products:
    before them, 1 / rows would underflow in float16."""
    soft = student.new_full((), 1.0 if labels is None else alpha, dtype=torch.float32)
    hard = torch.full_like(soft, 0.0 if labels is None else 1 - alpha)
    if reduction in (REDUCTION["mean"], REDUCTION["batchmean"]):
        real = soft.new_full((), student.shape[0] * student.shape[1]) if mask is None else mask.sum()
        soft = soft / (real.clamp_min(1) * (classes if reduction == REDUCTION["mean"] else 1))
        if labels is not None:
            labelled = labels != ignore_index
            hard = hard / (labelled if mask is None else labelled & mask).sum().clamp_min(1)
    factors = torch.stack([soft, hard])
    unit = factors.abs().max()
    unit = torch.where(unit > 0, unit, 1.0)
    return factors / unit, unit


def linear_kd_loss(
    student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, mask, labels, row_temperature, kind,
    temperature, scale_t2, beta, alpha, ignore_index, reduction, need_grad,
):  # fmt: skip
    tensors = (
        student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, mask, labels, row_temperature,
    )  # fmt: skip
    kept = need_grad and reduction != REDUCTION["none"]
    weights, unit = _weights(student, student_weight.shape[0], mask, labels, alpha, ignore_index, reduction)
    soft, hard, grads = _run(tensors, kind, temperature, scale_t2, beta, ignore_index, weights, None, kept)
    loss = weights[0] * soft if hard is None else weights[0] * soft + weights[1] * hard
    loss = (loss if reduction == REDUCTION["none"] else loss.sum(dtype=torch.float64)) * unit
    loss = loss.float().view(student.shape[:2]) if reduction == REDUCTION["none"] else loss.float()
    empty = [student.new_empty(0, dtype=torch.float32) for _ in range(3)]
    d_student, d_weight, d_bias = (e if g is None else g for g, e in zip(grads, empty, strict=True))
    return loss, d_student.view(student.shape) if kept else d_student, d_weight, d_bias


def linear_kd_loss_backward(
    grad, student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, mask, labels, row_temperature,
    d_student, d_weight, d_bias, kind, temperature, scale_t2, beta, alpha, ignore_index, reduction,
):  # fmt: skip
    weights, unit = _weights(student, student_weight.shape[0], mask, labels, alpha, ignore_index, reduction)
    factor = grad * unit
    if reduction == REDUCTION["none"]:
        tensors = (
            student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, mask, labels, row_temperature,
        )  # fmt: skip
        upstream, factor = grad.contiguous(), unit
        _, _, (d_student, d_weight, d_bias) = _run(
            tensors, kind, temperature, scale_t2, beta, ignore_index, weights, upstream, True
        )
    of_bias = student.new_empty(0)
    if student_bias is not None:
        of_bias = (d_bias * factor).to(student_bias.dtype)
    of_student = (d_student * factor).to(student.dtype).view(student.shape)
    return of_student, (d_weight * factor).to(student_weight.dtype), of_bias


register("linear_kd_loss", linear_kd_loss)
register("linear_kd_loss_backward", linear_kd_loss_backward)
