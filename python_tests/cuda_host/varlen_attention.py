"""varlen_attention's CUDA kernel on the CPU, called as csrc/torch/varlen_attention_cuda.cpp does."""

import ctypes
from pathlib import Path

from . import DTYPE, Guarded, _pointer, build, check


class TokensView(ctypes.Structure):
    """kd::TokensView of csrc/ops/varlen_attention.h."""

    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 2), ("dtype", ctypes.c_int32)]


class VarlenAttention(ctypes.Structure):
    """kd::VarlenAttention."""

    _fields_ = [
        *((name, TokensView) for name in ("q", "k", "v")),
        ("cu_seqlens", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("sequences", "longest", "tokens", "heads", "size")),
        ("scale", ctypes.c_float),
        ("out", ctypes.c_void_p),
        ("out_dtype", ctypes.c_int32),
    ]


class Host:
    """The kernel, on [tokens, heads * size] tensors."""

    def __init__(self, folder: Path):
        structs = {"varlen_attention": VarlenAttention}
        self.library = build("varlen_attention.cu", folder, int64=["host_bank_conflicts"], structs=structs)

    def attention(self, q, k, v, cu_seqlens, heads, scale, out_dtype=None, in_place=False):
        """The op kdkernels::varlen_attention; NaN in rows that were not written, where q is not overwritten."""
        q = q.clone() if in_place else q
        views = (TokensView(x.data_ptr(), (ctypes.c_int64 * 2)(*x.stride()), DTYPE[x.dtype]) for x in (q, k, v))
        op = VarlenAttention(*views, _pointer(cu_seqlens), len(cu_seqlens) - 1)
        op.tokens, op.heads, op.size, op.scale = len(q), heads, q.shape[1] // heads, scale
        out = Guarded(q.shape, out_dtype or q.dtype)
        op.out, op.out_dtype = _pointer(q if in_place else out.tensor), DTYPE[out.tensor.dtype]
        check(self.library, self.library.host_varlen_attention(ctypes.byref(op)))
        return q if in_place else out.finished()
