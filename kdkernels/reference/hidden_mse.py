"""Mean squared error between hidden states in plain torch, with TinyBERT's projection and PKD's or MobileBERT's
normalisation.

Sources: TinyBERT arXiv 1909.10351, PKD arXiv 1908.09355 (l2), MobileBERT arXiv 2004.02984 (parameter-free LayerNorm).
"""

import torch
import torch.nn.functional as F

from ._common import arithmetic_dtype, count, keep_rows, outside_autocast

EPS = 1e-12


@outside_autocast
def hidden_mse(student, teacher, mask=None, *, weight=None, bias=None, normalize=None, dtype=None):
    """As `kdkernels.functional.hidden_mse`; `dtype` is the arithmetic's (None: fp32, or fp64 where an input is)."""
    students, teachers = ([x] if torch.is_tensor(x) else list(x) for x in (student, teacher))
    weights, biases = (list(x) if isinstance(x, (list, tuple)) else [x] * len(students) for x in (weight, bias))
    given = [x for x in students + teachers + weights + biases if x is not None]
    dtype = dtype or arithmetic_dtype(*given)
    total = torch.zeros((), dtype=dtype, device=students[0].device)
    for s, t, w, b in zip(students, teachers, weights, biases, strict=True):
        s, t = keep_rows(s.to(dtype), mask), keep_rows(t.to(dtype), mask)
        if w is not None:
            s = F.linear(s, w.to(dtype), None if b is None else b.to(dtype))
        if normalize == "l2":
            s, t = F.normalize(s, dim=-1, eps=EPS), F.normalize(t, dim=-1, eps=EPS)
        elif normalize == "layer_norm":
            s, t = F.layer_norm(s, s.shape[-1:], eps=EPS), F.layer_norm(t, t.shape[-1:], eps=EPS)
        rows = keep_rows(s - t, mask).square().sum(-1)
        total = total + rows.sum() / (count(mask, rows) * t.shape[-1])
    return total if dtype == torch.float64 else total.float()
