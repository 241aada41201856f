"""Mean squared error between attention maps given as scores, in plain torch (TinyBERT, arXiv 1909.10351; TextBrewer's
attention_mse and attention_mse_sum).
"""

import torch

from ._common import arithmetic_dtype


def real_pairs(mask):
    """mask [B, N] -> [B, 1, N, N]: whether query and key are both real; None stays None."""
    return None if mask is None else mask.bool()[:, None, :, None] & mask.bool()[:, None, None, :]


def reduced_maps(scores, mask, head_reduction):
    """scores [B, H, N, N], 0 where the query or the key is padding -> [B, H, N, N], or [B, 1, N, N] over all heads."""
    real = real_pairs(mask)
    if real is not None:
        scores = torch.where(real, scores, 0)
    if head_reduction is None:
        return scores
    return scores.sum(1, keepdim=True) if head_reduction == "sum" else scores.mean(1, keepdim=True)


def attention_map_mse(student_scores, teacher_scores, mask=None, *, head_reduction=None, dtype=None):
    """As `kdkernels.functional.attention_map_mse`; `dtype` is the arithmetic's (None: fp32, or fp64 where an input
    is)."""
    dtype = dtype or arithmetic_dtype(student_scores, teacher_scores)
    student, teacher = (reduced_maps(x.to(dtype), mask, head_reduction) for x in (student_scores, teacher_scores))
    real = real_pairs(mask)
    count = student.numel() if real is None else real.sum().to(dtype) * student.shape[1]
    loss = (student - teacher).square().sum() / torch.as_tensor(count).clamp_min(1)
    return loss if dtype == torch.float64 else loss.float()
