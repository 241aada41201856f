"""KL between attention maps given as scores, in plain torch (MiniLM, arXiv 2002.10957; TextBrewer's attention_ce and
attention_ce_mean).

KL(softmax(t / T) || softmax(s / T)) for every real query, keys outside the mask left out before the softmax.
"""

import torch

from ._common import arithmetic_dtype, divergence, reduce_rows
from .attention_map_mse import reduced_maps


def attention_map_kl(
    student_scores,
    teacher_scores,
    mask=None,
    *,
    temperature=1.0,
    head_reduction=None,
    reduction="batchmean",
    dtype=None,
):
    """As `kdkernels.functional.attention_map_kl`; `dtype` is the arithmetic's (None: fp32, or fp64 where an input
    is)."""
    dtype = dtype or arithmetic_dtype(student_scores, teacher_scores)
    maps = [reduced_maps(x.to(dtype), mask, head_reduction) / temperature for x in (student_scores, teacher_scores)]
    row_mask = None
    if mask is not None:
        left_out = ~mask.bool() & mask.bool().any(-1, keepdim=True)  # a batch without a real token keeps finite scores
        maps = [x.masked_fill(left_out[:, None, None, :], -torch.inf) for x in maps]
        row_mask = mask.bool()[:, None, :].expand(maps[0].shape[:-1])
    rows = divergence(*maps, "kl")
    if head_reduction is not None:
        rows, row_mask = rows.squeeze(1), None if row_mask is None else row_mask.squeeze(1)
    loss = reduce_rows(rows, row_mask, reduction)
    return loss if dtype == torch.float64 else loss.float()
