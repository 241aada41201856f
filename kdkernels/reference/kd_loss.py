"""Distillation from logits in plain torch: the truth for tests, the eager peer for benches, the path for fp64.

soft = D(softmax(teacher / T), softmax(student / T)) * T^2 (Hinton et al., arXiv 1503.02531); with labels
alpha * soft + (1 - alpha) * cross-entropy at T = 1.
"""

import torch
import torch.nn.functional as F

from ._common import arithmetic_dtype, divergence, keep_rows, reduce_rows


def kd_loss(
    student_logits,
    teacher_logits,
    *,
    kind="kl",
    temperature=1.0,
    scale_t2=True,
    beta=0.5,
    mask=None,
    labels=None,
    alpha=1.0,
    ignore_index=-100,
    reduction="batchmean",
    dtype=None,
):
    """As `kdkernels.functional.kd_loss`; `dtype` is the arithmetic's (None: fp32, or fp64 where an input is)."""
    dtype = dtype or arithmetic_dtype(student_logits, teacher_logits)
    student = keep_rows(student_logits.to(dtype), mask)
    teacher = keep_rows(teacher_logits.to(dtype), mask)
    row_t = torch.as_tensor(temperature, dtype=dtype, device=student.device)
    if mask is not None and row_t.dim():
        row_t = torch.where(mask.bool(), row_t, 1)
    rows = divergence(student / row_t.unsqueeze(-1), teacher / row_t.unsqueeze(-1), kind, beta)
    if scale_t2:
        rows = rows * row_t**2
    return with_labels(rows, student, mask, labels, alpha, ignore_index, reduction)


def with_labels(rows, student, mask, labels, alpha, ignore_index, reduction):
    """The soft term's rows and the student's logits [..., V] -> the loss: reduced, and joined by the hard term."""
    classes = student.shape[-1]
    soft = reduce_rows(rows, mask, reduction, classes)
    if labels is None:
        return soft.to(_result(soft.dtype))

    counted = labels != ignore_index if mask is None else (labels != ignore_index) & mask.bool()
    target = torch.where(counted, labels, 0)
    rows = F.cross_entropy(student.reshape(-1, classes), target.reshape(-1).long(), reduction="none").view(labels.shape)
    # A class mean would make no sense for one-hot labels: the cross-entropy's "mean" is its mean over labelled rows.
    hard = reduce_rows(rows, counted, "batchmean" if reduction == "mean" else reduction)
    return (alpha * soft + (1 - alpha) * hard).to(_result(soft.dtype))


def _result(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
