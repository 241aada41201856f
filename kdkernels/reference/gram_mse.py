"""Mean squared error between Gram matrices of hidden states in plain torch: FSP (Yim et al., CVPR 2017; TextBrewer's
fsp and gram) over the hidden axis, neuron selectivity transfer with a quadratic kernel (arXiv 1707.01219; TextBrewer's
nst and mmd) over the token axis.

hidden: mean over sequences and D_0 x D_1 of (s0^T s1 / n - t0^T t1 / n)^2, n the sequence's real tokens
token:  mean over pairs of real tokens of (s0 s1^T / D_s - t0 t1^T / D_t)^2
"""

import torch

from ._common import arithmetic_dtype, keep_rows, outside_autocast


@outside_autocast
def gram_mse(s0, s1, t0, t1, mask=None, *, over="hidden", dtype=None):
    """As `kdkernels.functional.gram_mse`; `dtype` is the arithmetic's (None: fp32, or fp64 where an input is)."""
    s1, t1 = s0 if s1 is None else s1, t0 if t1 is None else t1
    dtype = dtype or arithmetic_dtype(s0, s1, t0, t1)
    s0, s1, t0, t1 = (keep_rows(x.to(dtype), mask) for x in (s0, s1, t0, t1))
    tokens = s0.new_full(s0.shape[:1], s0.shape[1]) if mask is None else mask.sum(-1).to(dtype)
    if over == "token":
        difference = s0 @ s1.mT / s0.shape[2] - t0 @ t1.mT / t0.shape[2]
        entries = tokens.square().sum()
    else:
        difference = (s0.mT @ s1 - t0.mT @ t1) / tokens.clamp_min(1)[:, None, None]
        entries = (tokens > 0).sum() * (s0.shape[2] * s1.shape[2])
    loss = difference.square().sum() / entries.clamp_min(1)
    return loss if dtype == torch.float64 else loss.float()
