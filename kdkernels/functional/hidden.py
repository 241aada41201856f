"""Losses on hidden states."""

import torch

from .. import _checks, ops, reference
from .._load import serves
from ..ops._common import NORMALIZE, OVER, VARIANCE
from ._common import any_fp64, need_grad


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
    if any_fp64(*students, *teachers, *weights, *biases) or not serves("hidden_mse", first.device):
        w, b = (x if len(x) > 1 else x[0] if x else None for x in (weights, biases))
        return reference.hidden_mse(students, teachers, mask, weight=w, bias=b, normalize=normalize)
    return ops.hidden_mse.call(
        students, teachers, mask, weights, biases, normalize_id, need_grad(*students, *weights, *biases)
    )[0]


def hidden_cosine(student, teacher, mask=None):
    """Mean over real tokens of 1 - cos(student, teacher) (DistilBERT, arXiv 1910.01108; TextBrewer's cos).

    A norm below 1e-8 counts as 1e-8, as in torch.nn.functional.cosine_similarity: a zero state has cosine 0.

    Args:
        student, teacher: [B, N, D] each, or lists of as many layers: one launch, then the sum over layers.
        mask: [B, N].

    Returns: a scalar; float32 (float64 for float64 inputs).
    """
    students, teachers = _pairs_of_layers(student, teacher)
    mask = _checks.mask(mask, students[0].shape[:2], students[0], "[batch, tokens]")
    if any_fp64(*students, *teachers) or not serves("hidden_cosine", students[0].device):
        return reference.hidden_cosine(students, teachers, mask)
    # 16-bit gradients would be rounded twice, a compiled graph would keep a second copy, and an infinite upstream
    # gradient would make NaN of padding's 0.
    exact = {x.dtype for x in students} == {torch.float32} and not torch.compiler.is_compiling()
    keep = exact and mask is None and need_grad(*students)
    return ops.hidden_cosine.call(students, teachers, mask, keep)[0]


def moment_mse(student, teacher, mask=None, *, mean_weight=1.0, variance_weight=1.0, variance="absolute"):
    """Transfer of each token's mean and variance over its features (MobileBERT, arXiv 2004.02984).

    Mean over real tokens of mean_weight (mean_s - mean_t)^2 + variance_weight |var_s - var_t|, as MobileBERT's code has
    it, with its weights 5000 and 5; the variance is the mean square around the mean.

    Args:
        student, teacher: [B, N, D] each, or lists of as many layers: one launch, then the sum over layers.
        mask: [B, N].
        mean_weight, variance_weight: finite numbers.
        variance: "absolute" or "squared", how the difference of variances counts.

    Returns: a scalar; float32 (float64 for float64 inputs).
    """
    students, teachers = _pairs_of_layers(student, teacher)
    mask = _checks.mask(mask, students[0].shape[:2], students[0], "[batch, tokens]")
    mean_weight = _checks.number("mean_weight", mean_weight)
    variance_weight = _checks.number("variance_weight", variance_weight)
    variance_id = _checks.choice("variance", variance, VARIANCE)
    if any_fp64(*students, *teachers) or not serves("moment_mse", students[0].device):
        return reference.moment_mse(
            students, teachers, mask, mean_weight=mean_weight, variance_weight=variance_weight, variance=variance
        )
    return ops.moment_mse.call(
        students, teachers, mask, mean_weight, variance_weight, variance_id, need_grad(*students)
    )[0]


def gram_mse(s0, s1, t0, t1, mask=None, *, over="hidden"):
    """Mean squared error between Gram matrices of hidden states, which are never stored.

    over="hidden" (flow of the solution procedure, Yim et al., CVPR 2017; TextBrewer's fsp): per sequence of n real
    tokens s0^T s1 / n against t0^T t1 / n, mean over sequences with a real token and D_0 x D_1.
    over="token" (neuron selectivity transfer, arXiv 1707.01219; TextBrewer's nst or mmd): s0 s1^T / D_s against
    t0 t1^T / D_t, mean over the pairs of real tokens of each sequence.

    Args:
        s0, s1: the student's states of two layers, [B, N, D_0] and [B, N, D_1]. s1 = None: s0 once more, the usual
            NST; its Gram matrix is symmetric, which saves work, as it does where both are the same tensor.
        t0, t1: the teacher's. Over "hidden" with the student's widths; over "token" s0 and s1 share one width, and t0
            and t1 another.
        mask: [B, N].
        over: "hidden" or "token".

    Returns: a scalar; float32 (float64 for float64 inputs).
    """
    over_id = _checks.choice("over", over, OVER)
    s1, t1 = None if s1 is s0 else s1, None if t1 is t0 else t1
    if (s1 is None) != (t1 is None):
        s1, t1 = s0 if s1 is None else s1, t0 if t1 is None else t1
    _check_gram(s0, s1, t0, t1, over)
    mask = _checks.mask(mask, s0.shape[:2], s0, "[batch, tokens]")
    given = [x for x in (s0, s1, t0, t1) if x is not None]
    if any_fp64(*given) or not serves("gram_mse", s0.device):
        return reference.gram_mse(s0, s1, t0, t1, mask, over=over)
    return ops.gram_mse.call(s0, s1, t0, t1, mask, over_id, need_grad(*given))[0]


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


def _check_states(s, t, first) -> None:
    """One layer of either side, on the grid of the first layer."""
    _checks.teacher("teacher", t)
    _checks.same_device("student", first, student=s, teacher=t)
    if s.shape[:2] != first.shape[:2] or t.shape[:2] != first.shape[:2]:
        raise ValueError(
            "all layers of student and teacher must agree in batch and tokens; got "
            f"{list(first.shape)}, {list(s.shape)} and {list(t.shape)}"
        )
    if s.shape[2] == 0 or t.shape[2] == 0:
        raise ValueError(f"student and teacher must have at least one feature; got {list(s.shape)} and {list(t.shape)}")


def _check_hidden_layer(s, t, w, b, first) -> None:
    _check_states(s, t, first)
    _checks.same_device("student", first, weight=w, bias=b)
    if w is None and s.shape[2] != t.shape[2]:
        raise ValueError(
            f"teacher must have the width of student, or weight must project it; got student {list(s.shape)}, "
            f"teacher {list(t.shape)}"
        )
    if w is not None and tuple(w.shape) != (t.shape[2], s.shape[2]):
        raise ValueError(f"weight must have the shape [D_t, D_s] = {[t.shape[2], s.shape[2]]}, got {list(w.shape)}")
    if b is not None and b.shape[0] != t.shape[2]:
        raise ValueError(f"bias must have the shape [D_t] = {[t.shape[2]]}, got {list(b.shape)}")


def _alike(s, t) -> bool:
    """Whether these are what most calls give, legal at a glance."""
    return (
        type(s) is type(t) is torch.Tensor
        and s.dtype == t.dtype
        and s.dtype in _checks.FLOATS
        and s.dim() == 3
        and s.shape == t.shape
        and s.shape[2] > 0
        and s.device == t.device
        and not t.requires_grad
    )


def _pairs_of_layers(student, teacher) -> tuple[list, list]:
    """Both as lists of as many layers of one width on one token grid."""
    if _alike(student, teacher):
        return [student], [teacher]
    students, teachers = _layers("student", student), _layers("teacher", teacher)
    if len(students) != len(teachers):
        raise ValueError(f"student and teacher must have as many layers; got {len(students)} and {len(teachers)}")
    for s, t in zip(students, teachers, strict=True):
        _check_states(s, t, students[0])
        if s.shape[2] != t.shape[2]:
            raise ValueError(f"teacher must have the width of student; got {list(s.shape)} and {list(t.shape)}")
    return students, teachers


def _check_gram(s0, s1, t0, t1, over: str) -> None:
    given = {"s0": s0, "t0": t0} if s1 is None else {"s0": s0, "s1": s1, "t0": t0, "t1": t1}
    for name, x in given.items():
        _checks.tensor(name, x, 3)
        if x.shape[:2] != s0.shape[:2]:
            raise ValueError(
                f"{name} must agree with s0 in batch and tokens; got s0 {list(s0.shape)}, {name} {list(x.shape)}"
            )
        if x.shape[2] == 0:
            raise ValueError(f"{name} must have at least one feature, got shape {list(x.shape)}")
        if name in ("t0", "t1"):
            _checks.teacher(name, x)
    _checks.same_device("s0", s0, **given)
    # Which widths must be the same: those of a product's two factors, or those of both sides' products.
    same = (("s0", "s1"), ("t0", "t1")) if over == "token" else (("s0", "t0"), ("s1", "t1"))
    for first, second in same:
        if {first, second} <= given.keys() and given[first].shape[2] != given[second].shape[2]:
            raise ValueError(
                f"{second} must have the width of {first} over {over!r}; got {list(given[first].shape)} and "
                f"{list(given[second].shape)}"
            )
