"""What the op families share: the library, the enums that cross the C++ boundary, and how backward is served."""

from functools import partial

import torch
from torch.library import Library

LIBRARY = Library("kdkernels", "DEF")

KIND = {"kl": 0, "ce": 1, "reverse_kl": 2, "jsd": 3, "tv": 4}
REDUCTION = {"none": 0, "sum": 1, "mean": 2, "batchmean": 3}
ON = {"scores": 0, "probs": 1}
HEAD_REDUCTION = {None: 0, "sum": 1, "mean": 2}
NORMALIZE = {None: 0, "l2": 1, "layer_norm": 2}
TAIL = {"renormalize": 0, "bucket": 1}
OVER = {"hidden": 0, "token": 1}
VARIANCE = {"absolute": 0, "squared": 1}


def grad_in_forward(device: torch.device, reduction: int, need_grad: bool) -> bool:
    """Whether forward leaves the gradient for an upstream of 1, so that backward only scales it; else backward
    recomputes.

    The gradients of the attention families are small beside the N^2 work that leads to them, so on the CPU one pass
    does both. That needs a scalar loss: with reduction "none" every row has its own upstream gradient. On a GPU
    recomputing is cheaper.
    """
    return need_grad and reduction != REDUCTION["none"] and device.type == "cpu"


def loss_shape(reduction: int, rows: tuple) -> tuple:
    return rows if reduction == REDUCTION["none"] else ()


def define(schema: str) -> None:
    """Adds `name(arguments) -> results`; pt2_compliant: fakes and autograd are registered beside it."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def register_autograd(op: str, differentiable: tuple, setup_context, backward):
    """Gives an op its gradient and returns it as a function, which is what the public losses call.

    `differentiable`: the positions of the arguments that may have a gradient, each a tensor, a list of them or None.
    `backward(ctx, grad)`, with the gradient of the op's first output, returns theirs, those of lists in line.

    The function leaves out the way through the dispatcher to an Autograd kernel in Python and back, which took 30 of
    the 130 us of a small kd_loss forward and backward. Tracing has to see the op, and anyone may call it, so it has
    that kernel too. As torch.library.register_autograd's does, it runs one autograd.Function, which calls the op below
    autograd; it leaves out filling in the schema's defaults, which took 36 us more.
    """
    overload = getattr(torch.ops.kdkernels, op).default

    def forward(ctx, below, args, *students):  # autograd sees only tensors that are arguments of their own
        with torch._C._AutoDispatchBelowAutograd():
            output = below(*args)
        ctx.set_materialize_grads(False)
        setup_context(ctx, args, output)
        return output

    def gradients(ctx, grad, *_):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        return None, None, *backward(ctx, grad)

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function = type(f"{op}_autograd", (torch.autograd.Function,), members)

    def run(below, args):
        if torch.is_grad_enabled():
            students = [x for i in differentiable for x in (args[i] if isinstance(args[i], list) else (args[i],))]
            if torch._C._any_requires_grad(*students):
                return function.apply(below, args, *students)
        with torch._C._AutoDispatchBelowAutograd():
            return below(*args)

    def kernel(keyset, *args):
        return run(partial(overload.redispatch, keyset & torch._C._after_autograd_keyset), args)

    LIBRARY.impl(op, kernel, "Autograd", with_keyset=True)

    def call(*args):
        return overload(*args) if torch.compiler.is_compiling() else run(overload, args)

    return call


def keep_grads(ctx, grads: list, students: list) -> bool:
    """Keeps what forward left, the gradients for an upstream gradient of 1, for backward to scale in place.

    False where that cannot be: gradients are of another dtype than the student's, or this is tracing, which must not
    see a result of forward change later.
    """
    alike = (type(x) is torch.Tensor and x.dtype == s.dtype for x, s in zip(grads, students, strict=False))
    ctx.grads = grads if all(alike) else []
    return len(ctx.grads) > 0


def scaled_grads(ctx, grad) -> list:
    """What `keep_grads` kept, scaled; empty in a second backward, and where a second derivative is asked for."""
    grads, ctx.grads = ctx.grads, []
    if torch.is_grad_enabled():
        return []
    for x in grads:
        x.mul_(grad)
    return grads


def run_backward(overload, *args):
    """Calls a backward op; past autograd, which takes 8 us, where nobody asks for a second derivative.

    Here and not around `backward`: reading ctx.saved_tensors may run the forward pass again (torch.utils.checkpoint),
    which autograd has to see.
    """
    if torch.is_grad_enabled():
        return overload(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*args)


def forbid_double_backward(op: str) -> None:
    """Backward ops are not differentiable: asking for a second derivative says so instead of returning zeros."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"kdkernels.{op}: double backward is not supported by the fused kernels; use float64 inputs or "
            f"kdkernels.reference.{op}, which are plain torch"
        )

    torch.library.register_autograd(f"kdkernels::{op}_backward", backward, lib=LIBRARY)
