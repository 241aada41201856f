"""Losses on hidden states."""

import torch

from .. import _checks, reference
from .._load import serves
from ..ops._common import NORMALIZE
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
    return torch.ops.kdkernels.hidden_mse.default(
        students, teachers, mask, weights, biases, normalize_id, need_grad(*students, *weights, *biases)
    )[0]


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
