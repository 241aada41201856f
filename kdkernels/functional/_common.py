"""What the public losses share besides the checks."""

import torch

from ..ops._common import REDUCTION

ROW_REDUCTION = {name: REDUCTION[name] for name in ("batchmean", "sum", "none")}


def any_fp64(*tensors: torch.Tensor) -> bool:
    return torch.float64 in [t.dtype for t in tensors]  # in half the time of any() over a generator


def need_grad(*student: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in student)
