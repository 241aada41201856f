"""Builds the CUDA kernels for the CPU (see cuda_runtime.h here) and calls them as csrc/torch/kd_loss_cuda.cpp does."""

import ctypes
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kdkernels.ops._common import KIND, REDUCTION

HERE = Path(__file__).parent
DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PLACES = ["host", "gpu"] if torch.cuda.is_available() else ["host"]  # where the tests of a kernel's values run it
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
        ("past_cache", ctypes.c_bool),
    ]


class Guarded:
    """An output as torch would allocate it, full of NaN, between two zones that must stay NaN."""

    def __init__(self, shape, dtype):
        count = torch.Size(shape).numel()
        self._whole = torch.full((count + 2 * GUARD,), torch.nan, dtype=dtype)
        self.tensor = self._whole[GUARD : GUARD + count].view(shape)

    def finished(self) -> torch.Tensor:
        before, after = self._whole[:GUARD], self._whole[GUARD + self.tensor.numel() :]
        assert before.isnan().all() and after.isnan().all(), "written beside the output"
        return self.tensor


def _pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _view(x):
    return LogitsView(x.data_ptr(), (ctypes.c_int64 * 3)(*x.stride()), DTYPE[x.dtype])


def _describe(student, teacher, mask, labels, row_temperature, kind, temperature, scale_t2, beta, alpha, ignore_index,
              reduction) -> KdLoss:  # fmt: skip
    return KdLoss(
        _view(student), _view(teacher), _pointer(mask), _pointer(labels), _pointer(row_temperature), *student.shape,
        temperature, beta, alpha, scale_t2, ignore_index, kind, reduction
    )  # fmt: skip


# Kernels read and write 16 bytes of any type at once, which nvcc's rules of aliasing allow. Each library keeps its own
# variables: its shared memory is what lies within its own bounds.
FLAGS = ("-std=c++20", "-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fPIC", "-shared", "-fno-strict-aliasing",
         "-fno-gnu-unique", "-fsanitize=undefined", "-fno-sanitize-recover=all")  # fmt: skip


def build(source: str, folder: Path, *others: str, int64=(), structs=(), arch: int = 90) -> ctypes.CDLL:
    """Files of this folder, which include kernels, compiled for the CPU. Undefined behaviour ends the process.

    `arch`: the GPU whose instructions and limits kernels find: 75 for sm_75. Where the machine can, products are fused
    into additions, as nvcc does. Functions of the names in `int64` return one, and host_sizeof_NAME of {NAME: struct}
    says that the struct here is as large as theirs.
    """
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = folder / f"lib{Path(source).stem}.so"
    cpu = Path("/proc/cpuinfo")
    fused = ("-mfma", "-ffp-contract=fast") if cpu.exists() and " fma " in cpu.read_text() else ()
    command = [
        compiler,
        *FLAGS,
        *fused,
        f"-DCUDA_HOST_ARCH={arch * 10}",
        "-I",
        HERE,
        "-o",
        library,
        "-x",
        "c++",
        *(HERE / name for name in (source, *others)),
    ]
    subprocess.run(list(map(str, command)), check=True)
    host = ctypes.CDLL(str(library))
    host.host_status_text.restype = ctypes.c_char_p
    for name in int64:
        getattr(host, name).restype = ctypes.c_int64
    for name, struct in dict(structs).items():
        size = getattr(host, f"host_sizeof_{name}")
        size.restype = ctypes.c_int64
        assert size() == ctypes.sizeof(struct)
    return host


def build_torch_side(folder: Path) -> Path:
    """torch_side.cpp with all kernels, unoptimised, to be loaded where it shall serve CPU tensors."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library, of_torch = folder / "libtorch_side.so", Path(torch.__file__).parent
    flags = [flag for flag in FLAGS if not flag.startswith(("-O", "-fsanitize", "-fno-sanitize"))]
    command = [
        *(compiler, *flags, "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"),
        *("-I", HERE, "-isystem", of_torch / "include", "-o", library, "-x", "c++", HERE / "torch_side.cpp"),
        *sorted((HERE.parent.parent / "csrc" / "cuda").glob("*.cu")),
        *("-x", "none", "-Wl,-Bsymbolic", "-L", of_torch / "lib", "-ltorch_cpu"),
    ]
    subprocess.run(list(map(str, command)), check=True)
    return library


@contextmanager
def threads_reversed(host: ctypes.CDLL, reverse: bool = True):
    """Inside, the threads of a block run in descending order, unless not `reverse`."""
    host.host_reverse_threads(reverse)
    try:
        yield
    finally:
        host.host_reverse_threads(False)


def check(host: ctypes.CDLL, status: int) -> None:
    """RuntimeError with the status' text unless it is 0."""
    if status != 0:
        raise RuntimeError(host.host_status_text(status).decode())


class Host:
    """kd_loss's kernels on the CPU."""

    def __init__(self, folder: Path):
        self.library = build("driver.cpp", folder, int64=["host_workspace_bytes"], structs={"kd_loss": KdLoss})

    def _check(self, status: int) -> None:
        check(self.library, status)

    def kd_loss(self, student, *arguments):
        """The op kdkernels::kd_loss: (loss, stats)."""
        op = _describe(student, *arguments)
        rows = tuple(student.shape[:2])
        loss = Guarded(rows if op.reduction == REDUCTION["none"] else (), torch.float32)
        stats = Guarded((rows[0] * rows[1], 8), torch.float32)
        workspace = Guarded((self.library.host_workspace_bytes(ctypes.byref(op)) // 4,), torch.float32)
        op.stats, op.loss = _pointer(stats.tensor), _pointer(loss.tensor)
        self._check(self.library.host_forward(ctypes.byref(op), _pointer(workspace.tensor)))
        workspace.finished()
        return loss.finished(), stats.finished()

    def kd_loss_backward(self, grad, student, teacher, mask, labels, row_temperature, stats, *scalars):
        """The op kdkernels::kd_loss_backward: the student's gradient."""
        op = _describe(student, teacher, mask, labels, row_temperature, *scalars)
        gradient = Guarded(student.shape, student.dtype)
        op.stats, op.grad_loss, op.grad_student = _pointer(stats), _pointer(grad), _pointer(gradient.tensor)
        op.grad_strides[:] = grad.stride() if grad.dim() else (0, 0)
        self._check(self.library.host_backward(ctypes.byref(op)))
        return gradient.finished()

    def run(self, student, teacher, grad=None, *, kind="kl", temperature=1.0, scale_t2=True, beta=0.5, mask=None,
            labels=None, alpha=1.0, ignore_index=-100, reduction="batchmean"):  # fmt: skip
        """Loss and gradient of the student, [O, I, V], for the upstream gradient `grad` (None: 1)."""
        rows = temperature if isinstance(temperature, torch.Tensor) else None
        tensors = (student, teacher, mask, labels, rows)
        scalars = (KIND[kind], 1.0 if rows is not None else temperature, scale_t2, beta, alpha, ignore_index,
                   REDUCTION[reduction])  # fmt: skip
        loss, stats = self.kd_loss(*tensors, *scalars)
        grad = torch.ones_like(loss) if grad is None else grad
        return loss, self.kd_loss_backward(grad, *tensors, stats, *scalars)

    def diverge(self, at: str) -> None:
        """Runs a kernel whose threads never all meet at a "barrier" or a "shuffle"; raises."""
        self._check(self.library.host_diverge(int(at == "shuffle")))

    def to_float(self, x):
        out = torch.empty(x.shape)
        self.library.host_to_float(_pointer(x), _pointer(out), ctypes.c_int64(x.numel()), int(x.dtype == torch.float16))
        return out

    def from_float(self, x, dtype):
        out = torch.empty(x.shape, dtype=dtype)
        self.library.host_from_float(_pointer(x), _pointer(out), ctypes.c_int64(x.numel()), int(dtype == torch.float16))
        return out
