"""Queries and keys as the attention kernels see them: rows of one head of one sequence, through strides.

A view is (tensor, its strides of batch, head, token and feature, group), where `group` heads of the loss share one head
of the tensor (grouped queries). Tuples for kernels hold no tuples: Triton 3.6 loses what is constant in those, a stride
of 1, where a loop begins. A row has D features; where D is more than the SIZE of one head, a row holds all heads
side by side, and the product of two rows is the score summed over heads.

Which tokens belong to a sequence comes as (order, count, first). A padded batch has `order` and `count` (see
_common.py), packed sequences the position of their first token and `count`, a full batch none of them. No value is
read back to the host.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._common import LAUNCH, positions, token_order


@dataclass(frozen=True)
class Sequences:
    """How many sequences, a bound of their length, and (order, count, first)."""

    batch: int
    tokens: int
    places: tuple[torch.Tensor | None, ...]

    @property
    def count(self) -> torch.Tensor | None:
        return self.places[1]

    @property
    def packed(self) -> bool:
        return self.places[2] is not None


@triton.jit
def _bounds_kernel(cu_seqlens, first, count, total, longest):
    """One sequence per program. Bounds that no tensor can have are cut, so that nothing is read beyond it."""
    b = tl.program_id(0).to(tl.int64)
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + b).to(tl.int64), 0), total)
    end = tl.minimum(tl.load(cu_seqlens + b + 1).to(tl.int64), total)
    tl.store(first + b, begin)
    tl.store(count + b, tl.minimum(tl.maximum(end - begin, 0), longest).to(tl.int32))


def sequences_of(x, mask, cu_seqlens, max_seqlen) -> Sequences:
    """Of x [B, ..., N, d] with mask [B, N] or None, or of packed x [tokens, ...]."""
    if cu_seqlens is None:
        return Sequences(x.shape[0], x.shape[-2], (*token_order(mask), None))
    batch, cu_seqlens = cu_seqlens.shape[0] - 1, cu_seqlens.contiguous()
    first = cu_seqlens.new_empty(batch, dtype=torch.int64)
    count = cu_seqlens.new_empty(batch, dtype=torch.int32)
    _bounds_kernel[(batch,)](cu_seqlens, first, count, x.shape[0], max_seqlen, **LAUNCH)
    return Sequences(batch, max_seqlen, (None, count, first))


def view(x: torch.Tensor, group: int = 1) -> tuple:
    """[B, H, N, d], or packed [tokens, H, d]."""
    if x.dim() == 4:
        return x, *x.stride(), group
    return x, 0, x.stride(1), x.stride(0), x.stride(2), group


def row_strides(x: torch.Tensor, packed: bool, joined: bool) -> tuple[int, int, int]:
    """Those of [batch, head, token] in a tensor with a value per row of the maps, or several."""
    strides = x.stride()
    if joined:
        return (0, 0, strides[0]) if packed else (strides[0], 0, strides[1])
    return (0, strides[1], strides[0]) if packed else strides[:3]


def new_gradient(x: torch.Tensor, packed: bool) -> torch.Tensor:
    """For a kernel to fill; tokens behind the last packed sequence belong to no program."""
    return x.new_zeros(x.shape) if packed else x.new_empty(x.shape)


@triton.jit
def head_of(x, b, h, D: tl.constexpr, SIZE: tl.constexpr):
    """The rows of sequence b and head h of a view, or of all its heads: (pointer, strides of head, token and feature,
    group)."""
    pointer, of_batch, of_head, of_token, of_feature, group = x
    pointer += b * of_batch
    if SIZE == D:
        pointer += h // group * of_head
    return pointer, of_head, of_token, of_feature, group


@triton.jit
def row_address(head, at, column, D: tl.constexpr, SIZE: tl.constexpr, SPREAD: tl.constexpr, member):
    """Addresses [rows, columns] of rows `at`. Column c of joined heads lies in head c // SIZE * SPREAD + member."""
    pointer, of_head, of_token, of_feature, group = head
    column = column.to(tl.int64)
    if SIZE == D:
        offset = column * of_feature
    else:
        offset = (column // SIZE * SPREAD + member) // group * of_head + column % SIZE * of_feature
    return pointer + at[:, None] * of_token + offset[None, :]


@triton.jit
def load_tile(head, at, keep, first, D: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr):
    """Rows `at`, columns first ... first + BLOCK_D -> [rows, BLOCK_D], 0 where not kept."""
    column = first + tl.arange(0, BLOCK_D)
    address = row_address(head, at, column, D, SIZE, 1, 0)
    return tl.load(address, mask=keep[:, None] & (column < D)[None, :], other=0.0).to(DTYPE)


@triton.jit
def tokens_of(places, b, N):
    """The number of real tokens of sequence b."""
    if places[1] is None:
        tokens = N
    else:
        tokens = tl.load(places[1] + b)
    return tokens


@triton.jit
def first_of(places, b):
    """The position of sequence b's first token in its tensors."""
    if places[2] is None:
        first = 0
    else:
        first = tl.load(places[2] + b)
    return first


@triton.jit
def positions_of(places, b, start, N, BLOCK: tl.constexpr):
    """Slots start ... start + BLOCK of sequence b -> positions in its tensors, int64 [BLOCK]; slots past N give any."""
    return first_of(places, b) + positions(places[0], b, start, N, BLOCK)


@triton.jit
def written(places, tokens, N):
    """How many slots of a sequence have a place in the outputs: padding gets its zeros, what lies behind a packed
    sequence is another's."""
    return N if places[2] is None else tokens
