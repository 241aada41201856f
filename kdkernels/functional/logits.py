"""Losses on logits."""

import torch

from .. import _checks, ops, reference
from .._load import serves
from ..ops._common import KIND, REDUCTION, TAIL
from ._common import any_fp64, need_grad


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
        temperature: both logits are divided by it; a number > 0, or a tensor [...] with one per row. To
            torch.compile a number is a constant: schedules pass torch.tensor(T).
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
    lead, classes = student.shape[:-1], student.shape[-1]
    kind_id, reduction_id, beta, alpha = _numbers(kind, reduction, beta, alpha)
    mask, labels, rows, temperature = _rows(lead, classes, student, mask, labels, ignore_index, temperature)

    if any_fp64(student, teacher) or not serves("kd_loss", student.device):
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
    student, teacher, mask, labels, rows = _two_leading(lead, student, teacher, mask, labels, rows)
    loss, _ = ops.kd_loss.call(
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


def linear_kd_loss(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    *,
    student_bias=None,
    teacher_bias=None,
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
    """kd_loss of the logits hidden @ weight.T + bias, which are never stored whole.

    Args:
        student_hidden: [..., D_s], the input of the student's head; student_weight: [V, D_s]; student_bias: [V].
        teacher_hidden: [..., D_t], the same leading shape; teacher_weight: [V, D_t]; teacher_bias: [V].
        mask: [...], the rows that count. Others are not computed on the CPU.
        kind, temperature, scale_t2, beta, labels, alpha, ignore_index, reduction: as in `kd_loss`, rows being those of
            the hidden states.

    Returns: a scalar, or [...] for "none"; float32 (float64 for float64 inputs). Gradients flow to student_hidden,
    student_weight and student_bias.
    """
    student, teacher = (
        _checks.tensor("student_hidden", student_hidden),
        _checks.tensor("teacher_hidden", teacher_hidden),
    )
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"student_hidden must have the shape [..., features], got {list(student.shape)}")
    lead = student.shape[:-1]
    if teacher.dim() == 0 or teacher.shape[-1] == 0 or teacher.shape[:-1] != lead:
        raise ValueError(
            f"teacher_hidden must have the shape of student_hidden up to its features, {list(lead)} and at least one; "
            f"got {list(teacher.shape)}"
        )
    classes = _head("student", student, student_weight, student_bias, None)
    _head("teacher", teacher, teacher_weight, teacher_bias, classes)
    of_teacher = {"teacher_hidden": teacher, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
    for name, value in of_teacher.items():
        if value is not None:
            _checks.teacher(name, value)
    _checks.same_device(
        "student_hidden", student, student_weight=student_weight, student_bias=student_bias, **of_teacher
    )
    kind_id, reduction_id, beta, alpha = _numbers(kind, reduction, beta, alpha)
    mask, labels, rows, temperature = _rows(lead, classes, student, mask, labels, ignore_index, temperature)
    given = [x for x in (student, student_weight, student_bias, *of_teacher.values()) if x is not None]
    if any_fp64(*given) or not serves("linear_kd_loss", student.device):
        return reference.linear_kd_loss(
            student,
            student_weight,
            teacher,
            teacher_weight,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
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
    student, teacher, mask, labels, rows = _two_leading(lead, student, teacher, mask, labels, rows)
    loss = ops.linear_kd_loss.call(
        student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, mask, labels, rows, kind_id,
        temperature, bool(scale_t2), beta, alpha, ignore_index, reduction_id,
        need_grad(*(x for x in (student, student_weight, student_bias) if x is not None)),
    )[0]  # fmt: skip
    return loss if reduction != "none" or len(lead) == 2 else loss.view(lead)


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
):
    """Distillation from a cached teacher of which only K classes a row are known.

    tail="renormalize": the teacher is softmax(teacher_values / T) over its K classes and 0 elsewhere, against the
        student's softmax(student_logits / T) over the whole vocabulary (axolotl's and NeMo-RL's forward KL). The values
        may be logits or log-probabilities: only their differences count.
    tail="bucket": all other classes together are one more outcome. teacher_values are log-probabilities of the
        teacher's softmax *at the temperature of this call* (log_softmax(logits / T).topk(K)), since the mass that they
        leave cannot be tempered afterwards; that mass, 1 - sum(exp(teacher_values)), stands against the student's mass
        of the other classes. It counts as 0 where the sum exceeds 1 by rounding (the K are then renormalised), and
        where K = V.

    Args:
        student_logits: [..., V]. -inf is a class of probability 0.
        teacher_values, teacher_indices: [..., K], 1 <= K <= V: values and their classes, int32 or int64, no class twice
            in a row. A value of -inf is a class without mass.
        kind: as in `kd_loss`, over K + 1 outcomes. "reverse_kl" is infinite where the teacher has no mass, so it needs
            tail="bucket".
        mask: [...], the rows that count; others may hold any class.
        temperature, scale_t2, beta, labels, alpha, ignore_index, reduction: as in `kd_loss`; "mean" divides by V.

    Returns: a scalar, or [...] for "none"; float32 (float64 for float64 inputs). On the CPU a class that is out of
    range or named twice raises; on a GPU, where that would be a sync, the first gives NaN for its row and the second is
    undefined.
    """
    student, teacher = (
        _checks.tensor("student_logits", student_logits),
        _checks.tensor("teacher_values", teacher_values),
    )
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"student_logits must have the shape [..., classes], got {list(student.shape)}")
    lead, classes = student.shape[:-1], student.shape[-1]
    if teacher.dim() == 0 or teacher.shape[:-1] != lead or not 1 <= teacher.shape[-1] <= classes:
        raise ValueError(
            f"teacher_values must have the shape {[*lead, 'K']}, K values for the {classes} classes of student_logits, "
            f"1 <= K <= {classes}; got {list(teacher.shape)}"
        )
    _checks.teacher("teacher_values", teacher)
    _checks.same_device("student_logits", student, teacher_values=teacher)
    kind_id, reduction_id, beta, alpha = _numbers(kind, reduction, beta, alpha)
    tail_id = _checks.choice("tail", tail, TAIL)
    if kind == "reverse_kl" and tail == "renormalize":
        raise ValueError(
            'kind="reverse_kl" is infinite where the teacher has no mass, which with tail="renormalize" is all but K '
            'classes; use tail="bucket"'
        )
    mask, labels, rows, temperature = _rows(lead, classes, student, mask, labels, ignore_index, temperature)
    indices = _checks.class_indices("teacher_indices", teacher_indices, teacher, classes, mask)
    if tail == "bucket":
        _checks.log_probabilities("teacher_values", teacher, mask)
    if any_fp64(student, teacher) or not serves("topk_kd_loss", student.device):
        return reference.topk_kd_loss(
            student,
            teacher,
            indices,
            tail=tail,
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
    student, teacher, indices, mask, labels, rows = _two_leading(lead, student, teacher, indices, mask, labels, rows)
    loss = ops.topk_kd_loss.call(
        student, teacher, indices, mask, labels, rows, tail_id, kind_id, temperature, bool(scale_t2), beta, alpha,
        ignore_index, reduction_id,
    )[0]  # fmt: skip
    return loss if reduction != "none" or len(lead) == 2 else loss.view(lead)


def _numbers(kind, reduction, beta, alpha):
    return (
        _checks.choice("kind", kind, KIND),
        _checks.choice("reduction", reduction, REDUCTION),
        _checks.number("beta", beta, low=0.0, high=1.0),
        _checks.number("alpha", alpha),
    )


def _rows(lead, classes, student, mask, labels, ignore_index, temperature):
    """What comes with one value per row: (mask, labels, temperature per row or None, temperature of all)."""
    mask = _checks.mask(mask, lead, student, "the student's without its last dimension")
    if labels is not None:
        labels = _checks.labels(labels, lead, student, classes, ignore_index, mask)
    if isinstance(temperature, torch.Tensor):
        return mask, labels, _checks.row_temperature(temperature, lead, student, mask), 1.0
    return mask, labels, None, _checks.number("temperature", temperature, above=0)


def _two_leading(lead, *tensors):
    """Tensors [*lead] or [*lead, n] with two leading dimensions, as the kernels walk over them; None stays None."""
    if len(lead) == 2:
        return tensors
    shape = (1, *lead) if len(lead) == 1 else (1, 1) if not lead else (-1, lead[-1])
    return [x if x is None else x.reshape(*shape, *x.shape[len(lead) :]) for x in tensors]


def _head(side, hidden, weight, bias, classes):
    """Checks the linear layer of one side; returns its number of classes, which must be `classes` where given."""
    _checks.tensor(f"{side}_weight", weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{side}_weight must have the shape [V, {hidden.shape[-1]}], classes by features of {side}_hidden; got "
            f"{list(weight.shape)}"
        )
    if classes is not None and weight.shape[0] != classes:
        raise ValueError(
            f"teacher_weight must have student_weight's vocabulary of {classes} classes, got {weight.shape[0]}"
        )
    if bias is not None:
        _checks.tensor(f"{side}_bias", bias)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"{side}_bias must have the shape [{weight.shape[0]}], got {list(bias.shape)}")
    return weight.shape[0]
