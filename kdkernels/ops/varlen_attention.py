"""varlen_attention, for inference: schema and fake. Lengths are read inside, so that compiled encoders are not cut."""

import torch

from .. import reference
from ._common import LIBRARY, define

define("varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int num_heads, float scale) -> Tensor")
# CUDA has no kernel of its own yet: torch's, a call for each sequence, which waits for the device to learn the lengths.
torch.library.impl("kdkernels::varlen_attention", "CUDA", reference.varlen_attention, lib=LIBRARY)


@torch.library.register_fake("kdkernels::varlen_attention", lib=LIBRARY)
def _(q, k, v, cu_seqlens, num_heads, scale):
    return q.new_empty(q.shape)
