"""Self-attention relation transfer in plain torch (MiniLMv2, arXiv 2012.15828): heads re-split, then the KL of X X^T
maps.
"""

from .attention_kl import attention_kl


def relation_kl(student, teacher, mask=None, *, num_heads, reduction="batchmean", dtype=None):
    """As `kdkernels.functional.relation_kl`; `dtype` is the arithmetic's (None: fp32, or fp64 where an input is)."""
    s, t = (x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2) for x in (student, teacher))
    return attention_kl(s, s, t, t, mask, reduction=reduction, dtype=dtype)
