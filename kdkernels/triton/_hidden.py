"""What the Triton kernels on hidden states share: whole rows of like layers, in registers."""

import triton
import triton.language as tl


def row_tiles(width: int) -> dict:
    """Whole rows, about 4096 elements a program: 32 a thread of either state."""
    block = triton.next_power_of_2(width)
    return {"BLOCK_D": block, "BLOCK_R": max(1, 4096 // block), "num_warps": min(max(4, block // 1024), 32)}


def real_tokens(mask):
    return None if mask is None else mask.sum().view(1)


def alike(student, teacher) -> list[list[int]]:
    """Layers grouped by what one launch must share: shapes, strides and dtypes. Most models have one group."""
    groups = {}
    for layer, (s, t) in enumerate(zip(student, teacher, strict=True)):
        groups.setdefault((s.dtype, s.shape, s.stride(), t.dtype, t.shape, t.stride()), []).append(layer)
    return list(groups.values())


@triton.jit
def of_layer(pointers, layer):
    """pointers[layer] for a layer known at run time."""
    chosen = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        chosen = tl.where(layer == i, pointers[i], chosen)
    return chosen


@triton.jit
def own_rows(BLOCK_R: tl.constexpr):
    """The rows of a program, int64: there may be more than 2^31."""
    return tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)


@triton.jit
def load_rows(states, strides, row, inside, N, BLOCK_D: tl.constexpr):
    """Rows of states [B, N, D] -> float32 [rows, BLOCK_D], 0 where not `inside`; row = b N + n."""
    b, n = (row // N)[:, None], (row % N)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    address = states + b * strides[0] + n * strides[1] + column * strides[2]
    return tl.load(address, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(out, row, value, ROWS, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """value [rows, BLOCK_D] into contiguous [ROWS, D]."""
    column = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    address = out + row[:, None] * D + column
    tl.store(address, value.to(out.dtype.element_ty), mask=(row < ROWS)[:, None] & (column < D))
