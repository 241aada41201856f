"""topk_kd_loss: schema, fake and autograd. Backward reads the logits again, and what forward left of each row: its
K + 1 outcomes on both sides and a few statistics."""

import torch

from ._common import LIBRARY, define, forbid_double_backward, loss_shape, register_autograd, run_backward

_INPUTS = "Tensor student, Tensor values, Tensor indices, Tensor? mask, Tensor? labels, Tensor? row_temperature"
_SAVED = "Tensor named, Tensor stats, Tensor rest"
_SCALARS = (
    "int tail, int kind, float temperature, bool scale_t2, float beta, float alpha, int ignore_index, int reduction"
)

define(f"topk_kd_loss({_INPUTS}, {_SCALARS}) -> (Tensor loss, {_SAVED})")
define(f"topk_kd_loss_backward(Tensor grad, {_INPUTS}, {_SAVED}, {_SCALARS}) -> Tensor")


@torch.library.register_fake("kdkernels::topk_kd_loss", lib=LIBRARY)
def _(student, values, *rest):
    reduction = rest[-1]
    outer, inner, _ = student.shape
    rows = outer * inner

    def new(*shape):
        return student.new_empty(shape, dtype=torch.float32)

    return new(*loss_shape(reduction, (outer, inner))), new(2, rows, values.shape[2] + 1), new(rows, 8), new(rows, 4)


@torch.library.register_fake("kdkernels::topk_kd_loss_backward", lib=LIBRARY)
def _(grad, student, *rest):
    return student.new_empty(student.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.scalars = inputs[6:]


def _backward(ctx, grad):
    return (run_backward(torch.ops.kdkernels.topk_kd_loss_backward.default, grad, *ctx.saved_tensors, *ctx.scalars),)


call = register_autograd("topk_kd_loss", (0,), _setup_context, _backward)
forbid_double_backward("topk_kd_loss")
