"""What the op families share: the library, the enums that cross the C++ boundary, and how backward is served."""

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


def register_autograd(op: str, setup_context, backward) -> None:
    """torch.library.register_autograd for ops whose arguments are tensors, lists of them and plain values, all given.

    torch's own also fills in schema defaults at each call, which took 36 of the 95 us of a small kd_loss forward and
    backward. As there, the kernel runs one autograd.Function, which sees tensors only where they are arguments of their
    own, so lists are laid out flat, and calls the op again below autograd. `backward(ctx, *grads)` returns a gradient,
    or a list of them, for every argument; None where there is none, also for a whole list.
    """
    overload = getattr(torch.ops.kdkernels, op).default

    def forward(ctx, keyset, lengths, *flat):
        args = _nest(flat, lengths)
        with torch._C._AutoDispatchBelowAutograd():
            output = overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        ctx.set_materialize_grads(False)
        ctx.argument_lengths = lengths
        setup_context(ctx, args, output)
        return output

    def all_gradients(ctx, *grads):
        pairs = zip(backward(ctx, *grads), ctx.argument_lengths, strict=True)
        return None, None, *_flatten([None] * n if grad is None and n is not None else grad for grad, n in pairs)

    members = {"forward": staticmethod(forward), "backward": staticmethod(all_gradients)}
    function = type(f"{op}_autograd", (torch.autograd.Function,), members)

    def kernel(keyset, *args):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            lengths = [len(arg) if isinstance(arg, (list, tuple)) else None for arg in args]
            return function.apply(keyset, lengths, *_flatten(args))
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    LIBRARY.impl(op, kernel, "Autograd", with_keyset=True)


def run_backward(overload, *args):
    """Calls a backward op; past autograd, which takes 8 us, where nobody asks for a second derivative.

    Here and not around `backward`: reading ctx.saved_tensors may run the forward pass again (torch.utils.checkpoint),
    which autograd has to see.
    """
    if torch.is_grad_enabled():
        return overload(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*args)


def _flatten(values) -> list:
    return [x for value in values for x in (value if isinstance(value, (list, tuple)) else (value,))]


def _nest(flat, lengths) -> list:
    """Undoes `_flatten`; lengths holds None for a value that was no list."""
    values = iter(flat)
    return [next(values) if n is None else [next(values) for _ in range(n)] for n in lengths]


def forbid_double_backward(op: str) -> None:
    """Backward ops are not differentiable: asking for a second derivative says so instead of returning zeros."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"kdkernels.{op}: double backward is not supported by the fused kernels; use float64 inputs or "
            f"kdkernels.reference.{op}, which are plain torch"
        )

    torch.library.register_autograd(f"kdkernels::{op}_backward", backward, lib=LIBRARY)
