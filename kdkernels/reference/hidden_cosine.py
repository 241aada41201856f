"""Cosine distance between hidden states in plain torch (DistilBERT arXiv 1910.01108, TextBrewer's cos).

1 - cos(s, t) with every norm replaced by max(norm, 1e-8), as torch's cosine_similarity has it, written as half of
    |u - v|^2 + (1 - |u|^2) + (1 - |v|^2),   u = s / max(|s|, 1e-8), v likewise
so that equal states give 0 to the bit; the last two terms are 0 except for states shorter than 1e-8.
"""

import torch

from ._common import arithmetic_dtype, keep_rows, reduce_rows

EPS = 1e-8


def hidden_cosine(student, teacher, mask=None, *, dtype=None):
    """As `kdkernels.functional.hidden_cosine`; `dtype` is the arithmetic's (None: fp32, or fp64 where an input is)."""
    students, teachers = ([x] if torch.is_tensor(x) else list(x) for x in (student, teacher))
    dtype = dtype or arithmetic_dtype(*students, *teachers)
    total = torch.zeros((), dtype=dtype, device=students[0].device)
    for s, t in zip(students, teachers, strict=True):
        (u, short_u), (v, short_v) = (_unit(keep_rows(x.to(dtype), mask)) for x in (s, t))
        total = total + reduce_rows(0.5 * ((u - v).square().sum(-1) + short_u + short_v), mask, "batchmean")
    return total if dtype == torch.float64 else total.float()


def _unit(x):
    """(x / max(|x|, eps), 1 - the square of its norm)."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    return x / norm.clamp_min(EPS).unsqueeze(-1), (1 - (norm / EPS).square()).clamp_min(0)
