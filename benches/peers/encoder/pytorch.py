"""torch's own: eager in float32 and bfloat16, torch.compile, quantize_dynamic, and torchao's int8, compiled."""

import copy
import warnings

import torch
from torch import nn


def _function(model):
    @torch.inference_mode()
    def encode(input_ids, attention_mask):
        return model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    return encode


def float32(model, _folder):
    return _function(model)


def bfloat16(model, _folder):
    return _function(copy.deepcopy(model).bfloat16())


def compiled(model, _folder):
    """Compiled anew for each shape, as serving code with fixed shapes does."""
    return _function(torch.compile(copy.deepcopy(model), dynamic=False))


def quantize_dynamic(model, _folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated in favour of torchao
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return _function(quantised)


def torchao(model, _folder):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantised = copy.deepcopy(model)
    quantize_(quantised, Int8DynamicActivationInt8WeightConfig())
    return _function(torch.compile(quantised, dynamic=False))
