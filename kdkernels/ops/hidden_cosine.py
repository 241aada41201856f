"""hidden_cosine: schema, fake and autograd. Backward reads both states again and nothing is saved."""

import torch

from ._common import LIBRARY, define, forbid_double_backward, register_autograd, run_backward

_INPUTS = "Tensor[] student, Tensor[] teacher, Tensor? mask"

define(f"hidden_cosine({_INPUTS}) -> Tensor")
define(f"hidden_cosine_backward(Tensor grad, {_INPUTS}) -> Tensor[]")


@torch.library.register_fake("kdkernels::hidden_cosine", lib=LIBRARY)
def _(student, teacher, mask):
    return student[0].new_empty((), dtype=torch.float32)


@torch.library.register_fake("kdkernels::hidden_cosine_backward", lib=LIBRARY)
def _(grad, student, teacher, mask):
    return [x.new_empty(x.shape) for x in student]


def _setup_context(ctx, inputs, output):
    student, teacher, mask = inputs
    ctx.layers = len(student)
    ctx.save_for_backward(*student, *teacher, mask)


def _backward(ctx, grad):
    *states, mask = ctx.saved_tensors
    student, teacher = states[: ctx.layers], states[ctx.layers :]
    return run_backward(torch.ops.kdkernels.hidden_cosine_backward.default, grad, student, teacher, mask)


call = register_autograd("hidden_cosine", (0,), _setup_context, _backward)
forbid_double_backward("hidden_cosine")
