"""linear_kd_loss: schema, fake and autograd.

For a scalar loss forward leaves the gradients in float32 up to a factor, which backward applies: making the logits
again would cost more than half of all products. With reduction "none" every row has its own upstream gradient, which
has to be folded in before the products, and backward makes the logits again.
"""

import torch

from ._common import LIBRARY, REDUCTION, define, forbid_double_backward, loss_shape, register_autograd, run_backward

_INPUTS = (
    "Tensor student, Tensor student_weight, Tensor? student_bias, Tensor teacher, Tensor teacher_weight, "
    "Tensor? teacher_bias, Tensor? mask, Tensor? labels, Tensor? row_temperature"
)
_SAVED = "Tensor d_student, Tensor d_weight, Tensor d_bias"
_SCALARS = "int kind, float temperature, bool scale_t2, float beta, float alpha, int ignore_index, int reduction"

define(f"linear_kd_loss({_INPUTS}, {_SCALARS}, bool need_grad) -> (Tensor loss, {_SAVED})")
define(f"linear_kd_loss_backward(Tensor grad, {_INPUTS}, {_SAVED}, {_SCALARS}) -> (Tensor, Tensor, Tensor)")


@torch.library.register_fake("kdkernels::linear_kd_loss", lib=LIBRARY)
def _(student, weight, bias, *rest):
    reduction, need_grad = rest[-2:]
    kept = need_grad and reduction != REDUCTION["none"]

    def saved(x):
        return student.new_empty(x.shape if kept and x is not None else 0, dtype=torch.float32)

    loss = student.new_empty(loss_shape(reduction, tuple(student.shape[:2])), dtype=torch.float32)
    return loss, saved(student), saved(weight), saved(bias)


@torch.library.register_fake("kdkernels::linear_kd_loss_backward", lib=LIBRARY)
def _(grad, student, weight, bias, *rest):
    of_bias = student.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return student.new_empty(student.shape), weight.new_empty(weight.shape), of_bias


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.scalars = inputs[9:16]


def _backward(ctx, grad):
    saved = ctx.saved_tensors
    overload = torch.ops.kdkernels.linear_kd_loss_backward.default
    d_student, d_weight, d_bias = run_backward(overload, grad, *saved, *ctx.scalars)
    return d_student, d_weight, None if saved[2] is None else d_bias


call = register_autograd("linear_kd_loss", (0, 1, 2), _setup_context, _backward)
forbid_double_backward("linear_kd_loss")
