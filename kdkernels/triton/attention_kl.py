"""attention_kl on CUDA: KL between attention maps from queries and keys; the tiles are in _attention.py.

One pass forward; backward recomputes the scores in two launches, dQ by tiles of queries and dK by tiles of keys.
"""

from ..ops._common import HEAD_REDUCTION, KIND
from . import _attention
from ._common import register
from ._heads import new_gradient, sequences_of

_LOSS = {KIND["kl"]: _attention.KL, KIND["reverse_kl"]: _attention.REVERSE_KL}


def _maps(
    q_s, k_s, q_t, k_t, mask, cu_seqlens, bias_s, bias_t, lse_s, lse_t,
    max_seqlen, temperature, scale_s, scale_t, kind, head_reduction, head_map, causal,
):  # fmt: skip
    mean = head_reduction == HEAD_REDUCTION["mean"]
    by_s, by_t = (1 / temperature / (q.shape[1] if mean else 1) for q in (q_s, q_t))
    return _attention.Maps(
        *(q_s, k_s, q_t, k_t, sequences_of(q_s, mask, cu_seqlens, max_seqlen), _LOSS[kind]),
        *(scale_s * by_s, scale_t * by_t),
        joined=head_reduction != HEAD_REDUCTION[None],
        head_map=tuple(head_map),
        causal=causal,
        bias_s=bias_s,
        bias_t=bias_t,
        bias_factor_s=by_s,
        bias_factor_t=by_t,
        lse_s=lse_s,
        lse_t=lse_t,
    )


def attention_kl(*arguments):
    *described, reduction, need_grad = arguments
    loss, stats = _attention.forward(_maps(*described), reduction, need_grad)
    return loss, stats.new_empty(0), stats.new_empty(0), stats


def attention_kl_backward(grad, *arguments):
    inputs, (_, _, stats), scalars, reduction = arguments[:10], arguments[10:13], arguments[13:-1], arguments[-1]
    maps = _maps(*inputs, *scalars)
    gradients = [new_gradient(x, maps.sequences.packed) for x in inputs[:2]]
    _attention.backward(maps, grad, stats, reduction, *gradients)
    return tuple(gradients)


register("attention_kl", attention_kl)
register("attention_kl_backward", attention_kl_backward)
