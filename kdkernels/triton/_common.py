"""What the Triton kernels share: registration, the order of real tokens and the final sum.

Padding is skipped by compaction. One small kernel turns mask [B, N] into `order` [B, N], the positions of the real
tokens first and of the padded ones after them, and `count` [B]; the other kernels walk through `order`, stop at
`count`, and write zeros to the positions behind it. Masks may have holes, nothing is read back to the host, and without
a mask both are None and cost nothing.

Every sum has a fixed order (a partial per tile, then one program), so results repeat bit by bit; no float atomics.
"""

import torch
import triton
import triton.language as tl

from ..ops._common import LIBRARY

# The default differs between Triton versions. Contracting c * a - c * b into an fma would round the two products
# differently, and identical inputs would no longer give exactly 0. Products inside tl.dot stay fused.
LAUNCH = {"enable_fp_fusion": False}


def register(op: str, function) -> None:
    """`function` becomes kdkernels::op for CUDA tensors; its launches go to the device of the first one."""

    def on_device_of_inputs(first, *rest):
        with torch.cuda.device_of(first[0] if isinstance(first, (list, tuple)) else first):
            return function(first, *rest)

    torch.library.impl(f"kdkernels::{op}", "CUDA", on_device_of_inputs, lib=LIBRARY)


@triton.jit
def _order_kernel(mask, order, count, N, BLOCK: tl.constexpr):
    """One batch per program: real positions grow from the front of its row of `order`, padded ones from the back."""
    b = tl.program_id(0).to(tl.int64)
    real_before = tl.zeros((), tl.int32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < N
        real = tl.load(mask + b * N + at, mask=inside, other=0).to(tl.int32)
        rank = real_before + tl.cumsum(real, 0) - real
        slot = tl.where(real != 0, rank, N - 1 - (at - rank))
        tl.store(order + b * N + slot, at, mask=inside)
        real_before += tl.sum(real, 0)
    tl.store(count + b, real_before)


def token_order(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """mask bool [B, N] -> (order int32 [B, N], count int32 [B]), or (None, None)."""
    if mask is None:
        return None, None
    batch, tokens = mask.shape
    order, count = mask.new_empty(mask.shape, dtype=torch.int32), mask.new_empty(batch, dtype=torch.int32)
    _order_kernel[(batch,)](mask.view(torch.uint8), order, count, tokens, BLOCK=1024, **LAUNCH)
    return order, count


@triton.jit
def positions(order, b, start, N, BLOCK: tl.constexpr):
    """Slots start ... start + BLOCK of batch b's order -> positions, int64 [BLOCK]; slots past N give 0."""
    at = start + tl.arange(0, BLOCK)
    if order is not None:
        at = tl.load(order + b * N + at, mask=at < N, other=0)
    return at.to(tl.int64)


@triton.jit
def mean_divisor(count, B, divisor, POWER: tl.constexpr):
    """divisor * sum over batches of count^POWER, at least 1; without a mask or for POWER 0 the host knows it all."""
    if count is None or POWER == 0:
        total = divisor
    else:
        tokens = tl.zeros((), tl.int64)
        for start in range(0, B, 256):
            b = start + tl.arange(0, 256)
            n = tl.load(count + b, mask=b < B, other=0).to(tl.int64)
            if POWER == 2:
                n *= n
            tokens += tl.sum(n, 0)
        total = tl.maximum(divisor * tokens, 1)
    return total


def host_divisor(mask: torch.Tensor | None, heads: int, batch: int, tokens: int, power: int) -> int:
    """heads * sum over batches of tokens^power, without the sum if there is a mask (`mean_divisor`); 1 for power 0."""
    if power == 0:
        return 1
    return max(heads * (1 if mask is not None else batch * tokens**power), 1)


@triton.jit
def _finish_kernel(partial, count, loss, size, B, divisor: tl.int64, POWER: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < size, other=0.0).to(tl.float64)
    tl.store(loss, (tl.sum(total, 0) / mean_divisor(count, B, divisor, POWER).to(tl.float64)).to(tl.float32))


def finish(partial: torch.Tensor, count: torch.Tensor | None, divisor: int, power: int) -> torch.Tensor:
    """sum(partial) / mean_divisor -> float32 scalar; float64 arithmetic in one program, rounded once."""
    loss = partial.new_empty((), dtype=torch.float32)
    batch = 0 if count is None else count.numel()
    _finish_kernel[(1,)](partial, count, loss, partial.numel(), batch, divisor, POWER=power, BLOCK=1024, **LAUNCH)
    return loss


def product(a, b):
    """a @ b [rows, columns] with float32 sums and result, operands in the wider of their dtypes."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if dtype == torch.float32 or not a.is_cuda:  # not on CUDA: interpreted
        return torch.mm(a.float(), b.float())
    return torch.mm(a, b, out_dtype=torch.float32)


def dot_dtype(*tensors: torch.Tensor) -> tl.dtype:
    """What tl.dot multiplies: the inputs' own 16-bit type where they agree (exact products), else float32."""
    dtypes = {t.dtype for t in tensors}
    if dtypes == {torch.bfloat16}:
        return tl.bfloat16
    return tl.float16 if dtypes == {torch.float16} else tl.float32
