"""The truth in plain torch, no tricks: tests and benches measure against it, and fp64 inputs run through it."""

from .attention_kl import attention_kl
from .attention_map_kl import attention_map_kl
from .attention_map_mse import attention_map_mse
from .attention_mse import attention_mse
from .hidden_mse import hidden_mse
from .kd_loss import kd_loss
from .relation_kl import relation_kl

__all__ = [
    "attention_kl",
    "attention_map_kl",
    "attention_map_mse",
    "attention_mse",
    "hidden_mse",
    "kd_loss",
    "relation_kl",
]
