"""Distillation from hidden states and heads in plain torch: kd_loss of the logits hidden @ weight.T + bias."""

import torch
import torch.nn.functional as F

from ._common import arithmetic_dtype, keep_rows, outside_autocast
from .kd_loss import kd_loss


@outside_autocast
def linear_kd_loss(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    *,
    student_bias=None,
    teacher_bias=None,
    mask=None,
    dtype=None,
    **options,
):
    """As `kdkernels.functional.linear_kd_loss`; `dtype` is the arithmetic's (None: fp32, or fp64 where an input is)."""
    given = [student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias]
    dtype = dtype or arithmetic_dtype(*(x for x in given if torch.is_tensor(x)))
    student, w_s, b_s, teacher, w_t, b_t = (x if x is None else x.to(dtype) for x in given)
    student = F.linear(keep_rows(student, mask), w_s, b_s)
    teacher = F.linear(keep_rows(teacher, mask), w_t, b_t)
    return kd_loss(student, teacher, mask=mask, dtype=dtype, **options)
