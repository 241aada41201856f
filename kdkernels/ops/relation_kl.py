"""relation_kl: schema, fake and autograd. Queries and keys are the same tensor, so its gradient is one tensor too."""

import torch

from ._common import (
    LIBRARY,
    define,
    forbid_double_backward,
    grad_in_forward,
    loss_shape,
    register_autograd,
    run_backward,
)

_INPUTS = "Tensor student, Tensor teacher, Tensor? mask, Tensor? cu_seqlens"
_SAVED = "Tensor grad_student, Tensor stats"
_SCALARS = "SymInt max_seqlen, int num_heads, int reduction"

define(f"relation_kl({_INPUTS}, {_SCALARS}, bool need_grad) -> (Tensor loss, {_SAVED})")
define(f"relation_kl_backward(Tensor grad, {_INPUTS}, {_SAVED}, {_SCALARS}) -> Tensor")


@torch.library.register_fake("kdkernels::relation_kl", lib=LIBRARY)
def _(student, teacher, mask, cu_seqlens, max_seqlen, num_heads, reduction, need_grad):
    rows = (*student.shape[:1], num_heads, *student.shape[1:-1])
    loss = student.new_empty(loss_shape(reduction, rows), dtype=torch.float32)
    kept = grad_in_forward(student.device, reduction, need_grad)
    grad = student.new_empty(student.shape if kept else 0, dtype=torch.float32)
    recompute = need_grad and not kept and student.device.type != "cpu"
    stats = student.new_empty((*rows, 4) if recompute else 0, dtype=torch.float32)
    return loss, grad, stats


@torch.library.register_fake("kdkernels::relation_kl_backward", lib=LIBRARY)
def _(grad, student, *rest):
    return student.new_empty(student.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.scalars = inputs[4:7]


def _backward(ctx, grad):
    return (run_backward(torch.ops.kdkernels.relation_kl_backward.default, grad, *ctx.saved_tensors, *ctx.scalars),)


call = register_autograd("relation_kl", (0,), _setup_context, _backward)
forbid_double_backward("relation_kl")
