"""quant_linear's CUDA kernels on the CPU, called as csrc/torch/quant_linear_cuda.cpp does."""

import ctypes
from pathlib import Path

import torch

from kdkernels.ops.quant_linear import ACTIVATION

from . import DTYPE, Guarded, _pointer, build, check


class QuantWeights(ctypes.Structure):
    """kd::QuantWeights of csrc/ops/quant_linear.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "depth", "panels", "segments", "segment")),
        ("bits", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("codes", "steps", "scales", "offsets", "zeros", "column_zeros")),
        ("column_scales", ctypes.c_void_p),
    ]


class RowsView(ctypes.Structure):
    """kd::RowsView."""

    _fields_ = [("data", ctypes.c_void_p), ("inner", ctypes.c_int64), ("strides", ctypes.c_int64 * 3)]
    _fields_.append(("dtype", ctypes.c_int32))


class QuantLinear(ctypes.Structure):
    """kd::QuantLinear."""

    _fields_ = [
        ("weights", QuantWeights),
        ("x", RowsView),
        ("rows", ctypes.c_int64),
        ("a", ctypes.c_void_p),
        ("a_scale", ctypes.c_void_p),
        ("a_sums", ctypes.c_void_p),
        ("static_scale", ctypes.c_float),
        ("bias", ctypes.c_void_p),
        ("bias_dtype", ctypes.c_int32),
        ("activation", ctypes.c_int64),
        ("curve", ctypes.c_void_p),
        ("residual", RowsView),
        ("out", ctypes.c_void_p),
        ("out_dtype", ctypes.c_int32),
        ("in_use", ctypes.c_void_p),
        ("together", ctypes.c_int64),
    ]


def _rows(x: torch.Tensor) -> RowsView:
    return RowsView(x.data_ptr(), x.shape[0], (ctypes.c_int64 * 3)(0, *x.stride()), DTYPE[x.dtype])


class Host:
    """The kernels, on [rows, features] tensors."""

    def __init__(self, folder: Path, *others: str, int64=(), structs=(), arch: int = 90):
        int64 = ("host_prepare", "host_bank_conflicts", "host_few_rows_bytes", *int64)
        structs = {"quant_linear": QuantLinear, **dict(structs)}
        self.library = build("quant_linear.cu", folder, *others, int64=int64, structs=structs, arch=arch)
        for name in ("host_few_rows_serves", "host_unpack_serves"):
            getattr(self.library, name).restype = ctypes.c_bool

    def prepare(self, packed) -> tuple[QuantLinear, torch.Tensor]:
        """A call with its weights, and the memory that they are in."""
        op, blob = QuantLinear(), packed.blob
        given = _pointer(blob), ctypes.c_int64(blob.numel())
        prepared = torch.zeros(self.library.host_prepare(*given, None, ctypes.byref(op)), dtype=torch.uint8)
        self.library.host_prepare(*given, _pointer(prepared), ctypes.byref(op))
        return op, prepared

    def reader(self, x, packed, input_scale=0.0):
        """(the call that reads x as codes, before they are made; what its pointers need; codes, scales, sums)"""
        op, prepared = self.prepare(packed)
        op.x, op.rows, op.static_scale = _rows(x), len(x), input_scale
        codes = torch.full((len(x), op.weights.depth), 99, dtype=torch.int8)
        scales = Guarded((len(x),), torch.float32)
        sums = torch.zeros(len(x), op.weights.segments if op.weights.zeros else 0, dtype=torch.int32)
        op.a, op.a_scale = _pointer(codes), _pointer(scales.tensor)
        op.a_sums = _pointer(sums) if op.weights.zeros else None
        return op, (prepared, x), codes, scales, sums

    def quantize_rows(self, x, packed, input_scale=0.0):
        """As `reader`, with codes, scales and sums made."""
        op, alive, codes, scales, sums = self.reader(x, packed, input_scale)
        check(self.library, self.library.host_quantize_rows(ctypes.byref(op)))
        return op, alive, codes, scales.finished(), sums

    def linear(self, x, packed, bias=None, *, activation=None, residual=None, input_scale=0.0, tile=None):
        """kdkernels.quant.linear. `tile`: a kernel for many rows, 0 as its launcher chooses, else of so many."""
        quantized = packed.scheme.activation_bits is not None
        if quantized:
            op, _alive, _codes, _scales, _sums = self.quantize_rows(x, packed, input_scale)
        else:
            op, _alive, *_ = self.reader(x, packed)
            op.a = op.a_scale = op.a_sums = None
        if bias is not None:
            op.bias, op.bias_dtype = _pointer(bias), DTYPE[bias.dtype]
        if residual is not None:
            op.residual = _rows(residual)
        op.activation = ACTIVATION[activation]
        out = Guarded((len(x), packed.shape[0]), x.dtype)
        op.out = _pointer(out.tensor)
        if not quantized and self.library.host_unpack_serves(ctypes.byref(op)):
            unpacked = Guarded(packed.shape, x.dtype)
            check(self.library, self.library.host_unpack(ctypes.byref(op), _pointer(unpacked.tensor)))
            product = x @ unpacked.finished().T
            status = self.library.host_finish(ctypes.byref(op), _pointer(product))
        elif tile is None and self.library.host_few_rows_serves(ctypes.byref(op), quantized):
            of_splits = Guarded((self.library.host_few_rows_bytes(ctypes.byref(op), quantized) // 4,), torch.float32)
            status = self.library.host_few_rows(ctypes.byref(op), quantized, _pointer(of_splits.tensor))
            of_splits.finished()
        else:
            status = self.library.host_quant_linear(ctypes.byref(op), tile or 0)
        check(self.library, status)
        return out.finished()
