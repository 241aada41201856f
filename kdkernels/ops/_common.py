"""What the op families share: the library, the enums that cross the C++ boundary, and how backward is served."""

import torch
from torch.library import Library

LIBRARY = Library("kdkernels", "DEF")

KIND = {"kl": 0, "ce": 1, "reverse_kl": 2, "jsd": 3, "tv": 4}
REDUCTION = {"none": 0, "sum": 1, "mean": 2, "batchmean": 3}
ON = {"scores": 0, "probs": 1}
NORMALIZE = {None: 0, "l2": 1, "layer_norm": 2}


def grad_in_forward(device: torch.device, reduction: int, need_grad: bool) -> bool:
    """Whether forward leaves the gradient for an upstream of 1, so that backward only scales it; else backward recomputes.

    The gradients of the attention families are small beside the N^2 work that leads to them, so on the CPU one pass does both.
    That needs a scalar loss: with reduction "none" every row has its own upstream gradient. On a GPU recomputing is cheaper.
    """
    return need_grad and reduction != REDUCTION["none"] and device.type == "cpu"


def loss_shape(reduction: int, rows: tuple) -> tuple:
    return rows if reduction == REDUCTION["none"] else ()


def define(schema: str) -> None:
    """Adds `name(arguments) -> results`; pt2_compliant: fakes and autograd are registered beside it."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def forbid_double_backward(op: str) -> None:
    """Backward ops are not differentiable: asking for a second derivative says so instead of returning zeros."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"kdkernels.{op}: double backward is not supported by the fused kernels; use float64 inputs or "
            f"kdkernels.reference.{op}, which are plain torch"
        )

    torch.library.register_autograd(f"kdkernels::{op}_backward", backward, lib=LIBRARY)
