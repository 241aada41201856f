"""Opens the op libraries and tells which implementation each op uses.

The libraries bind to torch's stable ABI and to no Python, so `torch.ops.load_library` is all that is needed. The CPU library is
part of every build. The CUDA library is built where nvcc was found; Triton kernels are plain Python.
"""

import importlib.util
from pathlib import Path

import torch

from . import ops

_PACKAGE = Path(__file__).parent
_TRITON_FAMILIES = ("attention_kl", "attention_mse", "hidden_mse", "relation_kl")


def _library(name: str) -> Path | None:
    found = sorted(_PACKAGE.glob(f"libkdkernels_{name}.*"))
    return found[0] if found else None


def load() -> None:
    """Registers every implementation that this installation has."""
    cpu = _library("cpu")
    if cpu is None:
        raise ImportError(
            f"libkdkernels_cpu is missing from {_PACKAGE.name}/: the package was not built; run `make build` or `pip install .`"
        )
    torch.ops.load_library(str(cpu))
    if _library("cuda") is not None:
        torch.ops.load_library(str(_library("cuda")))
    if importlib.util.find_spec("triton") is not None:
        from . import triton  # noqa: F401  registers on import


def explain() -> dict[str, dict[str, str]]:
    """Which implementation serves each op on each device and why: {op: {device: text}}."""
    from . import _native

    isa = f"C++ {_native.isa()} ({_native.isa_reason()})"
    if importlib.util.find_spec("triton") is None:
        triton = "none: triton is not installed"
    else:
        triton = "Triton"
    cuda = "CUDA C++" if _library("cuda") is not None else "none: built without nvcc"
    return {
        family: {"cpu": isa, "cuda": triton if family in _TRITON_FAMILIES else cuda, "float64 and other devices": "reference (torch)"}
        for family in ops.FAMILIES
    }
