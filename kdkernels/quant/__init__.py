"""Quantised weights of 8 to 2 bits: `Scheme`, `pack`, `PackedWeight`, `linear`; training with them (`prepare_qat`,
`convert`), and how many bits each layer needs (`hessian_sensitivity`, `allocate_bits`).
"""

import importlib

from ._register import register as register_with_transformers
from .bits import allocate_bits
from .linear import linear
from .pack import pack
from .packed import PackedWeight
from .scheme import NAMED, Scheme

__all__ = [
    "NAMED",
    "PackedWeight",
    "Scheme",
    "allocate_bits",
    "convert",
    "hessian_sensitivity",
    "linear",
    "pack",
    "prepare_qat",
    "register_with_transformers",
]

_NEED_TRANSFORMERS = {"convert": "qat", "hessian_sensitivity": "sensitivity", "prepare_qat": "qat"}


def __getattr__(name: str):
    if name in _NEED_TRANSFORMERS:  # whose models take longer to import than torch
        return getattr(importlib.import_module(f"{__name__}.{_NEED_TRANSFORMERS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
