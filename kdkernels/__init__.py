"""Fused knowledge-distillation losses and quantised encoder inference for PyTorch, as native kernels.

`kdkernels.functional` and `kdkernels.nn` are the losses, `kdkernels.quantize` and `kdkernels.quant` the quantisation.
"""

from . import _load

_load.load()

from . import functional, nn, quant, reference  # noqa: E402  the ops must exist before anything calls them
from ._load import explain  # noqa: E402

quant.register_with_transformers()

__version__ = "0.1.0"
__all__ = ["explain", "functional", "nn", "quant", "quantize", "reference"]


def __getattr__(name: str):
    if name == "quantize":  # it needs the models of transformers, whose import takes longer than torch's
        from .quant.quantize import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
