"""hidden_mse: schema, fake and autograd, for a list of layers in one call.

Without a projection backward reads both states again and nothing is saved. With one, the gradients come from the
forward pass, where the residual W s + b - t is still in cache, and backward scales them.
"""

import torch

from ._common import LIBRARY, define, forbid_double_backward, register_autograd, run_backward

_INPUTS = "Tensor[] student, Tensor[] teacher, Tensor? mask, Tensor[] weight, Tensor[] bias"

define(f"hidden_mse({_INPUTS}, int normalize, bool need_grad) -> (Tensor loss, Tensor[] saved)")
define(f"hidden_mse_backward(Tensor grad, {_INPUTS}, Tensor[] saved, int normalize) -> Tensor[]")


@torch.library.register_fake("kdkernels::hidden_mse", lib=LIBRARY)
def _(student, teacher, mask, weight, bias, normalize, need_grad):
    keep = weight and need_grad
    saved = [x.new_empty(x.shape, dtype=torch.float32) for x in (*student, *weight, *bias)] if keep else []
    return student[0].new_empty((), dtype=torch.float32), saved


@torch.library.register_fake("kdkernels::hidden_mse_backward", lib=LIBRARY)
def _(grad, student, teacher, mask, weight, bias, saved, normalize):
    return [x.new_empty(x.shape) for x in (*student, *weight, *bias)]


def _setup_context(ctx, inputs, output):
    student, teacher, mask, weight, bias, ctx.normalize, _ = inputs
    saved = output[1]
    ctx.lengths = len(student), len(weight), len(bias), len(saved)
    ctx.save_for_backward(*student, *teacher, *weight, *bias, *saved, mask)


def _backward(ctx, grad):
    layers, weights, biases, saved = ctx.lengths
    *tensors, mask = ctx.saved_tensors
    student, teacher, weight, bias, kept = _split(tensors, (layers, layers, weights, biases, saved))
    return run_backward(
        torch.ops.kdkernels.hidden_mse_backward.default, grad, student, teacher, mask, weight, bias, kept, ctx.normalize
    )


def _split(tensors, lengths):
    """One flat list -> lists of the given lengths."""
    tensors = iter(tensors)
    return [[next(tensors) for _ in range(n)] for n in lengths]


call = register_autograd("hidden_mse", (0, 3, 4), _setup_context, _backward)
forbid_double_backward("hidden_mse")
