"""encoder: schema and fake; the blocks of a quantised encoder on packed tokens in one call, for inference.

weights and biases: query, key, value, output, up, down of each block in turn; norms: weight and bias of the norm behind
attention and of the one behind the block; layouts: of the weights (PackedWeight.layout). Returns the hidden state
behind every block, or [1, ...] behind the last.
"""

import torch

from ._common import LIBRARY, define

define(
    "encoder(Tensor x, Tensor cu_seqlens, Tensor[] weights, Tensor[] biases, Tensor[] norms, int num_heads, "
    "int activation, float eps, bool all_states, int[] layouts) -> Tensor"
)


@torch.library.register_fake("kdkernels::encoder", lib=LIBRARY)
def _(x, cu_seqlens, weights, biases, norms, num_heads, activation, eps, all_states, layouts):
    return x.new_empty((len(weights) // 6 if all_states else 1, *x.shape))
