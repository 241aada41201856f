"""Transfer of the mean and variance of hidden states in plain torch (MobileBERT, arXiv 2004.02984).

Per token, over its features: mean_weight (mean_s - mean_t)^2 + variance_weight |var_s - var_t|, the variance being the
mean square around the mean. MobileBERT's code has the absolute difference of variances; variance="squared" squares it.
"""

import torch

from ._common import arithmetic_dtype, keep_rows, reduce_rows


def moment_mse(student, teacher, mask=None, *, mean_weight=1.0, variance_weight=1.0, variance="absolute", dtype=None):
    """As `kdkernels.functional.moment_mse`; `dtype` is the arithmetic's (None: fp32, or fp64 where an input is)."""
    students, teachers = ([x] if torch.is_tensor(x) else list(x) for x in (student, teacher))
    dtype = dtype or arithmetic_dtype(*students, *teachers)
    total = torch.zeros((), dtype=dtype, device=students[0].device)
    for s, t in zip(students, teachers, strict=True):
        (var_s, mean_s), (var_t, mean_t) = (
            torch.var_mean(keep_rows(x.to(dtype), mask), -1, correction=0) for x in (s, t)
        )
        spread = (var_s - var_t).abs() if variance == "absolute" else (var_s - var_t).square()
        rows = mean_weight * (mean_s - mean_t).square() + variance_weight * spread
        total = total + reduce_rows(rows, mask, "batchmean")
    return total if dtype == torch.float64 else total.float()
