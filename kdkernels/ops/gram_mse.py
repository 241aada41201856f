"""gram_mse: schema, fake and autograd. s1 = t1 = None: both products are of one layer with itself.

The gradients are small beside the work that leads to them, so on the CPU forward makes them on the way, tile by tile,
and backward scales them, in place if they are float32; on a GPU backward makes the tiles again and nothing is saved.
"""

import torch

from ._common import (
    LIBRARY,
    REDUCTION,
    define,
    forbid_double_backward,
    grad_in_forward,
    keep_grads,
    register_autograd,
    run_backward,
    scaled_grads,
)

_INPUTS = "Tensor s0, Tensor? s1, Tensor t0, Tensor? t1, Tensor? mask"

define(f"gram_mse({_INPUTS}, int over, bool need_grad) -> (Tensor loss, Tensor[] saved)")
define(f"gram_mse_backward(Tensor grad, {_INPUTS}, Tensor[] saved, int over) -> Tensor[]")


@torch.library.register_fake("kdkernels::gram_mse", lib=LIBRARY)
def _(s0, s1, t0, t1, mask, over, need_grad):
    keep = grad_in_forward(s0.device, REDUCTION["mean"], need_grad)
    saved = [x.new_empty(x.shape, dtype=torch.float32) for x in (s0, s1) if keep and x is not None]
    return s0.new_empty((), dtype=torch.float32), saved


@torch.library.register_fake("kdkernels::gram_mse_backward", lib=LIBRARY)
def _(grad, s0, s1, t0, t1, mask, saved, over):
    return [x.new_empty(x.shape) for x in (s0, s1) if x is not None]


def _setup_context(ctx, inputs, output):
    kept = keep_grads(ctx, output[1], [x for x in inputs[:2] if x is not None])
    ctx.save_for_backward(*inputs[:5], *(() if kept else output[1]))
    ctx.over = inputs[5]


def _backward(ctx, grad):
    grads = scaled_grads(ctx, grad)
    if not grads:
        kept = ctx.saved_tensors  # once: a checkpoint hands each out a single time
        inputs, saved = kept[:5], list(kept[5:])
        if not saved and grad_in_forward(inputs[0].device, REDUCTION["mean"], True):  # the first backward had them
            saved = torch.ops.kdkernels.gram_mse.default(*inputs, ctx.over, True)[1]
        grads = run_backward(torch.ops.kdkernels.gram_mse_backward.default, grad, *inputs, saved, ctx.over)
    return (*grads, None)[:2]


call = register_autograd("gram_mse", (0, 1), _setup_context, _backward)
forbid_double_backward("gram_mse")
