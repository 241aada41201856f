"""`linear`: a linear layer whose weight is packed."""

import torch
import torch.nn.functional as F

from .. import _checks, reference
from ..ops.quant_linear import ACTIVATION
from ..reference.quant_linear import ACTIVATIONS
from .packed import PackedWeight


def linear(x, packed, bias=None, *, activation=None, residual=None, input_scale=None):
    """activation(x W^T + bias) + residual, for inference.

    With 8-bit activations each row of x is quantised by its own largest magnitude, and products add up exactly in
    int32; weight-only schemes multiply in float32, but for more than 256 rows in 16 bits on a GPU, where products are
    torch's of weights rounded to x's dtype. NaN and Inf in a row stay in that row, as in a float layer. On a GPU
    above sm_90a, or where KDKERNELS_CUDA_PRODUCTS=bf16 asks for it, products are torch's of weights and activations
    rounded to bfloat16, and input_scale is not needed (`kdkernels.explain` says so).

    Args:
        x: [..., in features], float32, bfloat16 or float16; any strides. float64 is served by the reference.
        packed: PackedWeight of shape [out features, in features].
        bias: [out features].
        activation: None, "relu", "gelu", "gelu_tanh" (tanh's approximation) or "tanh".
        residual: [..., out features], added last.
        input_scale: None = each row its own scale; a number > 0 = one scale for all rows (static quantisation: what
            exceeds 127 * input_scale is clipped). Not for weight-only schemes.

    Returns: [..., out features] in x's dtype.
    Raises: ValueError or TypeError naming the argument; RuntimeError where a gradient would be needed.
    """
    if not isinstance(packed, PackedWeight):
        raise TypeError(f"packed must be a PackedWeight (see pack), got {type(packed).__name__}")
    _check(x, packed, bias, residual)
    code = _checks.choice("activation", activation, ACTIVATION)
    weight_only = packed.scheme.activation_bits is None
    if input_scale is not None:
        input_scale = _checks.number("input_scale", input_scale, above=0)
        if weight_only:
            raise ValueError("input_scale needs a scheme with activation_bits=8; this weight's is weight-only")
    if packed.unpacked is not None and x.dtype != torch.float64:
        return _of_unpacked(x, packed.unpacked, bias, activation, residual)
    if packed.prepared is None or x.dtype == torch.float64:
        y = reference.quant_linear(x, packed, bias, activation=activation, residual=residual, input_scale=input_scale)
        return y.to(x.dtype)
    rows = x.flatten(0, -3) if x.dim() > 3 else x
    if residual is not None and x.dim() > 3:
        residual = residual.flatten(0, -3)
    y = torch.ops.kdkernels.quant_linear(
        rows,
        packed.prepared,
        bias,
        residual,
        packed.shape[0],
        code,
        not weight_only,
        input_scale or 0.0,
        packed.layout,
    )
    return y.unflatten(0, x.shape[:-2]) if x.dim() > 3 else y


def _of_unpacked(x, weight, bias, activation, residual):
    """torch's product in the weight's dtype; what follows in float32."""
    y = F.linear(x.to(weight.dtype), weight).float()
    y = ACTIVATIONS[activation](y if bias is None else y + bias)
    return (y if residual is None else y + residual).to(x.dtype)


def _check(x, packed: PackedWeight, bias, residual) -> None:
    rows, columns = packed.shape
    _checks.tensor("x", x)
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"x must be [..., in features] with {columns} in features, got shape {list(x.shape)}")
    named = {"bias": bias, "residual": residual}
    for name, value in named.items():
        if value is not None:
            _checks.tensor(name, value)
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias must have the shape [{rows}], one value per out feature; got {list(bias.shape)}")
    if residual is not None and tuple(residual.shape) != (*x.shape[:-1], rows):
        raise ValueError(f"residual must have the output's shape {[*x.shape[:-1], rows]}, got {list(residual.shape)}")
    _checks.same_device("x", x, packed=packed, **named)
    refuse_gradient(x, bias, residual)


def refuse_gradient(*inputs: torch.Tensor | None) -> None:
    """RuntimeError where a gradient by one of the inputs would be needed."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise RuntimeError(
            "kdkernels.quant.linear is for inference and has no gradient; run it under torch.no_grad() or "
            "torch.inference_mode()"
        )
