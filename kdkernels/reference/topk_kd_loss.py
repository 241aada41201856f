"""Distillation from a cached top-k teacher in plain torch.

Both sides are distributions over K + 1 outcomes: the K classes that the teacher named and all others together. The
student's mass of the others is the sum of their own exponentials, never 1 minus the rest. The teacher's is 0
(renormalize) or what its K probabilities leave (bucket). Where the teacher has no mass, merging classes changes none
of the divergences, so "renormalize" is the loss against the student's softmax over the whole vocabulary.
"""

import torch

from ._common import arithmetic_dtype, divergence, keep_rows
from .kd_loss import with_labels


def topk_kd_loss(
    student_logits,
    teacher_values,
    teacher_indices,
    *,
    tail="renormalize",
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
    """As `kdkernels.functional.topk_kd_loss`; `dtype` is the arithmetic's (None: fp32, or fp64 where an input is)."""
    dtype = dtype or arithmetic_dtype(student_logits, teacher_values)
    student, teacher = keep_rows(student_logits.to(dtype), mask), keep_rows(teacher_values.to(dtype), mask)
    indices = teacher_indices.long()
    if mask is not None:  # a padded row may name any class, but it must name K different ones
        indices = torch.where(
            mask.bool().unsqueeze(-1), indices, torch.arange(indices.shape[-1], device=indices.device)
        )
    row_t = torch.as_tensor(temperature, dtype=dtype, device=student.device)
    if mask is not None and row_t.dim():
        row_t = torch.where(mask.bool(), row_t, 1)
    scaled = student / row_t.unsqueeze(-1)
    named = torch.cat([scaled.gather(-1, indices), _log_sum_of_others(scaled, indices)], -1)
    if tail == "renormalize":
        rest = torch.full_like(teacher[..., :1], -torch.inf)
        teacher = teacher / row_t.unsqueeze(-1)
    elif indices.shape[-1] == student.shape[-1]:
        rest = torch.full_like(teacher[..., :1], -torch.inf)
    else:
        rest = (1 - teacher.exp().sum(-1, keepdim=True)).clamp_min(0).log()
    rows = divergence(named, torch.cat([teacher, rest], -1), kind, beta)
    if scale_t2:
        rows = rows * row_t**2
    return with_labels(rows, student, mask, labels, alpha, ignore_index, reduction)


def _log_sum_of_others(x, indices):
    """log of the sum of exponentials [..., 1] over the classes that `indices` leaves out; -inf where it leaves none."""
    others = x.scatter(-1, indices, -torch.inf)
    empty = (others == -torch.inf).all(-1, keepdim=True)
    return torch.logsumexp(torch.where(empty, 0, others), -1, keepdim=True).masked_fill(empty, -torch.inf)
