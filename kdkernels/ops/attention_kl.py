"""attention_kl: schema, fake and autograd. Packed batches have q and k [tokens, heads, d] and cu_seqlens."""

import torch

from ._common import (
    HEAD_REDUCTION,
    LIBRARY,
    define,
    forbid_double_backward,
    grad_in_forward,
    loss_shape,
    register_autograd,
    run_backward,
)

_INPUTS = (
    "Tensor q_s, Tensor k_s, Tensor q_t, Tensor k_t, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor? bias_s, Tensor? bias_t, Tensor? lse_s, Tensor? lse_t"
)
_SAVED = "Tensor grad_q, Tensor grad_k, Tensor stats"
_SCALARS = (
    "SymInt max_seqlen, float temperature, float scale_s, float scale_t, int kind, int head_reduction, int[] head_map, "
    "bool causal, int reduction"
)

define(f"attention_kl({_INPUTS}, {_SCALARS}, bool need_grad) -> (Tensor loss, {_SAVED})")
define(f"attention_kl_backward(Tensor grad, {_INPUTS}, {_SAVED}, {_SCALARS}) -> (Tensor, Tensor)")


def saved_tensors(q_s, k_s, rows, reduction, need_grad):
    """Fake outputs for backward: the gradients, or the statistics to recompute them from; the others are empty."""
    kept = grad_in_forward(q_s.device, reduction, need_grad)
    empty = q_s.new_empty(0, dtype=torch.float32)
    grads = (
        [x.new_empty(x.shape, dtype=torch.float32) for x in (q_s, k_s)] if kept else [empty, torch.empty_like(empty)]
    )
    recompute = need_grad and not kept and q_s.device.type != "cpu"  # the CPU makes the maps again from nothing
    stats = q_s.new_empty((*rows, 4) if recompute else 0, dtype=torch.float32)
    return *grads, stats


@torch.library.register_fake("kdkernels::attention_kl", lib=LIBRARY)
def _(q_s, k_s, *rest):
    head_reduction, _, _, reduction, need_grad = rest[-5:]
    rows = tuple(q_s.shape[:-1])
    if head_reduction != HEAD_REDUCTION[None]:
        rows = (rows[0], *rows[2:])
    loss = q_s.new_empty(loss_shape(reduction, rows), dtype=torch.float32)
    return loss, *saved_tensors(q_s, k_s, rows, reduction, need_grad)


@torch.library.register_fake("kdkernels::attention_kl_backward", lib=LIBRARY)
def _(grad, q_s, k_s, *rest):
    return q_s.new_empty(q_s.shape), k_s.new_empty(k_s.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:10], *output[1:])
    ctx.scalars = inputs[10:19]


def _backward(ctx, grad):
    return run_backward(torch.ops.kdkernels.attention_kl_backward.default, grad, *ctx.saved_tensors, *ctx.scalars)


call = register_autograd("attention_kl", (0, 1), _setup_context, _backward)
forbid_double_backward("attention_kl")
