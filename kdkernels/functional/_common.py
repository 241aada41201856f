"""What the public losses share besides the checks."""

import torch

from ..ops._common import REDUCTION

ROW_REDUCTION = {name: REDUCTION[name] for name in ("batchmean", "sum", "none")}


def any_fp64(*tensors: torch.Tensor) -> bool:
    return any(t.dtype == torch.float64 for t in tensors)


def need_grad(*student: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in student)
