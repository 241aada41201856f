"""Opens the op libraries and tells which implementation each op uses.

The libraries bind to torch's stable ABI and to no Python, so `torch.ops.load_library` is all that is needed. The CPU
library is part of every build. The CUDA library is built where nvcc was found; Triton kernels are plain Python.
"""

import importlib.util
import os
from pathlib import Path

import torch
from torch.autograd import forward_ad

from . import ops

_PACKAGE = Path(__file__).parent
_TRITON_FAMILIES = {path.stem for path in (_PACKAGE / "triton").glob("[a-z]*.py")}  # not imported on a CPU build
_BF16_PRODUCTS = ("encoder", "quant_linear", "varlen_attention")  # of bfloat16 and float32 tensors, in CUDA C++
_ON_KD_LOSS = ("topk_kd_loss",)  # which call kd_loss, on CUDA its CUDA C++
_PRODUCTS = "KDKERNELS_CUDA_PRODUCTS"
_OLDEST = (7, 5)  # the compute capability from which on CUDA C++ runs
_NEWEST = 9  # and up to which products of 8-bit integers are written; above, tensor cores are others


def _library(name: str) -> Path | None:
    found = sorted(_PACKAGE.glob(f"libkdkernels_{name}.*"))
    return found[0] if found else None


def load() -> None:
    """Registers every implementation that this installation has."""
    cpu = _library("cpu")
    if cpu is None:
        raise ImportError(
            f"libkdkernels_cpu is missing from {_PACKAGE.name}/: the package was not built; run `make build` or "
            "`pip install .`"
        )
    torch.ops.load_library(str(cpu))
    if _library("cuda") is not None:
        torch.ops.load_library(str(_library("cuda")))
    if torch.version.cuda and _has_triton():  # half a second of import that a CPU build of torch never needs
        from . import triton  # noqa: F401  registers on import


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _missing(family: str) -> str:
    if family in _TRITON_FAMILIES and not _has_triton():
        return "triton is not installed"
    needs_library = family not in _TRITON_FAMILIES or family in _ON_KD_LOSS
    return "this installation was built without nvcc" if needs_library and _library("cuda") is None else ""


# Why no kernel of ours serves a family on CUDA tensors; empty where one does. Nothing of it changes while Python runs.
_MISSING_ON_CUDA = {family: _missing(family) for family in ops.FAMILIES}


_TOO_OLD: dict[int | None, str] = {}


@torch.compiler.assume_constant_result
def _too_old(index: int | None) -> str:
    """Why CUDA C++ does not run on this GPU; empty where it does."""
    if index not in _TOO_OLD:
        major, minor = torch.cuda.get_device_capability(index)
        _TOO_OLD[index] = f"compute capability {major}.{minor}, before sm_75" if (major, minor) < _OLDEST else ""
    return _TOO_OLD[index]


def _missing_on(family: str, index: int | None) -> str:
    """Why no kernel of ours serves the family on this GPU; empty where one does."""
    in_cuda = family not in _TRITON_FAMILIES or family in _ON_KD_LOSS
    return _MISSING_ON_CUDA[family] or (_too_old(index) if in_cuda else "")


def serves(family: str, device: torch.device) -> bool:
    """Whether a kernel of ours computes `family` on this device; the reference does everywhere else.

    So it does inside torch.func's transforms and forward-mode differentiation, which have no rules for the fused ops:
    torch would raise for grad, and drop tangents without a word.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return device.type == "cpu" or (device.type == "cuda" and not _missing_on(family, device.index))


def unpacks(device: torch.device) -> str:
    """Why products with quantised weights are torch's, of weights unpacked to bf16 and of activations as they are;
    empty where the kernels multiply with packed weights.

    The environment's KDKERNELS_CUDA_PRODUCTS, "int8" or "bf16", decides where it is set. RuntimeError if it is neither.
    """
    if device.type != "cuda":
        return ""
    forced = os.environ.get(_PRODUCTS, "")
    if forced not in ("", "int8", "bf16"):
        raise RuntimeError(f'{_PRODUCTS} must be "int8" or "bf16", got "{forced}"')
    if forced:
        return f"{_PRODUCTS}=bf16" if forced == "bf16" else ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"compute capability {major}.{minor}, above sm_90a" if major > _NEWEST else ""


def _isa() -> str:
    """The CPU kernels' instruction set and why; `_native`, which knows, may be of another Python than the libraries."""
    try:
        from . import _native
    except ImportError:
        return "(_native, which knows of which instruction set, was not built for this Python)"
    return f"{_native.isa()} ({_native.isa_reason()})"


def explain(model: torch.nn.Module | None = None) -> dict:
    """Which implementation serves each op on each device and why: {op: {device: text}}.

    Of a quantised model: {name of a module: how it runs and why}; "" is the model itself.
    """
    if model is not None:
        from .quant.quantize import explain as explain_model

        return explain_model(model)

    def on_cuda(family: str) -> str:
        current = torch.cuda.current_device() if torch.cuda.is_available() else None
        if missing := _MISSING_ON_CUDA[family] if current is None else _missing_on(family, current):
            return f"reference (torch): {missing}"
        if current is not None and family in ("encoder", "quant_linear"):
            if why := unpacks(torch.device("cuda", current)):
                return f"torch's bf16 products of unpacked weights: {why}"
        if current is not None and family in _BF16_PRODUCTS and torch.cuda.get_device_capability() < (8, 0):
            return "CUDA C++ (before sm_80 float products are on tensor cores in float16 alone)"
        return "Triton" if family in _TRITON_FAMILIES else "CUDA C++"

    isa = f"C++ {_isa()}"
    other = "reference (torch)"
    rest = "float64, torch.func, other devices"
    return {op: {"cpu": isa, "cuda": on_cuda(op), rest: other} for op in ops.FAMILIES}
