"""The public losses, shaped like torch.nn.functional: student first, teacher second, gradients to the student only.

Shared by all: inputs float32, bfloat16 or float16 (mixed too), any strides, arithmetic and result in float32; float64
inputs run through `kdkernels.reference` and give float64. `mask` is bool or 0/1, 1 = real token, as transformers'
attention_mask; None = all real. Keys outside the mask are left out before any softmax, rows outside it count nowhere,
and no real row at all gives loss 0 and gradient 0. A row is one distribution: a row of logits, or one (batch, head,
query) of an attention map.

reduction: "batchmean" = sum / real rows, "sum", "none" = a value per row, 0 where masked, and for logits "mean" = sum /
(real rows x classes). Every function raises ValueError or TypeError naming the argument that does not fit, what was
given and what is accepted, and RuntimeError on a second derivative.
"""

import torch

from . import _checks, reference
from ._load import serves
from .ops._common import KIND, NORMALIZE, ON, REDUCTION

_ROW_REDUCTION = {name: REDUCTION[name] for name in ("batchmean", "sum", "none")}


def kd_loss(
    student_logits,
    teacher_logits,
    *,
    kind="kl",
    temperature=1.0,
    scale_t2=True,
    beta=0.5,
    mask=None,
    labels=None,
    alpha=1.0,
    ignore_index=-100,
    reduction="batchmean",
):
    """Distillation from logits (Hinton et al., arXiv 1503.02531): a pass forward, a pass backward, 32 bytes a row kept.

    Args:
        student_logits, teacher_logits: [..., V]. -inf is a class of probability 0.
        kind: "kl" = KL(teacher || student); "ce" = cross-entropy with soft targets (kl plus the teacher's entropy, the
            same gradient); "reverse_kl" = KL(student || teacher); "jsd" = beta KL(teacher || m) + (1 - beta) KL(student
            || m) with m = beta teacher + (1 - beta) student; "tv" = half the L1 distance.
        temperature: both logits are divided by it; a number > 0, or a tensor [...] with one per row.
        scale_t2: multiply the soft term by T^2, the row's own T, so that its gradient does not shrink as 1/T^2.
        beta: weight of the teacher in "jsd", in [0, 1].
        mask: [...], the rows that count.
        labels: [...], integers: adds the cross-entropy at T = 1 in the same pass, alpha soft + (1 - alpha) hard. Rows
            with `ignore_index` have no hard term. Each term is reduced over its own rows; "mean" and "batchmean" are
            both the mean over labelled rows for the hard term.
        alpha: weight of the soft term where labels are given.
        reduction: "batchmean", "mean", "sum" or "none".

    Returns: a scalar, or [...] for "none"; float32 (float64 for float64 inputs).
    """
    student = _checks.tensor("student_logits", student_logits)
    teacher = _checks.tensor("teacher_logits", teacher_logits)
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"student_logits must have the shape [..., classes], got {list(student.shape)}")
    if student.shape != teacher.shape:
        what = "vocabulary" if student.shape[:-1] == teacher.shape[:-1] else "shape"
        raise ValueError(
            f"teacher_logits must have the shape of student_logits; the {what} differs: student {list(student.shape)}, "
            f"teacher {list(teacher.shape)}"
        )
    _checks.teacher("teacher_logits", teacher)
    _checks.same_device("student_logits", student, teacher_logits=teacher)
    kind_id = _checks.choice("kind", kind, KIND)
    reduction_id = _checks.choice("reduction", reduction, REDUCTION)
    beta = _checks.number("beta", beta, low=0.0, high=1.0)
    alpha = _checks.number("alpha", alpha)
    lead, classes = student.shape[:-1], student.shape[-1]
    mask = _checks.mask(mask, lead, student, "the logits' without classes")
    if labels is not None:
        labels = _checks.labels(labels, lead, student, classes, ignore_index, mask)
    rows = None
    if isinstance(temperature, torch.Tensor):
        rows, temperature = _checks.row_temperature(temperature, lead, student, mask), 1.0
    else:
        temperature = _checks.number("temperature", temperature, above=0)

    if student.dtype == torch.float64 or teacher.dtype == torch.float64 or not serves("kd_loss", student.device):
        return reference.kd_loss(
            student,
            teacher,
            kind=kind,
            temperature=temperature if rows is None else rows,
            scale_t2=scale_t2,
            beta=beta,
            mask=mask,
            labels=labels,
            alpha=alpha,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    if len(lead) != 2:
        shape = (1, *lead) if len(lead) == 1 else (1, 1) if not lead else (-1, lead[-1])
        student, teacher = student.reshape(*shape, classes), teacher.reshape(*shape, classes)
        mask, labels, rows = (None if x is None else x.view(shape) for x in (mask, labels, rows))
    loss, _ = torch.ops.kdkernels.kd_loss.default(
        student,
        teacher,
        mask,
        labels,
        rows,
        kind_id,
        temperature,
        bool(scale_t2),
        beta,
        alpha,
        ignore_index,
        reduction_id,
    )
    return loss if reduction != "none" or len(lead) == 2 else loss.view(lead)


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
    reduction_id = _checks.choice("reduction", reduction, _ROW_REDUCTION)
    temperature = _checks.number("temperature", temperature, above=0)
    if _any_fp64(q_s, k_s, q_t, k_t) or not serves("attention_kl", q_s.device):
        return reference.attention_kl(
            q_s, k_s, q_t, k_t, mask, temperature=temperature, scale_s=scale_s, scale_t=scale_t, reduction=reduction
        )
    return torch.ops.kdkernels.attention_kl.default(
        q_s, k_s, q_t, k_t, mask, temperature, scale_s, scale_t, reduction_id, _need_grad(q_s, k_s)
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
    if _any_fp64(q_s, k_s, q_t, k_t) or not serves("attention_mse", q_s.device):
        return reference.attention_mse(q_s, k_s, q_t, k_t, mask, on=on, scale_s=scale_s, scale_t=scale_t)
    return torch.ops.kdkernels.attention_mse.default(
        q_s, k_s, q_t, k_t, mask, on_id, scale_s, scale_t, _need_grad(q_s, k_s)
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
    reduction_id = _checks.choice("reduction", reduction, _ROW_REDUCTION)
    if _any_fp64(student, teacher) or not serves("relation_kl", student.device):
        return reference.relation_kl(student, teacher, mask, num_heads=num_heads, reduction=reduction)
    return torch.ops.kdkernels.relation_kl.default(
        student, teacher, mask, num_heads, reduction_id, _need_grad(student)
    )[0]


def hidden_mse(student, teacher, mask=None, *, weight=None, bias=None, normalize=None):
    """Mean squared error of hidden states over real tokens x D; a list of layers runs in one launch and gives the sum.

    Args:
        student: [B, N, D_s], or a list of them.
        teacher: [B, N, D_t], or a list as long.
        mask: [B, N].
        weight: [D_t, D_s] projects the student first (TinyBERT's fit_dense); one tensor for all layers or a list, one
            per layer.
        bias: [D_t], with `weight` only; one tensor or a list.
        normalize: None; "l2" = both divided by their norm (PKD, arXiv 1908.09355); "layer_norm" = both through a
            LayerNorm without parameters (MobileBERT, arXiv 2004.02984). After the projection.

    Returns: a scalar; float32 (float64 for float64 inputs). Gradients flow to student, weight and bias.
    """
    students, teachers = _layers("student", student), _layers("teacher", teacher)
    if len(students) != len(teachers):
        raise ValueError(f"student and teacher must have as many layers; got {len(students)} and {len(teachers)}")
    weights, biases = (
        _shared_or_per_layer("weight", weight, len(students)),
        _shared_or_per_layer("bias", bias, len(students)),
    )
    if biases and not weights:
        raise ValueError("bias needs weight: it belongs to the projection of the student")
    if biases and len(biases) != len(weights):
        raise ValueError(
            f"bias must come as weight does, one tensor or one per layer; got {len(biases)} and {len(weights)}"
        )
    first = students[0]
    for layer, (s, t) in enumerate(zip(students, teachers, strict=True)):
        w = weights[layer if len(weights) > 1 else 0] if weights else None
        b = biases[layer if len(biases) > 1 else 0] if biases else None
        _check_hidden_layer(s, t, w, b, first)
    mask = _checks.mask(mask, first.shape[:2], first, "[batch, tokens]")
    normalize_id = _checks.choice("normalize", normalize, NORMALIZE)
    if _any_fp64(*students, *teachers, *weights, *biases) or not serves("hidden_mse", first.device):
        w, b = (x if len(x) > 1 else x[0] if x else None for x in (weights, biases))
        return reference.hidden_mse(students, teachers, mask, weight=w, bias=b, normalize=normalize)
    return torch.ops.kdkernels.hidden_mse.default(
        students, teachers, mask, weights, biases, normalize_id, _need_grad(*students, *weights, *biases)
    )[0]


def _any_fp64(*tensors: torch.Tensor) -> bool:
    return any(t.dtype == torch.float64 for t in tensors)


def _need_grad(*student: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in student)


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


def _layers(name: str, value) -> list:
    layers = list(value) if isinstance(value, (list, tuple)) else [value]
    if not layers:
        raise ValueError(f"{name} must be a tensor or a list of at least one layer, got an empty list")
    for layer in layers:
        _checks.tensor(name, layer, 3)
    return layers


def _shared_or_per_layer(name: str, value, layers: int) -> list:
    """[] for None, [x] for one tensor that all layers share, or one tensor per layer."""
    if value is None:
        return []
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) not in (1, layers):
        raise ValueError(f"{name} must be one tensor or a list of {layers}, one per layer; got {len(values)}")
    for x in values:
        _checks.tensor(name, x, 2 if name == "weight" else 1)
    return values


def _check_hidden_layer(s, t, w, b, first) -> None:
    _checks.teacher("teacher", t)
    _checks.same_device("student", first, student=s, teacher=t, weight=w, bias=b)
    if s.shape[:2] != first.shape[:2] or t.shape[:2] != first.shape[:2]:
        raise ValueError(
            "all layers of student and teacher must agree in batch and tokens; got "
            f"{list(first.shape)}, {list(s.shape)} and {list(t.shape)}"
        )
    if s.shape[2] == 0 or t.shape[2] == 0:
        raise ValueError(f"student and teacher must have at least one feature; got {list(s.shape)} and {list(t.shape)}")
    if w is None and s.shape[2] != t.shape[2]:
        raise ValueError(
            f"teacher must have the width of student, or weight must project it; got student {list(s.shape)}, "
            f"teacher {list(t.shape)}"
        )
    if w is not None and tuple(w.shape) != (t.shape[2], s.shape[2]):
        raise ValueError(f"weight must have the shape [D_t, D_s] = {[t.shape[2], s.shape[2]]}, got {list(w.shape)}")
    if b is not None and b.shape[0] != t.shape[2]:
        raise ValueError(f"bias must have the shape [D_t] = {[t.shape[2]]}, got {list(b.shape)}")
