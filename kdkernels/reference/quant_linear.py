"""quant_linear in plain torch: codes of activations as the kernels make them, everything behind them in float64."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    None: lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "tanh": torch.tanh,
}


def quantize_rows(x: torch.Tensor, input_scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes within [-127, 127], scale per row), x ~ scale * code; scale = max|x| / 127 of the row unless it is given.

    What is not finite behaves as in a float model: NaN gives the scale NaN; Inf the scale Inf, with codes +-127 where x
    is infinite and 0 elsewhere.
    """
    x = x if x.dtype == torch.float64 else x.float()
    largest = x.abs().amax(-1, keepdim=True)
    scale = largest / 127
    if input_scale is not None:
        scale = torch.where(largest.isfinite(), input_scale, scale)
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).tiny, scale)
    codes = (x * (1 / scale)).clamp(-127, 127).round()
    codes = torch.where(scale.isinf(), x.isinf() * x.sign() * 127, codes)
    return codes.nan_to_num(0), scale


def quant_linear(x, packed, bias=None, *, activation=None, residual=None, input_scale=None):
    """activation(x W^T + bias) + residual; see `kdkernels.quant.linear`."""
    values, scales = packed.factors
    weight = values.double() * scales
    if packed.scheme.activation_bits is None:
        y = x.double() @ weight.T
    else:
        if packed.scheme.group == "in":  # the scales of columns are multiplied into the activations
            x, weight = (x if x.dtype == torch.float64 else x.float()) * scales, values.double()
        codes, scale = quantize_rows(x, input_scale)
        y = (codes.double() @ weight.T) * scale
    y = ACTIVATIONS[activation](y if bias is None else y + bias)
    return y if residual is None else y + residual
