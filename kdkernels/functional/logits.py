"""Losses on logits."""

import torch

from .. import _checks, reference
from .._load import serves
from ..ops._common import KIND, REDUCTION


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
):
    """Distillation from logits (Hinton et al., arXiv 1503.02531): a pass forward, a pass backward, 32 bytes a row kept.

    Args:
        student_logits, teacher_logits: [..., V]. -inf is a class of probability 0.
        kind: "kl" = KL(teacher || student); "ce" = cross-entropy with soft targets (kl plus the teacher's entropy, the
            same gradient); "reverse_kl" = KL(student || teacher); "jsd" = beta KL(teacher || m) + (1 - beta) KL(student
            || m) with m = beta teacher + (1 - beta) student; "tv" = half the L1 distance.
        temperature: both logits are divided by it; a number > 0, or a tensor [...] with one per row.
        scale_t2: multiply the soft term by T^2, the row's own T, so that its gradient does not shrink as 1/T^2.
        beta: weight of the teacher in "jsd", in [0, 1].
        mask: [...], the rows that count.
        labels: [...], integers: adds the cross-entropy at T = 1 in the same pass, alpha soft + (1 - alpha) hard. Rows
            with `ignore_index` have no hard term. Each term is reduced over its own rows; "mean" and "batchmean" are
            both the mean over labelled rows for the hard term.
        alpha: weight of the soft term where labels are given.
        reduction: "batchmean", "mean", "sum" or "none".

    Returns: a scalar, or [...] for "none"; float32 (float64 for float64 inputs).
    """
    student = _checks.tensor("student_logits", student_logits)
    teacher = _checks.tensor("teacher_logits", teacher_logits)
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"student_logits must have the shape [..., classes], got {list(student.shape)}")
    if student.shape != teacher.shape:
        what = "vocabulary" if student.shape[:-1] == teacher.shape[:-1] else "shape"
        raise ValueError(
            f"teacher_logits must have the shape of student_logits; the {what} differs: student {list(student.shape)}, "
            f"teacher {list(teacher.shape)}"
        )
    _checks.teacher("teacher_logits", teacher)
    _checks.same_device("student_logits", student, teacher_logits=teacher)
    kind_id = _checks.choice("kind", kind, KIND)
    reduction_id = _checks.choice("reduction", reduction, REDUCTION)
    beta = _checks.number("beta", beta, low=0.0, high=1.0)
    alpha = _checks.number("alpha", alpha)
    lead, classes = student.shape[:-1], student.shape[-1]
    mask = _checks.mask(mask, lead, student, "the logits' without classes")
    if labels is not None:
        labels = _checks.labels(labels, lead, student, classes, ignore_index, mask)
    rows = None
    if isinstance(temperature, torch.Tensor):
        rows, temperature = _checks.row_temperature(temperature, lead, student, mask), 1.0
    else:
        temperature = _checks.number("temperature", temperature, above=0)

    if student.dtype == torch.float64 or teacher.dtype == torch.float64 or not serves("kd_loss", student.device):
        return reference.kd_loss(
            student,
            teacher,
            kind=kind,
            temperature=temperature if rows is None else rows,
            scale_t2=scale_t2,
            beta=beta,
            mask=mask,
            labels=labels,
            alpha=alpha,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    if len(lead) != 2:
        shape = (1, *lead) if len(lead) == 1 else (1, 1) if not lead else (-1, lead[-1])
        student, teacher = student.reshape(*shape, classes), teacher.reshape(*shape, classes)
        mask, labels, rows = (None if x is None else x.view(shape) for x in (mask, labels, rows))
    loss, _ = torch.ops.kdkernels.kd_loss.default(
        student,
        teacher,
        mask,
        labels,
        rows,
        kind_id,
        temperature,
        bool(scale_t2),
        beta,
        alpha,
        ignore_index,
        reduction_id,
    )
    return loss if reduction != "none" or len(lead) == 2 else loss.view(lead)
