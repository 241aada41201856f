"""Quantised weights of 8 to 2 bits: `Scheme`, `pack`, `PackedWeight`, `linear`."""

from ._register import register as register_with_transformers
from .linear import linear
from .pack import pack
from .packed import PackedWeight
from .scheme import NAMED, Scheme

__all__ = ["NAMED", "PackedWeight", "Scheme", "linear", "pack", "register_with_transformers"]
