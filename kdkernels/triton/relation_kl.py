"""relation_kl on CUDA: queries and keys are one tensor, the re-split heads, seen through strides; see _attention.py.

The scores are symmetric, so that one tile serves row i's distribution and row j's: with g the slopes, the gradient
d x_i = sum_j (g_ij + g_ji) x_j / sqrt(d) comes from one launch and three products a tile.
"""

import torch

from . import _attention
from ._common import register


def _heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B, N, W] -> the view [B, num_heads, N, W / num_heads]."""
    return x.unflatten(2, (num_heads, x.shape[2] // num_heads)).transpose(1, 2)


def relation_kl(student, teacher, mask, num_heads, reduction, need_grad):
    s, t = _heads(student, num_heads), _heads(teacher, num_heads)
    loss, stats = _attention.forward(
        s, s, t, t, mask, _attention.KL, s.shape[3] ** -0.5, t.shape[3] ** -0.5, reduction, need_grad
    )
    return loss, stats.new_empty(0), stats


def relation_kl_backward(grad, student, teacher, mask, grad_student, stats, num_heads, reduction):
    s, t = _heads(student, num_heads), _heads(teacher, num_heads)
    d_student = student.new_empty(student.shape)
    out, scales = _heads(d_student, num_heads), (s.shape[3] ** -0.5, t.shape[3] ** -0.5)
    _attention.backward(grad, s, s, t, t, mask, stats, _attention.KL, *scales, reduction, out, out)
    return d_student


register("relation_kl", relation_kl)
register("relation_kl_backward", relation_kl_backward)
