"""kd_loss: schema, fake and autograd. Backward recomputes from the logits and 32 bytes a row of statistics."""

import torch

from ._common import LIBRARY, define, forbid_double_backward, loss_shape, register_autograd, run_backward

_SCALARS = "int kind, float temperature, bool scale_t2, float beta, float alpha, int ignore_index, int reduction"
_INPUTS = "Tensor student, Tensor teacher, Tensor? mask, Tensor? labels, Tensor? row_temperature"

define(f"kd_loss({_INPUTS}, {_SCALARS}) -> (Tensor loss, Tensor stats)")
define(f"kd_loss_backward(Tensor grad, {_INPUTS}, Tensor stats, {_SCALARS}) -> Tensor")


@torch.library.register_fake("kdkernels::kd_loss", lib=LIBRARY)
def _(
    student, teacher, mask, labels, row_temperature, kind, temperature, scale_t2, beta, alpha, ignore_index, reduction
):
    outer, inner, _ = student.shape
    loss = student.new_empty(loss_shape(reduction, (outer, inner)), dtype=torch.float32)
    return loss, student.new_empty((outer * inner, 8), dtype=torch.float32)


@torch.library.register_fake("kdkernels::kd_loss_backward", lib=LIBRARY)
def _(grad, student, *rest):
    return student.new_empty(student.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.scalars = inputs[5:]


def _backward(ctx, grad):
    return (run_backward(torch.ops.kdkernels.kd_loss_backward.default, grad, *ctx.saved_tensors, *ctx.scalars),)


call = register_autograd("kd_loss", (0,), _setup_context, _backward)
forbid_double_backward("kd_loss")
