"""attention_map_mse: schema, fake and autograd. Backward reads the maps again: nothing is kept."""

import torch

from ._common import LIBRARY, define, forbid_double_backward, register_autograd, run_backward

_INPUTS = "Tensor student, Tensor teacher, Tensor? mask, int head_reduction"

define(f"attention_map_mse({_INPUTS}) -> Tensor")
define(f"attention_map_mse_backward(Tensor grad, {_INPUTS}) -> Tensor")


@torch.library.register_fake("kdkernels::attention_map_mse", lib=LIBRARY)
def _(student, teacher, mask, head_reduction):
    return student.new_empty((), dtype=torch.float32)


@torch.library.register_fake("kdkernels::attention_map_mse_backward", lib=LIBRARY)
def _(grad, student, *rest):
    return student.new_empty(student.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.head_reduction = inputs[3]


def _backward(ctx, grad):
    overload = torch.ops.kdkernels.attention_map_mse_backward.default
    return (run_backward(overload, grad, *ctx.saved_tensors, ctx.head_reduction),)


call = register_autograd("attention_map_mse", (0,), _setup_context, _backward)
forbid_double_backward("attention_map_mse")
