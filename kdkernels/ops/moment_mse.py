"""moment_mse: schema, fake and autograd. Forward leaves three numbers a row, from which backward needs no teacher."""

import torch

from ._common import LIBRARY, define, forbid_double_backward, register_autograd, run_backward

define(
    "moment_mse(Tensor[] student, Tensor[] teacher, Tensor? mask, float mean_weight, float variance_weight, "
    "int variance, bool need_grad) -> (Tensor loss, Tensor stats)"
)
define("moment_mse_backward(Tensor grad, Tensor[] student, Tensor? mask, Tensor stats) -> Tensor[]")


@torch.library.register_fake("kdkernels::moment_mse", lib=LIBRARY)
def _(student, teacher, mask, mean_weight, variance_weight, variance, need_grad):
    rows = len(student) * student[0].shape[0] * student[0].shape[1] if need_grad else 0
    new = student[0].new_empty
    return new((), dtype=torch.float32), new((rows, 3), dtype=torch.float32)


@torch.library.register_fake("kdkernels::moment_mse_backward", lib=LIBRARY)
def _(grad, student, mask, stats):
    return [x.new_empty(x.shape) for x in student]


def _setup_context(ctx, inputs, output):
    student, _, mask = inputs[:3]
    ctx.save_for_backward(*student, mask, output[1])


def _backward(ctx, grad):
    *student, mask, stats = ctx.saved_tensors
    return run_backward(torch.ops.kdkernels.moment_mse_backward.default, grad, student, mask, stats)


call = register_autograd("moment_mse", (0,), _setup_context, _backward)
forbid_double_backward("moment_mse")
