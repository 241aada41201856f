"""Tensors that span more than 2^32 elements without the memory for them: a few elements at offsets that neither a
signed nor an unsigned 32-bit number holds, in a mapping of which only the pages of those elements ever become real.

A kernel that computes an offset in 32 bits reads elsewhere in the mapping, where there are zeros, or outside of it.
"""

import mmap

import torch

SPAN = (1 << 32) + 1
# Python names it from 3.13 on. Without it the kernel may refuse a mapping larger than the machine's memory.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def far_apart(x: torch.Tensor, axis: int) -> torch.Tensor:
    """The same values, neighbours along `axis` so far apart that the last lies 2^32 elements or more from the first."""
    if x.shape[axis] < 2:
        raise ValueError(f"axis {axis} of {list(x.shape)} has no neighbours")
    stride = [0] * x.dim()
    near = 1
    for other in reversed(range(x.dim())):
        if other != axis:
            stride[other], near = near, near * x.shape[other]
    stride[axis] = -(-SPAN // (x.shape[axis] - 1)) + near
    span = near + (x.shape[axis] - 1) * stride[axis]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, span * x.element_size(), flags=flags)
    whole = torch.frombuffer(memory, dtype=x.dtype, count=span)
    return whole.as_strided(x.shape, stride).copy_(x)
