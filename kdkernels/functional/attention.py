"""Losses on attention maps and relations, straight from queries and keys."""

from .. import _checks, ops, reference
from .._load import serves
from ..ops._common import HEAD_REDUCTION, KIND, ON
from . import _attention
from ._common import ROW_REDUCTION, any_fp64, need_grad

MAP_KIND = {name: KIND[name] for name in ("kl", "reverse_kl")}


def attention_kl(
    q_s,
    k_s,
    q_t,
    k_t,
    mask=None,
    *,
    kind="kl",
    temperature=1.0,
    scale_s=None,
    scale_t=None,
    head_reduction=None,
    head_map=None,
    causal=False,
    bias_s=None,
    bias_t=None,
    lse_s=None,
    lse_t=None,
    cu_seqlens=None,
    max_seqlen=None,
    reduction="batchmean",
):
    """KL between attention maps straight from queries and keys (MiniLM, arXiv 2002.10957), memory linear in N.

    A map is softmax((scale q k^T + bias) / T) over the keys that a query sees.

    Args:
        q_s, k_s: the student's queries and keys [B, H, N, d_s]; k_s may have fewer heads, whose number divides H
            (grouped queries: head h meets key head h // (H / H_kv)).
        q_t, k_t: the teacher's [B, H, N, d_t]; d_t and the number of key heads may differ from the student's.
        mask: [B, N].
        kind: "kl" = KL(teacher || student), "reverse_kl" = KL(student || teacher).
        temperature: divides the scores; a number > 0. No T^2.
        scale_s, scale_t: what multiplies q k^T; None = 1 / sqrt(d).
        head_reduction: None, or "sum" or "mean" of each side's scores over heads before the softmax (TextBrewer's
            attention_ce_mean); the numbers of heads may then differ, and rows are (batch, query).
        head_map: a list of integers, the teacher's head for each of the student's; the numbers of heads may then
            differ. Not together with head_reduction.
        causal: a query sees the keys up to its own token.
        bias_s, bias_t: added to scale q k^T, broadcastable to [B, H, N, N] (ALiBi, relative positions); -inf hides a
            key. Padding may hold anything. No gradient flows to it.
        lse_s, lse_t: float32 [B, H, N], the natural log of sum_j exp(x_ij) over the keys that a query sees, as
            the models' own attention has left it; together they save a pass. The gradient is that of the loss as a
            function of q_s and k_s. Not together with head_reduction.
        cu_seqlens: int32 or int64 [B + 1], the bounds of packed sequences; q and k are then [tokens, heads, d], lse
            [tokens, heads], a bias [B, H, max_seqlen, max_seqlen] by positions in the sequence, and mask None.
            Tokens behind the last bound count nowhere.
        max_seqlen: a bound of the length of packed sequences, which saves a GPU empty work; None = all tokens.
        reduction: "batchmean" (rows are real (batch, head, query)), "sum" or "none" ([B, H, N], packed [tokens, H]).

    Returns: a scalar, or for "none" [B, H, N] or [tokens, H], without H where heads are reduced; float32 (float64 for
    float64 inputs).
    """
    if head_reduction is not None and (head_map is not None or lse_s is not None or lse_t is not None):
        raise ValueError("head_reduction goes with none of head_map, lse_s and lse_t: it leaves one map per sequence")
    packed, head_id = cu_seqlens is not None, _checks.choice("head_reduction", head_reduction, HEAD_REDUCTION)
    any_heads = head_reduction is not None or head_map is not None
    scale_s, scale_t = _attention.queries_and_keys(
        q_s, k_s, q_t, k_t, scale_s, scale_t, packed, grouped=True, any_heads=any_heads
    )
    heads = _attention.head_map(head_map, q_s.shape[1], q_t.shape[1])
    longest = _checks.sequences(cu_seqlens, max_seqlen, mask, q_s)
    if not packed:
        mask = _checks.mask(mask, (q_s.shape[0], q_s.shape[2]), q_s, "[batch, tokens]")
    square = (cu_seqlens.shape[0] - 1, longest) if packed else (q_s.shape[0], q_s.shape[2])
    bias_s, bias_t = _attention.bias("bias_s", bias_s, q_s, *square), _attention.bias("bias_t", bias_t, q_t, *square)
    lse_s, lse_t = _attention.lse("lse_s", lse_s, q_s), _attention.lse("lse_t", lse_t, q_t)
    reduction_id = _checks.choice("reduction", reduction, ROW_REDUCTION)
    temperature, kind_id = _checks.number("temperature", temperature, above=0), _checks.choice("kind", kind, MAP_KIND)
    causal = _checks.truth("causal", causal)
    biases = [b for b in (bias_s, bias_t) if b is not None]
    if any_fp64(q_s, k_s, q_t, k_t, *biases) or not serves("attention_kl", q_s.device):
        return reference.attention_kl(
            *(q_s, k_s, q_t, k_t, mask),
            kind=kind,
            temperature=temperature,
            scale_s=scale_s,
            scale_t=scale_t,
            head_reduction=head_reduction,
            head_map=head_map,
            causal=causal,
            bias_s=bias_s,
            bias_t=bias_t,
            cu_seqlens=cu_seqlens,
            reduction=reduction,
        )
    inputs = q_s, k_s, q_t, k_t, mask, cu_seqlens, bias_s, bias_t, lse_s, lse_t
    scalars = longest, temperature, scale_s, scale_t, kind_id, head_id, heads, causal, reduction_id
    return ops.attention_kl.call(*inputs, *scalars, need_grad(q_s, k_s))[0]


def attention_mse(
    q_s, k_s, q_t, k_t, mask=None, *, on="scores", scale_s=None, scale_t=None, cu_seqlens=None, max_seqlen=None
):
    """Mean squared difference of two attention maps from queries and keys, mean over real (batch, head, query, key).

    on="scores" (TinyBERT, arXiv 1909.10351) costs O(N): |a Q_s K_s^T - b Q_t K_t^T|^2 is an inner product of two small
    Gram matrices. on="probs" compares the maps after the softmax, in memory linear in N.

    Args:
        q_s, k_s: the student's queries and keys [B, H, N, d_s].
        q_t, k_t: the teacher's [B, H, N, d_t]; d_t may differ from d_s.
        mask: [B, N].
        on: "scores" or "probs".
        scale_s, scale_t: what multiplies q k^T; None = 1 / sqrt(d).
        cu_seqlens: int32 or int64 [B + 1], the bounds of packed sequences; q and k are then [tokens, heads, d] and mask
            None. Tokens behind the last bound count nowhere.
        max_seqlen: a bound of the length of packed sequences, which saves a GPU empty work; None = all tokens.

    Returns: a scalar; float32 (float64 for float64 inputs).
    """
    packed = cu_seqlens is not None
    scale_s, scale_t = _attention.queries_and_keys(q_s, k_s, q_t, k_t, scale_s, scale_t, packed)
    longest = _checks.sequences(cu_seqlens, max_seqlen, mask, q_s)
    if not packed:
        mask = _checks.mask(mask, (q_s.shape[0], q_s.shape[2]), q_s, "[batch, tokens]")
    on_id = _checks.choice("on", on, ON)
    if any_fp64(q_s, k_s, q_t, k_t) or not serves("attention_mse", q_s.device):
        return reference.attention_mse(
            q_s, k_s, q_t, k_t, mask, on=on, scale_s=scale_s, scale_t=scale_t, cu_seqlens=cu_seqlens
        )
    return ops.attention_mse.call(
        q_s, k_s, q_t, k_t, mask, cu_seqlens, longest, on_id, scale_s, scale_t, need_grad(q_s, k_s)
    )[0]


def relation_kl(student, teacher, mask=None, *, num_heads, cu_seqlens=None, max_seqlen=None, reduction="batchmean"):
    """Self-attention relations (MiniLMv2, arXiv 2012.15828): KL(softmax(T T^T / sqrt d) || softmax(S S^T / sqrt d)).

    Args:
        student: queries, keys or values of one layer with heads concatenated, [B, N, W_s].
        teacher: the same of the teacher, [B, N, W_t]; widths may differ.
        mask: [B, N].
        num_heads: relation heads that both widths are re-split into; it divides both.
        cu_seqlens: int32 or int64 [B + 1], the bounds of packed sequences; student and teacher are then [tokens, W] and
            mask None. Tokens behind the last bound count nowhere.
        max_seqlen: a bound of the length of packed sequences, which saves a GPU empty work; None = all tokens.
        reduction: "batchmean" (rows are real (batch, head, token)), "sum" or "none" ([B, num_heads, N], packed [tokens,
            num_heads]).

    Returns: a scalar, or for "none" [B, num_heads, N] or [tokens, num_heads]; float32 (float64 for float64 inputs).
    """
    packed = cu_seqlens is not None
    for name, x in (("student", student), ("teacher", teacher)):
        _checks.tensor(name, x, 2 if packed else 3)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student and teacher must agree in batch and tokens; got student "
            f"{list(student.shape)}, teacher {list(teacher.shape)}"
        )
    _checks.teacher("teacher", teacher)
    _checks.same_device("student", student, teacher=teacher)
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads must be an integer >= 1, got {num_heads!r}")
    for name, width in (("student", student.shape[-1]), ("teacher", teacher.shape[-1])):
        if width == 0 or width % num_heads:
            raise ValueError(f"num_heads must divide both widths; {num_heads} does not divide the {name}'s {width}")
    longest = _checks.sequences(cu_seqlens, max_seqlen, mask, student)
    if not packed:
        mask = _checks.mask(mask, student.shape[:2], student, "[batch, tokens]")
    reduction_id = _checks.choice("reduction", reduction, ROW_REDUCTION)
    if any_fp64(student, teacher) or not serves("relation_kl", student.device):
        return reference.relation_kl(
            student, teacher, mask, num_heads=num_heads, cu_seqlens=cu_seqlens, reduction=reduction
        )
    return ops.relation_kl.call(
        student, teacher, mask, cu_seqlens, longest, num_heads, reduction_id, need_grad(student)
    )[0]
