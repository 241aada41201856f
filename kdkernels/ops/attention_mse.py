"""attention_mse: schema, fake and autograd."""

import torch

from ._common import (
    LIBRARY,
    ON,
    REDUCTION,
    define,
    forbid_double_backward,
    grad_in_forward,
    register_autograd,
    run_backward,
)
from .attention_kl import saved_tensors

_INPUTS = "Tensor q_s, Tensor k_s, Tensor q_t, Tensor k_t, Tensor? mask, Tensor? cu_seqlens"
_SAVED = "Tensor grad_q, Tensor grad_k, Tensor stats"
_SCALARS = "SymInt max_seqlen, int on, float scale_s, float scale_t"

define(f"attention_mse({_INPUTS}, {_SCALARS}, bool need_grad) -> (Tensor loss, {_SAVED})")
define(f"attention_mse_backward(Tensor grad, {_INPUTS}, {_SAVED}, {_SCALARS}) -> (Tensor, Tensor)")


@torch.library.register_fake("kdkernels::attention_mse", lib=LIBRARY)
def _(q_s, k_s, q_t, k_t, mask, cu_seqlens, max_seqlen, on, scale_s, scale_t, need_grad):
    loss, rows = q_s.new_empty((), dtype=torch.float32), q_s.shape[:-1]
    grad_q, grad_k, stats = saved_tensors(q_s, k_s, rows, REDUCTION["mean"], need_grad)
    if need_grad and on == ON["scores"]:  # the Gram matrices of the keys and of the queries
        grad_q, grad_k = (q_s.new_empty(0, dtype=torch.float32) for _ in range(2))
        sequences, d_s = q_s.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, q_s.shape[-1]
        stats = q_s.new_empty((2, sequences, q_s.shape[1], d_s + q_t.shape[-1], d_s), dtype=torch.float64)
    elif need_grad and not grad_in_forward(q_s.device, REDUCTION["mean"], need_grad):
        # max and 1 / sum of both maps, and the row's sum in the derivative of the softmax
        stats = q_s.new_empty((*rows, 5), dtype=torch.float32)
    return loss, grad_q, grad_k, stats


@torch.library.register_fake("kdkernels::attention_mse_backward", lib=LIBRARY)
def _(grad, q_s, k_s, *rest):
    return q_s.new_empty(q_s.shape), k_s.new_empty(k_s.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.scalars = inputs[6:10]


def _backward(ctx, grad):
    return run_backward(torch.ops.kdkernels.attention_mse_backward.default, grad, *ctx.saved_tensors, *ctx.scalars)


call = register_autograd("attention_mse", (0, 1), _setup_context, _backward)
forbid_double_backward("attention_mse")
