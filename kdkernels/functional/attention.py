"""Losses on attention maps and relations, straight from queries and keys."""

import torch

from .. import _checks, reference
from .._load import serves
from ..ops._common import ON
from ._common import ROW_REDUCTION, any_fp64, need_grad


def attention_kl(q_s, k_s, q_t, k_t, mask=None, *, temperature=1.0, scale_s=None, scale_t=None, reduction="batchmean"):
    """KL(teacher map || student map) straight from queries and keys (MiniLM, arXiv 2002.10957), memory linear in N.

    Args:
        q_s, k_s: the student's queries and keys [B, H, N, d_s].
        q_t, k_t: the teacher's [B, H, N, d_t]; d_t may differ from d_s.
        mask: [B, N].
        temperature: divides the scores; a number > 0. No T^2.
        scale_s, scale_t: what multiplies q k^T; None = 1 / sqrt(d).
        reduction: "batchmean" (rows are real (batch, head, query)), "sum" or "none" ([B, H, N]).

    Returns: a scalar or [B, H, N]; float32 (float64 for float64 inputs).
    """
    scale_s, scale_t = _check_attention(q_s, k_s, q_t, k_t, scale_s, scale_t)
    mask = _checks.mask(mask, (q_s.shape[0], q_s.shape[2]), q_s, "[batch, tokens]")
    reduction_id = _checks.choice("reduction", reduction, ROW_REDUCTION)
    temperature = _checks.number("temperature", temperature, above=0)
    if any_fp64(q_s, k_s, q_t, k_t) or not serves("attention_kl", q_s.device):
        return reference.attention_kl(
            q_s, k_s, q_t, k_t, mask, temperature=temperature, scale_s=scale_s, scale_t=scale_t, reduction=reduction
        )
    return torch.ops.kdkernels.attention_kl.default(
        q_s, k_s, q_t, k_t, mask, temperature, scale_s, scale_t, reduction_id, need_grad(q_s, k_s)
    )[0]


def attention_mse(q_s, k_s, q_t, k_t, mask=None, *, on="scores", scale_s=None, scale_t=None):
    """Mean squared difference of two attention maps from queries and keys, mean over real (batch, head, query, key).

    on="scores" (TinyBERT, arXiv 1909.10351) costs O(N): |a Q_s K_s^T - b Q_t K_t^T|^2 is an inner product of two small
    Gram matrices. on="probs" compares the maps after the softmax, in memory linear in N.

    Args:
        q_s, k_s: the student's queries and keys [B, H, N, d_s].
        q_t, k_t: the teacher's [B, H, N, d_t]; d_t may differ from d_s.
        mask: [B, N].
        on: "scores" or "probs".
        scale_s, scale_t: what multiplies q k^T; None = 1 / sqrt(d).

    Returns: a scalar; float32 (float64 for float64 inputs).
    """
    scale_s, scale_t = _check_attention(q_s, k_s, q_t, k_t, scale_s, scale_t)
    mask = _checks.mask(mask, (q_s.shape[0], q_s.shape[2]), q_s, "[batch, tokens]")
    on_id = _checks.choice("on", on, ON)
    if any_fp64(q_s, k_s, q_t, k_t) or not serves("attention_mse", q_s.device):
        return reference.attention_mse(q_s, k_s, q_t, k_t, mask, on=on, scale_s=scale_s, scale_t=scale_t)
    return torch.ops.kdkernels.attention_mse.default(
        q_s, k_s, q_t, k_t, mask, on_id, scale_s, scale_t, need_grad(q_s, k_s)
    )[0]


def relation_kl(student, teacher, mask=None, *, num_heads, reduction="batchmean"):
    """Self-attention relations (MiniLMv2, arXiv 2012.15828): KL(softmax(T T^T / sqrt d) || softmax(S S^T / sqrt d)).

    Args:
        student: queries, keys or values of one layer with heads concatenated, [B, N, W_s].
        teacher: the same of the teacher, [B, N, W_t]; widths may differ.
        mask: [B, N].
        num_heads: relation heads that both widths are re-split into; it divides both.
        reduction: "batchmean" (rows are real (batch, head, token)), "sum" or "none" ([B, num_heads, N]).

    Returns: a scalar or [B, num_heads, N]; float32 (float64 for float64 inputs).
    """
    _checks.tensor("student", student, 3)
    _checks.tensor("teacher", teacher, 3)
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            "student and teacher must agree in batch and tokens; got student "
            f"{list(student.shape)}, teacher {list(teacher.shape)}"
        )
    _checks.teacher("teacher", teacher)
    _checks.same_device("student", student, teacher=teacher)
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads must be an integer >= 1, got {num_heads!r}")
    for name, width in (("student", student.shape[2]), ("teacher", teacher.shape[2])):
        if width == 0 or width % num_heads:
            raise ValueError(f"num_heads must divide both widths; {num_heads} does not divide the {name}'s {width}")
    mask = _checks.mask(mask, student.shape[:2], student, "[batch, tokens]")
    reduction_id = _checks.choice("reduction", reduction, ROW_REDUCTION)
    if any_fp64(student, teacher) or not serves("relation_kl", student.device):
        return reference.relation_kl(student, teacher, mask, num_heads=num_heads, reduction=reduction)
    return torch.ops.kdkernels.relation_kl.default(student, teacher, mask, num_heads, reduction_id, need_grad(student))[
        0
    ]


def _check_attention(q_s, k_s, q_t, k_t, scale_s, scale_t):
    """Shapes, devices and the teacher's grad; returns both scales as numbers."""
    for name, x in (("q_s", q_s), ("k_s", k_s), ("q_t", q_t), ("k_t", k_t)):
        _checks.tensor(name, x, 4)
        if x.shape[3] == 0:
            raise ValueError(f"{name} must have a head size of at least 1, got shape {list(x.shape)}")
    for side, q, k in (("s", q_s, k_s), ("t", q_t, k_t)):
        if q.shape != k.shape:
            raise ValueError(
                f"k_{side} must have the shape of q_{side}, [batch, heads, tokens, d]; got q_{side} {list(q.shape)}, "
                f"k_{side} {list(k.shape)}"
            )
    if q_s.shape[1] != q_t.shape[1]:
        raise ValueError(
            f"student and teacher must have as many heads; got q_s {list(q_s.shape)} and q_t {list(q_t.shape)} "
            "(relation_kl re-splits heads)"
        )
    if q_s.shape[:3] != q_t.shape[:3]:
        raise ValueError(
            f"q_t must agree with q_s in batch, heads and tokens; got q_s {list(q_s.shape)}, q_t {list(q_t.shape)}"
        )
    _checks.teacher("q_t", q_t)
    _checks.teacher("k_t", k_t)
    _checks.same_device("q_s", q_s, k_s=k_s, q_t=q_t, k_t=k_t)
    return (
        q_s.shape[3] ** -0.5 if scale_s is None else _checks.number("scale_s", scale_s),
        q_t.shape[3] ** -0.5 if scale_t is None else _checks.number("scale_t", scale_t),
    )
