"""varlen_attention, for inference: schema and fake. Lengths are read inside, so that compiled encoders are not cut.

softmax(scale q k^T) v of each head of sequences that lie end to end: q, k, v [tokens, heads * d], float32, bfloat16 or
float16, any strides; sequence b is tokens [cu_seqlens[b], cu_seqlens[b + 1]) (int32, on q's device).

On the CPU products are as exact as float32's, and cu_seqlens[-1] is the number of tokens. CUDA takes heads of up to
CUDA_HEAD_SIZE features, and one dtype for q, k and v. There float32 is rounded to bfloat16 for the products, while
sums and the softmax stay float32: errors are those of attention in bfloat16. Lengths stay on the device, and tokens
from cu_seqlens[-1] on are room for more: what they hold never matters, and what comes out there is not defined.
"""

import torch

from ._common import LIBRARY, define

CUDA_HEAD_SIZE = 128

define("varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int num_heads, float scale) -> Tensor")


@torch.library.register_fake("kdkernels::varlen_attention", lib=LIBRARY)
def _(q, k, v, cu_seqlens, num_heads, scale):
    return q.new_empty(q.shape)
