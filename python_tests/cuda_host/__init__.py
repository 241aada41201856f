"""Builds the CUDA kernels for the CPU (see cuda_runtime.h here) and calls kd_loss as csrc/torch/kd_loss_cuda.cpp does."""

import ctypes
import subprocess
from pathlib import Path

import torch

from kdkernels.ops._common import KIND, REDUCTION

HERE = Path(__file__).parent
DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GUARD = 64  # elements of NaN before and after every output


class LogitsView(ctypes.Structure):
    """kd::LogitsView of csrc/ops/kd_loss.h."""

    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3), ("dtype", ctypes.c_int32)]


class KdLoss(ctypes.Structure):
    """kd::KdLoss of csrc/ops/kd_loss.h."""

    _fields_ = [
        ("student", LogitsView),
        ("teacher", LogitsView),
        ("mask", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("row_temperature", ctypes.c_void_p),
        ("outer", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("temperature", ctypes.c_float),
        ("beta", ctypes.c_float),
        ("alpha", ctypes.c_float),
        ("scale_t2", ctypes.c_bool),
        ("ignore_index", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("reduction", ctypes.c_int32),
        ("stats", ctypes.c_void_p),
        ("loss", ctypes.c_void_p),
        ("grad_loss", ctypes.c_void_p),
        ("grad_strides", ctypes.c_int64 * 2),
        ("grad_student", ctypes.c_void_p),
    ]


def compiler_flags() -> list[str]:
    """As nvcc does, products are fused into additions where the machine can; undefined behaviour ends the process."""
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    flags += ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    cpu = Path("/proc/cpuinfo")
    if cpu.exists() and " fma " in cpu.read_text():
        flags += ["-mfma", "-ffp-contract=fast"]
    return flags


def build(compiler: str, folder: Path) -> ctypes.CDLL:
    library = folder / "libcuda_host.so"
    command = [compiler, *compiler_flags(), "-I", str(HERE), str(HERE / "driver.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    host = ctypes.CDLL(str(library))
    host.host_sizeof_kd_loss.restype = ctypes.c_int64
    host.host_workspace_bytes.restype = ctypes.c_int64
    host.host_status_text.restype = ctypes.c_char_p
    assert host.host_sizeof_kd_loss() == ctypes.sizeof(KdLoss)
    return host


class Guarded:
    """An output as torch would allocate it, 64-byte aligned and full of NaN, between two zones that must stay NaN."""

    def __init__(self, shape, dtype):
        count = int(torch.Size(shape).numel())
        self._whole = torch.full((count + 2 * GUARD,), torch.nan, dtype=dtype)
        self.tensor = self._whole[GUARD : GUARD + count].view(shape)

    def check(self):
        before, after = self._whole[:GUARD], self._whole[GUARD + self.tensor.numel() :]
        assert before.isnan().all() and after.isnan().all(), "written beside the output"


def _pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def to_float(host, x):
    out = torch.empty(x.shape)
    host.host_to_float(_pointer(x), _pointer(out), ctypes.c_int64(x.numel()), int(x.dtype == torch.float16))
    return out


def from_float(host, x, dtype):
    out = torch.empty(x.shape, dtype=dtype)
    host.host_from_float(_pointer(x), _pointer(out), ctypes.c_int64(x.numel()), int(dtype == torch.float16))
    return out


def _view(x):
    return LogitsView(x.data_ptr(), (ctypes.c_int64 * 3)(*x.stride()), DTYPE[x.dtype])


def run(host, student, teacher, grad=None, *, kind="kl", temperature=1.0, scale_t2=True, beta=0.5, mask=None,
        labels=None, alpha=1.0, ignore_index=-100, reduction="batchmean"):  # fmt: skip
    """The op on [O, I, V] logits: (loss, gradient of the student for the upstream gradient `grad`, 1 if None)."""
    outer, inner, classes = student.shape
    rows = temperature if isinstance(temperature, torch.Tensor) else None
    loss = Guarded((outer, inner) if reduction == "none" else (), torch.float32)
    stats = Guarded((outer * inner, 8), torch.float32)
    gradient = Guarded(student.shape, student.dtype)
    grad = torch.ones(loss.tensor.shape) if grad is None else grad
    op = KdLoss(
        _view(student), _view(teacher), _pointer(mask), _pointer(labels), _pointer(rows), outer, inner, classes,
        1.0 if rows is not None else temperature, beta, alpha, scale_t2, ignore_index, KIND[kind], REDUCTION[reduction],
        _pointer(stats.tensor), _pointer(loss.tensor), _pointer(grad),
        (ctypes.c_int64 * 2)(*(grad.stride() if grad.dim() else (0, 0))), _pointer(gradient.tensor),
    )  # fmt: skip
    workspace = Guarded((host.host_workspace_bytes(ctypes.byref(op)) // 4,), torch.float32)
    for status in (
        host.host_forward(ctypes.byref(op), _pointer(workspace.tensor)),
        host.host_backward(ctypes.byref(op)),
    ):
        assert status == 0, host.host_status_text(status).decode()
    for output in (loss, stats, gradient, workspace):
        output.check()
    return loss.tensor, gradient.tensor
