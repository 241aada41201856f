"""The Triton kernels, one file per op family; importing this package registers them for CUDA tensors."""

from . import (
    attention_kl,
    attention_map_kl,
    attention_map_mse,
    attention_mse,
    gram_mse,
    hidden_cosine,
    hidden_mse,
    linear_kd_loss,
    moment_mse,
    relation_kl,
    topk_kd_loss,
)

__all__ = [
    "attention_kl",
    "attention_map_kl",
    "attention_map_mse",
    "attention_mse",
    "gram_mse",
    "hidden_cosine",
    "hidden_mse",
    "linear_kd_loss",
    "moment_mse",
    "relation_kl",
    "topk_kd_loss",
]
