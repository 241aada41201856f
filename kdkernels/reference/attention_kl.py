"""KL between attention maps in plain torch, N x N maps and all (MiniLM, arXiv 2002.10957; TextBrewer's attention_ce).

KL(softmax(x_t / T) || softmax(x_s / T)) or the reverse, x = scale q k^T + bias, over the keys that a query sees.
"""

import torch

from ._common import arithmetic_dtype, divergence, keep_rows, outside_autocast, reduce_rows, sequences


@outside_autocast
def scores(q, k, scale, mask, *, bias=None, causal=False, head_reduction=None):
    """scale * q k^T + bias [B, H, N, N], or [B, 1, N, N] over all heads; -inf at keys that a query does not see.

    Rows outside the mask count nowhere; they keep finite scores.
    """
    tokens = None if mask is None else mask.bool()[:, None, :]
    q, k = keep_rows(q, tokens), keep_rows(k, tokens)
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    x = scale * (q @ k.transpose(-1, -2))
    if bias is not None:
        bias = bias[..., : x.shape[-2], : x.shape[-1]].to(x.dtype)
        x = x + (bias if mask is None else torch.where(tokens[..., None] & tokens[:, :, None], bias, 0))
    if head_reduction is not None:
        x = x.sum(1, keepdim=True) if head_reduction == "sum" else x.mean(1, keepdim=True)
    if causal:
        future = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        x = x.masked_fill(future if mask is None else future & tokens[..., None], -torch.inf)
    return x if mask is None else x.masked_fill(tokens[..., None] & ~tokens[:, :, None], -torch.inf)


def attention_kl(
    q_s,
    k_s,
    q_t,
    k_t,
    mask=None,
    *,
    kind="kl",
    temperature=1.0,
    scale_s=None,
    scale_t=None,
    head_reduction=None,
    head_map=None,
    causal=False,
    bias_s=None,
    bias_t=None,
    lse_s=None,
    lse_t=None,
    cu_seqlens=None,
    max_seqlen=None,
    reduction="batchmean",
    dtype=None,
):
    """As `kdkernels.functional.attention_kl`; `dtype` is the arithmetic's (None: fp32, or fp64 where an input is).
    lse_s and lse_t only save work, and are not looked at."""
    dtype = dtype or arithmetic_dtype(q_s, k_s, q_t, k_t)
    q_s, k_s, q_t, k_t = (x.to(dtype) for x in (q_s, k_s, q_t, k_t))
    scale_s = q_s.shape[-1] ** -0.5 if scale_s is None else scale_s
    scale_t = q_t.shape[-1] ** -0.5 if scale_t is None else scale_t
    options = {"causal": causal, "head_reduction": head_reduction}

    def rows_of(q_s, k_s, q_t, k_t, mask, bias_s, bias_t):
        student = scores(q_s, k_s, scale_s, mask, bias=bias_s, **options) / temperature
        teacher = scores(q_t, k_t, scale_t, mask, bias=bias_t, **options) / temperature
        rows = divergence(student, teacher if head_map is None else teacher[:, head_map], kind)
        return rows if head_reduction is None else rows.squeeze(1)

    if cu_seqlens is None:
        rows = rows_of(q_s, k_s, q_t, k_t, mask, bias_s, bias_t)
        row_mask = None if mask is None else mask.bool()
        if row_mask is not None and head_reduction is None:
            row_mask = row_mask[:, None, :].expand(rows.shape)
    else:
        parts, masks = [], []
        for index, (tensors, real) in enumerate(sequences(cu_seqlens, q_s, k_s, q_t, k_t)):
            biases = [None if b is None or not real.any() else b[index % b.shape[0]][None] for b in (bias_s, bias_t)]
            part = rows_of(*tensors, real, *biases)[0]
            parts.append(part.movedim(-1, 0))
            masks.append(real[0])
        rows, row_mask = torch.cat(parts), torch.cat(masks)
        row_mask = row_mask.unsqueeze(-1).expand(rows.shape) if head_reduction is None else row_mask
    loss = reduce_rows(rows, row_mask, reduction)
    return loss if dtype == torch.float64 else loss.float()
