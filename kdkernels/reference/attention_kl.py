"""KL between attention maps in plain torch, N x N maps and all (MiniLM, arXiv 2002.10957; TextBrewer's attention_ce).

KL(softmax(scale_t q_t k_t^T / T) || softmax(scale_s q_s k_s^T / T)), keys outside the mask left out before the softmax.
"""

import torch

from ._common import arithmetic_dtype, divergence, keep_rows, outside_autocast, reduce_rows


@outside_autocast
def scores(q, k, scale, mask):
    """scale * q k^T [B, H, N, N], -inf at keys outside the mask; a batch without a real token keeps finite scores."""
    rows = None if mask is None else mask.bool()[:, None, :]
    x = scale * (keep_rows(q, rows) @ keep_rows(k, rows).transpose(-1, -2))
    if mask is None:
        return x
    keys = mask.bool() | ~mask.bool().any(-1, keepdim=True)
    return x.masked_fill(~keys[:, None, None, :], -torch.inf)


def attention_kl(
    q_s, k_s, q_t, k_t, mask=None, *, temperature=1.0, scale_s=None, scale_t=None, reduction="batchmean", dtype=None
):
    """As `kdkernels.functional.attention_kl`; `dtype` is the arithmetic's (None: fp32, or fp64 where an input is)."""
    dtype = dtype or arithmetic_dtype(q_s, k_s, q_t, k_t)
    q_s, k_s, q_t, k_t = (x.to(dtype) for x in (q_s, k_s, q_t, k_t))
    scale_s = q_s.shape[-1] ** -0.5 if scale_s is None else scale_s
    scale_t = q_t.shape[-1] ** -0.5 if scale_t is None else scale_t
    student = scores(q_s, k_s, scale_s / temperature, mask)
    teacher = scores(q_t, k_t, scale_t / temperature, mask)
    rows = divergence(student, teacher, "kl")
    row_mask = None if mask is None else mask.bool()[:, None, :].expand(rows.shape)
    loss = reduce_rows(rows, row_mask, reduction)
    return loss if dtype == torch.float64 else loss.float()
