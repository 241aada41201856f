"""Libraries that run encoders on the CPU, one file each, all with one face:

    prepare(model, folder) -> function(input_ids, attention_mask) -> [B, N, D], the last hidden state

`model` is a BertModel in float32, `folder` a place to keep what is slow to make, which is named after the model. A
function gets int64 tensors and runs on as many threads as torch has. What is not installed raises ImportError from
`prepare`, and is named by the bench as not installed.
"""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from . import ctranslate2, onnxruntime, openvino, ours, pytorch

Encode = Callable
PEERS: dict[str, Callable[[nn.Module, Path], Encode]] = {
    "kdkernels int8": ours.int8,
    "kdkernels int4": ours.int4,
    "eager fp32": pytorch.float32,
    "eager bf16": pytorch.bfloat16,
    "torch.compile fp32": pytorch.compiled,
    "torch quantize_dynamic": pytorch.quantize_dynamic,
    "torchao int8": pytorch.torchao,
    "onnxruntime int8": onnxruntime.int8,
    "ctranslate2 int8": ctranslate2.int8,
    "openvino bf16": openvino.bfloat16,
    "openvino int8": openvino.int8,
}
# The distributions that they come from, for the rows.
PACKAGES = ("torch", "torchao", "onnxruntime", "ctranslate2", "openvino", "nncf")
