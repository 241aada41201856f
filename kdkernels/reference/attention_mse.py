"""Mean squared error between attention maps in plain torch: scores (TinyBERT, arXiv 1909.10351) or probabilities."""

import torch

from ._common import arithmetic_dtype, sequences
from .attention_kl import scores


def attention_mse(
    q_s,
    k_s,
    q_t,
    k_t,
    mask=None,
    *,
    on="scores",
    scale_s=None,
    scale_t=None,
    cu_seqlens=None,
    max_seqlen=None,
    dtype=None,
):
    """As `kdkernels.functional.attention_mse`; `dtype` is the arithmetic's (None: fp32, or fp64 where an input is)."""
    dtype = dtype or arithmetic_dtype(q_s, k_s, q_t, k_t)
    q_s, k_s, q_t, k_t = (x.to(dtype) for x in (q_s, k_s, q_t, k_t))
    scale_s = q_s.shape[-1] ** -0.5 if scale_s is None else scale_s
    scale_t = q_t.shape[-1] ** -0.5 if scale_t is None else scale_t

    def squares_of(q_s, k_s, q_t, k_t, mask):
        """The sum over real (batch, head, query, key), and how many there are."""
        student, teacher = scores(q_s, k_s, scale_s, mask), scores(q_t, k_t, scale_t, mask)
        if on == "probs":
            student, teacher = student.softmax(-1), teacher.softmax(-1)
        if mask is None:
            return (student - teacher).square().sum(), torch.as_tensor(student.numel())
        real = (mask.bool()[:, None, :, None] & mask.bool()[:, None, None, :]).expand(student.shape)
        difference = torch.where(real, torch.where(real, student, 0) - torch.where(real, teacher, 0), 0)
        return difference.square().sum(), real.sum()

    if cu_seqlens is None:
        total, count = squares_of(q_s, k_s, q_t, k_t, mask)
    else:
        parts = [squares_of(*tensors, real) for tensors, real in sequences(cu_seqlens, q_s, k_s, q_t, k_t)]
        total, count = (sum(values) for values in zip(*parts, strict=True))
    loss = total / count.to(dtype).clamp_min(1)
    return loss if dtype == torch.float64 else loss.float()
