"""The encoder's CUDA kernels on the CPU, called as csrc/torch/encoder_cuda.cpp does."""

import ctypes
from pathlib import Path

import torch

from . import DTYPE, Guarded, _pointer, check, quant_linear


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


class Host(quant_linear.Host):
    """quant_linear's kernels and what the encoder has beside them."""

    def __init__(self, folder: Path):
        super().__init__(folder, "encoder.cu")
        self.library.host_sizeof_normalize_rows.restype = ctypes.c_int64
        assert self.library.host_sizeof_normalize_rows() == ctypes.sizeof(NormalizeRows)

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
