"""attention_kl on CUDA: KL(teacher map || student map) from queries and keys; the tiles are in _attention.py.

One pass forward; backward recomputes the scores in two launches, dQ by tiles of queries and dK by tiles of keys.
"""

from . import _attention
from ._common import register


def attention_kl(q_s, k_s, q_t, k_t, mask, temperature, scale_s, scale_t, reduction, need_grad):
    loss, stats = _attention.forward(
        q_s, k_s, q_t, k_t, mask, _attention.KL, scale_s / temperature, scale_t / temperature, reduction, need_grad
    )
    return loss, stats.new_empty(0), stats.new_empty(0), stats


def attention_kl_backward(
    grad, q_s, k_s, q_t, k_t, mask, grad_q, grad_k, stats, temperature, scale_s, scale_t, reduction
):
    d_q, d_k = q_s.new_empty(q_s.shape), k_s.new_empty(k_s.shape)
    scales = scale_s / temperature, scale_t / temperature
    _attention.backward(grad, q_s, k_s, q_t, k_t, mask, stats, _attention.KL, *scales, reduction, d_q, d_k)
    return d_q, d_k


register("attention_kl", attention_kl)
register("attention_kl_backward", attention_kl_backward)
