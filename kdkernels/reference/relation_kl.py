"""Self-attention relation transfer in plain torch (MiniLMv2, arXiv 2012.15828): heads re-split, then the KL of X X^T
maps.
"""

from .attention_kl import attention_kl


def relation_kl(
    student, teacher, mask=None, *, num_heads, cu_seqlens=None, max_seqlen=None, reduction="batchmean", dtype=None
):
    """As `kdkernels.functional.relation_kl`; `dtype` is the arithmetic's (None: fp32, or fp64 where an input is)."""
    s, t = (x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)) for x in (student, teacher))
    if cu_seqlens is None:
        s, t = s.transpose(1, 2), t.transpose(1, 2)
    return attention_kl(s, s, t, t, mask, cu_seqlens=cu_seqlens, reduction=reduction, dtype=dtype)
