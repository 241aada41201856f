"""Losses on attention maps that the models have stored, given as scores before the softmax.

Where queries and keys are at hand, `attention_kl` and `attention_mse` need no N x N tensor at all.
"""

from .. import _checks, ops, reference
from .._load import serves
from ..ops._common import HEAD_REDUCTION
from ._common import ROW_REDUCTION, any_fp64


def attention_map_mse(student_scores, teacher_scores, mask=None, *, head_reduction=None):
    """Mean squared difference of two attention maps, mean over real (batch, head, query, key).

    TinyBERT's attention loss (arXiv 1909.10351) and TextBrewer's attention_mse; "sum" is its attention_mse_sum.

    Args:
        student_scores: [B, H_s, N, N], scores before the softmax (or any other map).
        teacher_scores: [B, H_t, N, N]; H_t may differ from H_s only where heads are reduced.
        mask: [B, N]; an entry counts where its query and its key are real.
        head_reduction: None, or "sum" or "mean" of each side's heads before they are compared; the loss is then the
            mean over real (batch, query, key).

    Returns: a scalar; float32 (float64 for float64 inputs).
    """
    head_id = _check_maps(student_scores, teacher_scores, head_reduction)
    mask = _check_mask(mask, student_scores)
    if any_fp64(student_scores, teacher_scores) or not serves("attention_map_mse", student_scores.device):
        return reference.attention_map_mse(student_scores, teacher_scores, mask, head_reduction=head_reduction)
    return ops.attention_map_mse.call(student_scores, teacher_scores, mask, head_id)


def attention_map_kl(
    student_scores, teacher_scores, mask=None, *, temperature=1.0, head_reduction=None, reduction="batchmean"
):
    """KL(softmax(teacher / T) || softmax(student / T)) of every query, keys outside the mask left out before.

    MiniLM's attention transfer (arXiv 2002.10957); TextBrewer's attention_ce plus the teacher's entropy, which has no
    gradient; "mean" is its attention_ce_mean.

    Args:
        student_scores: [B, H_s, N, N], scores before the softmax. -inf is a key of probability 0.
        teacher_scores: [B, H_t, N, N]; H_t may differ from H_s only where heads are reduced.
        mask: [B, N].
        temperature: divides the scores; a number > 0. No T^2.
        head_reduction: None, or "sum" or "mean" of each side's scores over heads before the softmax.
        reduction: "batchmean" (rows are real (batch, head, query), or real (batch, query) where heads are reduced),
            "sum" or "none" ([B, H, N], or [B, N]).

    Returns: a scalar, [B, H, N] or [B, N]; float32 (float64 for float64 inputs).
    """
    head_id = _check_maps(student_scores, teacher_scores, head_reduction)
    mask = _check_mask(mask, student_scores)
    reduction_id = _checks.choice("reduction", reduction, ROW_REDUCTION)
    temperature = _checks.number("temperature", temperature, above=0)
    if any_fp64(student_scores, teacher_scores) or not serves("attention_map_kl", student_scores.device):
        return reference.attention_map_kl(
            student_scores,
            teacher_scores,
            mask,
            temperature=temperature,
            head_reduction=head_reduction,
            reduction=reduction,
        )
    return ops.attention_map_kl.call(student_scores, teacher_scores, mask, temperature, head_id, reduction_id)[0]


def _check_mask(mask, scores):
    return _checks.mask(mask, (scores.shape[0], scores.shape[2]), scores, "[batch, tokens]")


def _check_maps(student, teacher, head_reduction) -> int:
    """Shapes, devices and the teacher's grad; returns the integer that stands for `head_reduction`."""
    head_id = _checks.choice("head_reduction", head_reduction, HEAD_REDUCTION)
    for name, x in (("student_scores", student), ("teacher_scores", teacher)):
        _checks.tensor(name, x, 4)
        if x.shape[2] != x.shape[3]:
            raise ValueError(f"{name} must be square maps [batch, heads, tokens, tokens], got {list(x.shape)}")
        if x.shape[1] == 0:
            raise ValueError(f"{name} must have at least one head, got shape {list(x.shape)}")
    if student.shape[0] != teacher.shape[0] or student.shape[2] != teacher.shape[2]:
        raise ValueError(
            "teacher_scores must agree with student_scores in batch and tokens; got student_scores "
            f"{list(student.shape)}, teacher_scores {list(teacher.shape)}"
        )
    if head_reduction is None and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            'student and teacher must have as many heads where head_reduction is None ("sum" and "mean" compare any); '
            f"got student_scores {list(student.shape)}, teacher_scores {list(teacher.shape)}"
        )
    _checks.teacher("teacher_scores", teacher)
    _checks.same_device("student_scores", student, teacher_scores=teacher)
    return head_id
