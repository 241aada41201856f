"""One file per op family: schema, fake, autograd. Importing this package defines them all."""

from . import (
    attention_kl,
    attention_map_kl,
    attention_map_mse,
    attention_mse,
    gram_mse,
    hidden_cosine,
    hidden_mse,
    kd_loss,
    linear_kd_loss,
    moment_mse,
    quant_linear,
    relation_kl,
    topk_kd_loss,
    varlen_attention,
)

FAMILIES = (
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
)

__all__ = [
    "FAMILIES",
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
