"""The public losses, shaped like torch.nn.functional: student first, teacher second, gradients to the student only.

Shared by all: inputs float32, bfloat16 or float16 (mixed too), any strides, arithmetic and result in float32; float64
inputs run through `kdkernels.reference` and give float64. `mask` is bool or 0/1, 1 = real token, as transformers'
attention_mask; None = all real. Keys outside the mask are left out before any softmax, rows outside it count nowhere,
and no real row at all gives loss 0 and gradient 0. A row is one distribution: a row of logits, or one (batch, head,
query) of an attention map. Inside torch.func's transforms (grad, vmap, jvp) and forward-mode differentiation, for which
the kernels have no rules, the reference computes.

reduction: "batchmean" = sum / real rows, "sum", "none" = a value per row, 0 where masked, and for logits "mean" = sum /
(real rows x classes). Every function raises ValueError or TypeError naming the argument that does not fit, what was
given and what is accepted, and RuntimeError on a second derivative.
"""

from .attention import attention_kl, attention_mse, relation_kl
from .attention_map import attention_map_kl, attention_map_mse
from .hidden import gram_mse, hidden_cosine, hidden_mse, moment_mse
from .logits import kd_loss, linear_kd_loss, topk_kd_loss

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
    "relation_kl",
    "topk_kd_loss",
]
