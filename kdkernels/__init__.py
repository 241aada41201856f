"""Fused knowledge-distillation losses for PyTorch, as native kernels: see `kdkernels.functional` and `kdkernels.nn`."""

from . import _load

_load.load()

from . import functional, nn, quant, reference  # noqa: E402  the ops must exist before anything calls them
from ._load import explain  # noqa: E402

__version__ = "0.1.0"
__all__ = ["explain", "functional", "nn", "quant", "reference"]
