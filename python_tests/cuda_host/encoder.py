"""The encoder's CUDA kernels on the CPU, called as csrc/torch/encoder_cuda.cpp does."""

import ctypes
from pathlib import Path

import torch

from kdkernels.ops.quant_linear import ACTIVATION

from . import DTYPE, Guarded, _pointer, check, quant_linear, varlen_attention
from .quant_linear import QuantLinear
from .varlen_attention import VarlenAttention


class NormalizeRows(ctypes.Structure):
    """kd::NormalizeRows of csrc/ops/encoder.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("out", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("norm_dtype", ctypes.c_int32),
        ("in_use", ctypes.c_void_p),
    ]


class EncoderBlock(ctypes.Structure):
    """kd::EncoderBlock."""

    _fields_ = [
        ("qkv", QuantLinear * 3),
        *((name, QuantLinear) for name in ("output", "up", "down")),
        *((name, NormalizeRows) for name in ("attention_norm", "output_norm")),
    ]


class Encoder(ctypes.Structure):
    """kd::cuda::Encoder of csrc/cuda/encoder.h."""

    _fields_ = [
        ("blocks", ctypes.POINTER(EncoderBlock)),
        ("count", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("features", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("attention", VarlenAttention),
        ("out", ctypes.c_void_p),
        ("all_states", ctypes.c_bool),
    ]


class Host(quant_linear.Host):
    """quant_linear's kernels and what the encoder has beside them."""

    attention = varlen_attention.Host.attention

    def __init__(self, folder: Path, arch: int = 90):
        structs = {"normalize_rows": NormalizeRows, "encoder": Encoder}
        super().__init__(folder, "encoder.cu", int64=["host_encoder_workspace_bytes"], structs=structs, arch=arch)

    def normalize_rows(self, x, residual, weight, bias, eps, packed=None, in_use=None):
        """out, and where `packed` shall read it codes, scales and sums."""
        out, count = Guarded(x.shape, x.dtype), None if in_use is None else torch.tensor(in_use, dtype=torch.int32)
        op = NormalizeRows(
            _pointer(x), _pointer(residual), *x.shape, _pointer(weight), _pointer(bias), eps, _pointer(out.tensor),
            DTYPE[x.dtype], DTYPE[weight.dtype], _pointer(count)
        )  # fmt: skip
        if packed is None:
            check(self.library, self.library.host_normalize_rows(ctypes.byref(op), None))
            return out.finished(), None, None, None
        reader, _alive, codes, scales, sums = self.reader(x, packed)
        check(self.library, self.library.host_normalize_rows(ctypes.byref(op), ctypes.byref(reader)))
        return out.finished(), codes, scales.finished(), sums

    def encoder(self, x, cu_seqlens, blocks, heads, activation, eps, all_states=False):
        """The op kdkernels::encoder, on blocks as quant.encoder has them; NaN in rows that were not written."""
        alive = []

        def norm(module):
            op = NormalizeRows(columns=x.shape[1], eps=eps, dtype=DTYPE[x.dtype], norm_dtype=DTYPE[module.weight.dtype])
            op.weight, op.bias = _pointer(module.weight), _pointer(module.bias)
            return op

        def linear(module):
            op, prepared = self.prepare(module.weight)
            alive.append(prepared)
            op.bias, op.bias_dtype = _pointer(module.bias), DTYPE[module.bias.dtype]
            op.activation = ACTIVATION[activation if module in [block.up for block in blocks] else None]
            return op

        described = (EncoderBlock * len(blocks))()
        for to, block in zip(described, blocks, strict=True):
            to.qkv[:] = [linear(part) for part in (block.query, block.key, block.value)]
            to.output, to.up, to.down = linear(block.output), linear(block.up), linear(block.down)
            to.attention_norm, to.output_norm = norm(block.attention_norm), norm(block.output_norm)
        out = Guarded((len(blocks) if all_states else 1, *x.shape), x.dtype)
        op = Encoder(described, len(blocks), _pointer(x), *x.shape, DTYPE[x.dtype])
        op.attention.cu_seqlens, op.attention.sequences = _pointer(cu_seqlens), len(cu_seqlens) - 1
        op.attention.heads, op.out, op.all_states = heads, _pointer(out.tensor), all_states
        size = self.library.host_encoder_workspace_bytes(ctypes.byref(op))
        assert size % 4 == 0
        workspace = Guarded((size // 4,), torch.float32)
        check(self.library, self.library.host_encoder(ctypes.byref(op), _pointer(workspace.tensor)))
        workspace.finished()
        return out.finished()
