"""Quantised encoders of BERT-base's shape in bf16, random weights, texts of one length: 32 of them, and one, whose time
is launches and the weights' bytes. Peers run the same weights dequantised, without a mask, so that their attention has
no padding either; the last has torch's int8 product in the linears of the blocks."""

import copy
from functools import partial

import torch
from torch import nn
from transformers import BertConfig, BertModel

import kdkernels
from kdkernels.quant.modules import QuantEmbedding, QuantLinear

from ..roofline import Work
from . import OURS, Built, Case, lazily

BF16, FP16, COMPILED, INT_MM = "torch bf16", "torch fp16", "torch.compile bf16", "int_mm + dequantise"
SMALL = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}


def _build(texts, tokens, scheme, peers, device, small) -> Built:
    if small:
        texts, tokens = min(texts, 2), 16
    torch.manual_seed(0)
    with torch.device(device):
        model = BertModel(BertConfig(**SMALL if small else {})).eval().requires_grad_(False)
        ids = torch.randint(model.config.vocab_size, (texts, tokens))
    quantised = kdkernels.quantize(copy.deepcopy(model), scheme)
    for name, module in quantised.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            model.get_submodule(name).weight.data = module.weight.dequantize()
    calls = {OURS: _call(quantised.bfloat16(), ids)}
    for name in peers:
        calls[name] = lazily(partial(PEERS[name], model, ids, device))
    linears = [module for module in quantised.encoder.modules() if isinstance(module, QuantLinear)]
    products = 2 * ids.numel() * sum(module.in_features * module.out_features for module in linears)
    products += 4 * ids.numel() * tokens * model.config.hidden_size * model.config.num_hidden_layers  # of attention
    moved = sum(module.weight.nbytes for module in linears) + 4 * ids.numel() * model.config.hidden_size
    return Built(calls, model(ids).last_hidden_state, Work(moved, products))


def _call(model, ids):
    return lambda i: model(ids).last_hidden_state


def _of_torch(dtype, by_compile, model, ids, device):
    model = copy.deepcopy(model).to(dtype)
    return _call(_compiled(model, device) if by_compile else model, ids)


def _compiled(model, device):
    """Layer by layer, which all share what was compiled for the first; without graphs of its own: a sample is one."""
    for layer in model.encoder.layer if device == "cuda" else ():
        layer.compile(dynamic=False, mode="max-autotune-no-cudagraphs")
    return model


class _Int8Linear(nn.Module):
    """A row's codes, torch's int8 product, and scales."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scales = linear.weight.float().abs().amax(1) / 127
        codes = (linear.weight.float() / scales[:, None]).round().to(torch.int8)
        self.codes, self.scales, self.bias = codes.t(), scales, linear.bias.float()

    def forward(self, x):
        rows = x.flatten(0, -2).float()
        scale = rows.abs().amax(-1, keepdim=True) / 127
        y = torch._int_mm((rows / scale).round().to(torch.int8), self.codes) * scale * self.scales + self.bias
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


def _int_mm(model, ids, device):
    model = copy.deepcopy(model).bfloat16()
    for name, module in model.encoder.named_modules():
        if isinstance(module, nn.Linear):
            model.encoder.set_submodule(name, _Int8Linear(module))
    return _call(_compiled(model, device), ids)


PEERS = {
    BF16: partial(_of_torch, torch.bfloat16, False),
    FP16: partial(_of_torch, torch.float16, False),
    COMPILED: partial(_of_torch, torch.bfloat16, True),
    INT_MM: _int_mm,
}


def _case(texts, scheme, why, peers, targets=None, milliseconds=None) -> Case:
    build = partial(_build, texts, 128, scheme, peers)
    # The linears' inputs are rounded to 8 bits in every block.
    name = f"bert_base_{texts}x128_{scheme}"
    return Case("encoder", name, why, build, torch.int8, targets or {}, milliseconds, match=5e-2)


CASES = (
    _case(32, "int8", "a batch", tuple(PEERS), {COMPILED: 1.7, INT_MM: 1.5}, 0.95),
    _case(1, "int8", "one text in a CUDA graph", tuple(PEERS), milliseconds=0.32),
    _case(32, "int4", "a batch, with weights of 4 bits", (BF16,)),
    _case(1, "int4", "one text, with weights of 4 bits", (BF16,)),
)
