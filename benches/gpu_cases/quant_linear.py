"""Products with quantised weights: one large enough for the tensor cores, with its epilogue, and few rows, whose time
is the weights' bytes. Few rows meet `LAYERS` weights in turn, as in a model."""

from functools import partial

import torch
import torch.nn.functional as F

from kdkernels import reference
from kdkernels.quant import PackedWeight, Scheme, linear, pack

from ..roofline import Work
from . import OURS, Built, Case, compiled, lazily

LAYERS = 8
SMALL_SHAPE = 64, 128  # of a dry run's weights
INT_MM, BF16, FP16, COMPILED = "int_mm + dequantise", "torch bf16", "torch fp16", "torch.compile bf16"


def _build(rows, columns, features, scheme, activation, count, peers, device, small) -> Built:
    """x [rows, columns] in bf16 times `count` weights [features, columns]; GELU is torch's own in the peers."""
    if small:
        rows, (columns, features), count = min(rows, 32), SMALL_SHAPE, min(count, 2)
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    x, weight = draw(rows, columns).bfloat16(), draw(features, columns) / columns**0.5
    bias = draw(features).bfloat16()
    packed = pack(weight, scheme)
    weights = [packed, *(PackedWeight(packed.blob.clone()) for _ in range(count - 1))]
    calls = {OURS: lambda i: linear(x, weights[i], bias, activation=activation)}
    for name in peers:
        calls[name] = lazily(partial(PEERS[name], x, packed, bias, F.gelu if activation else _same, count, device))
    truth = reference.quant_linear(x, packed, bias, activation=activation)
    moved = 2 * rows * (columns + features) + 2 * features + packed.nbytes
    return Built(calls, truth, Work(moved, 2 * rows * columns * features), count)


def _same(y):
    return y


def _of_torch(dtype, by_compile, x, packed, bias, activation, count, device):
    """F.linear on the dequantised weights."""
    x, bias = x.to(dtype), bias.to(dtype)
    weight = packed.dequantize(dtype)
    weights = [weight, *(weight.clone() for _ in range(count - 1))]

    def layer(weight):
        return activation(F.linear(x, weight, bias))

    layer = compiled(layer, device) if by_compile else layer
    return lambda i: layer(weights[i])


def _int_mm(x, packed, bias, activation, count, device):
    """Codes of the rows, torch's int8 product, and scales, as torch.compile fuses them around it."""
    values, scales = packed.factors
    codes, scales = values.to(torch.int8).t(), scales.flatten()

    def layer(weight):
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        rows = (x.float() / scale).round().to(torch.int8)
        return activation(torch._int_mm(rows, weight) * scale * scales + bias.float()).bfloat16()

    weights = [codes, *(codes.clone(memory_format=torch.preserve_format) for _ in range(count - 1))]
    layer = compiled(layer, device)
    return lambda i: layer(weights[i])


def _torchao(x, packed, bias, activation, count, device):
    """torchao's dynamic int8, where the package is installed."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = torch.nn.Linear(packed.shape[1], packed.shape[0], device=device, dtype=torch.bfloat16)
    module.weight.data, module.bias.data = packed.dequantize(torch.bfloat16), bias.clone()
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    layer = compiled(lambda x: activation(module(x)), device)
    return lambda i: layer(x)


PEERS = {
    BF16: partial(_of_torch, torch.bfloat16, False),
    FP16: partial(_of_torch, torch.float16, False),
    COMPILED: partial(_of_torch, torch.bfloat16, True),
    INT_MM: _int_mm,
    "torchao int8": _torchao,
}


def _large() -> Case:
    shape, peers = (4096, 768, 3072), tuple(PEERS)
    build = partial(_build, *shape, Scheme(), "gelu", 1, peers)
    why = "a BERT-base feed-forward layer at 32 x 128 with rows to 8 bits before, bias and GELU behind"
    return Case("quant_linear", "w8a8_4096x768x3072_gelu", why, build, torch.int8, {INT_MM: 1.5}, share=55)


def _few(rows: int, bits: int, activation_bits: int | None) -> Case:
    scheme = Scheme(bits, "block", 32, False, activation_bits) if bits < 8 else Scheme(activation_bits=activation_bits)
    name = f"w{bits}a{activation_bits or 16}_{rows}x4096x4096"
    build = partial(_build, rows, 4096, 4096, scheme, None, LAYERS, (BF16,))
    why = f"{bits}-bit weights out of memory, " + ("8-bit activations" if activation_bits else "bf16 activations")
    target = {BF16: 2.5} if bits < 8 and activation_bits is None else {}
    arithmetic = torch.int8 if activation_bits else torch.bfloat16
    return Case("quant_linear", name, why, build, arithmetic, target)


CASES = (
    _large(),
    *(_few(rows, bits, activations) for activations in (8, None) for bits in (8, 4, 2) for rows in (1, 4, 16)),
)
