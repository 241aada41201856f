"""Attention within sequences that lie end to end (padding-free), by torch's own kernel, a call for each sequence."""

import torch.nn.functional as F


def varlen_attention(q, k, v, cu_seqlens, num_heads, scale):
    """softmax(scale q k^T) v; q, k, v: [tokens, heads * d]; sequence b is tokens [cu_seqlens[b], cu_seqlens[b + 1])."""
    q, k, v = (x.unflatten(1, (num_heads, -1)).transpose(0, 1) for x in (q, k, v))
    out = q.new_empty(q.shape[1], num_heads, q.shape[2])
    bounds = cu_seqlens.tolist()
    for begin, end in zip(bounds, bounds[1:], strict=False):
        if end > begin:
            own = (x[None, :, begin:end] for x in (q, k, v))
            out[begin:end] = F.scaled_dot_product_attention(*own, scale=scale)[0].transpose(0, 1)
    return out.flatten(1)
