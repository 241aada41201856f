"""varlen_attention, for inference: schema and fake. Lengths are read inside, so that compiled encoders are not cut."""

import torch

from ._common import LIBRARY, define

define("varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int num_heads, float scale) -> Tensor")


@torch.library.register_fake("kdkernels::varlen_attention", lib=LIBRARY)
def _(q, k, v, cu_seqlens, num_heads, scale):
    return q.new_empty(q.shape)
