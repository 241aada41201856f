"""The truth in plain torch, no tricks: tests and benches measure against it, and fp64 inputs run through it."""

from .attention_kl import attention_kl
from .attention_map_kl import attention_map_kl
from .attention_map_mse import attention_map_mse
from .attention_mse import attention_mse
from .gram_mse import gram_mse
from .hidden_cosine import hidden_cosine
from .hidden_mse import hidden_mse
from .kd_loss import kd_loss
from .linear_kd_loss import linear_kd_loss
from .moment_mse import moment_mse
from .quant_linear import quant_linear
from .relation_kl import relation_kl
from .topk_kd_loss import topk_kd_loss
from .varlen_attention import varlen_attention

__all__ = [
    "attention_kl",
    "attention_map_kl",
    "attention_map_mse",
    "attention_mse",
    "gram_mse",
    "hidden_cosine",
    "hidden_mse",
    "kd_loss",
    "linear_kd_loss",
    "moment_mse",
    "quant_linear",
    "relation_kl",
    "topk_kd_loss",
    "varlen_attention",
]
