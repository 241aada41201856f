"""hidden_cosine: schema, fake and autograd.

With `need_grad` forward leaves the gradients for an upstream gradient of 1 on the CPU, and the first backward scales
them in place; else, and in a second backward, both states are read again.
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

_INPUTS = "Tensor[] student, Tensor[] teacher, Tensor? mask"

define(f"hidden_cosine({_INPUTS}, bool need_grad) -> (Tensor loss, Tensor[] grads)")
define(f"hidden_cosine_backward(Tensor grad, {_INPUTS}) -> Tensor[]")


@torch.library.register_fake("kdkernels::hidden_cosine", lib=LIBRARY)
def _(student, teacher, mask, need_grad):
    loss = student[0].new_empty((), dtype=torch.float32)
    kept = grad_in_forward(student[0].device, REDUCTION["mean"], need_grad)
    return loss, [x.new_empty(x.shape) for x in student] if kept else []


@torch.library.register_fake("kdkernels::hidden_cosine_backward", lib=LIBRARY)
def _(grad, student, teacher, mask):
    return [x.new_empty(x.shape) for x in student]


def _setup_context(ctx, inputs, output):
    student, teacher, mask, _ = inputs
    ctx.layers = len(student)
    keep_grads(ctx, output[1], student)
    ctx.save_for_backward(*student, *teacher, mask)


def _backward(ctx, grad):
    if grads := scaled_grads(ctx, grad):
        return grads
    *states, mask = ctx.saved_tensors
    student, teacher = states[: ctx.layers], states[ctx.layers :]
    return run_backward(torch.ops.kdkernels.hidden_cosine_backward.default, grad, student, teacher, mask)


call = register_autograd("hidden_cosine", (0,), _setup_context, _backward)
forbid_double_backward("hidden_cosine")
