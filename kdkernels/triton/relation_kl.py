"""relation_kl on CUDA: queries and keys are one tensor, the re-split heads, seen through strides; see _attention.py.

The scores are symmetric, so that one tile serves row i's distribution and row j's: with g the slopes, the gradient
d x_i = sum_j (g_ij + g_ji) x_j / sqrt(d) comes from one launch and three products a tile.
"""

import torch

from . import _attention
from ._common import register
from ._heads import new_gradient, sequences_of


def _heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B, N, W] -> the view [B, num_heads, N, d], packed [tokens, W] -> [tokens, num_heads, d]."""
    split = x.unflatten(-1, (num_heads, x.shape[-1] // num_heads))
    return split if x.dim() == 2 else split.transpose(1, 2)


def _maps(student, teacher, mask, cu_seqlens, max_seqlen, num_heads):
    s, t = _heads(student, num_heads), _heads(teacher, num_heads)
    sequences = sequences_of(student, mask, cu_seqlens, max_seqlen)
    return _attention.Maps(s, s, t, t, sequences, _attention.KL, s.shape[-1] ** -0.5, t.shape[-1] ** -0.5)


def relation_kl(student, teacher, mask, cu_seqlens, max_seqlen, num_heads, reduction, need_grad):
    maps = _maps(student, teacher, mask, cu_seqlens, max_seqlen, num_heads)
    loss, stats = _attention.forward(maps, reduction, need_grad)
    return loss, stats.new_empty(0), stats


def relation_kl_backward(
    grad, student, teacher, mask, cu_seqlens, grad_student, stats, max_seqlen, num_heads, reduction
):
    maps = _maps(student, teacher, mask, cu_seqlens, max_seqlen, num_heads)
    d_student = new_gradient(student, maps.sequences.packed)
    out = _heads(d_student, num_heads)
    _attention.backward(maps, grad, stats, reduction, out, out)
    return d_student


register("relation_kl", relation_kl)
register("relation_kl_backward", relation_kl_backward)
