"""attention_map_kl: schema, fake and autograd. Backward recomputes from the scores and 16 bytes a row of statistics."""

import torch

from ._common import LIBRARY, define, forbid_double_backward, loss_shape, register_autograd, run_backward

_INPUTS = "Tensor student, Tensor teacher, Tensor? mask"
_SCALARS = "float temperature, int head_reduction, int reduction"

define(f"attention_map_kl({_INPUTS}, {_SCALARS}) -> (Tensor loss, Tensor stats)")
define(f"attention_map_kl_backward(Tensor grad, {_INPUTS}, Tensor stats, {_SCALARS}) -> Tensor")


@torch.library.register_fake("kdkernels::attention_map_kl", lib=LIBRARY)
def _(student, teacher, mask, temperature, head_reduction, reduction):
    batch, heads, tokens, _ = student.shape
    rows = (batch, tokens) if head_reduction else (batch, heads, tokens)
    stats = student.new_empty((batch, 1 if head_reduction else heads, tokens, 4), dtype=torch.float32)
    return student.new_empty(loss_shape(reduction, rows), dtype=torch.float32), stats


@torch.library.register_fake("kdkernels::attention_map_kl_backward", lib=LIBRARY)
def _(grad, student, *rest):
    return student.new_empty(student.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.scalars = inputs[3:]


def _backward(ctx, grad):
    overload = torch.ops.kdkernels.attention_map_kl_backward.default
    return (run_backward(overload, grad, *ctx.saved_tensors, *ctx.scalars),)


call = register_autograd("attention_map_kl", (0,), _setup_context, _backward)
forbid_double_backward("attention_map_kl")
