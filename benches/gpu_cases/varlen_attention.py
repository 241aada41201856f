"""Attention of packed sequences, as an encoder has it: full batches, texts of mixed lengths, long ones, and float32,
which ours multiplies in bf16. Peers get what they work on, padded or nested, ready made."""

from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from kdkernels import reference

from ..roofline import Work
from . import OURS, Built, Case, lazily

HEADS, SIZE = 12, 64  # of BERT-base
PADDED, NESTED, VARLEN, FLASH = "torch sdpa padded", "torch sdpa nested", "torch varlen_attn", "flash-attn"


def _build(lengths, dtype, peers, device, small) -> Built:
    """q, k and v are thirds of one tensor [tokens, 3 * HEADS * SIZE], as a fused projection leaves them."""
    lengths = [min(length // 16, 32) for length in lengths[:4]] if small else list(lengths)
    generator = torch.Generator(device).manual_seed(0)
    joint = torch.randn(sum(lengths), 3, HEADS, SIZE, generator=generator, device=device).to(dtype)
    q, k, v = joint.unbind(1)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    arguments = [x.flatten(1) for x in (q, k, v)]
    calls = {OURS: lambda i: torch.ops.kdkernels.varlen_attention(*arguments, bounds, HEADS, SIZE**-0.5)}
    for name in peers:
        calls[name] = lazily(partial(PEERS[name], q, k, v, lengths, bounds))
    truth = reference.varlen_attention(*(x.double() for x in arguments), bounds, HEADS, SIZE**-0.5)
    moved = 4 * arguments[0].numel() * joint.element_size()
    return Built(calls, truth, Work(moved, 4 * HEADS * SIZE * sum(length**2 for length in lengths)))


def _padded(q, k, v, lengths, bounds):
    """A batch [B, H, N, d] with a mask of keys; where all are as long, none. Its real rows are taken out again."""
    batch = [pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v)]
    real = torch.arange(max(lengths), device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
    if real.all():
        return lambda i: F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1).flatten(1)
    mask, rows = real[:, None, None], real.flatten().nonzero().squeeze(1)
    return lambda i: F.scaled_dot_product_attention(*batch, mask).transpose(1, 2).flatten(0, 1).flatten(1)[rows]


def _nested(q, k, v, lengths, bounds):
    shortest, longest = min(lengths), max(lengths)
    nested = [
        torch.nested.nested_tensor_from_jagged(x.contiguous(), bounds, min_seqlen=shortest, max_seqlen=longest)
        for x in (q, k, v)
    ]
    heads = [x.transpose(1, 2) for x in nested]
    return lambda i: F.scaled_dot_product_attention(*heads).transpose(1, 2).values().flatten(1)


def _varlen(q, k, v, lengths, bounds):
    from torch.nn.attention.varlen import varlen_attn

    longest = max(lengths)
    return lambda i: varlen_attn(q, k, v, bounds, bounds, longest, longest).flatten(1)


def _flash(q, k, v, lengths, bounds):
    from flash_attn import flash_attn_varlen_func

    longest = max(lengths)
    return lambda i: flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest).flatten(1)


PEERS = {PADDED: _padded, NESTED: _nested, VARLEN: _varlen, FLASH: _flash}


def _case(name: str, why: str, lengths, dtype=torch.bfloat16) -> Case:
    peers = (PADDED,) if dtype == torch.float32 else tuple(PEERS)
    return Case("varlen_attention", name, why, partial(_build, lengths, dtype, peers), torch.bfloat16)


MIXED = tuple(16 + 37 * i % 113 for i in range(32))  # 77 on average

CASES = (
    _case("bf16_32x128", "BERT-base at 32 x 128", (128,) * 32),
    _case("bf16_32_mixed", "32 texts of 16 to 127 tokens", MIXED),
    _case("bf16_1x128", "one text: as fast as a launch", (128,)),
    _case("bf16_8x512", "BERT's longest texts", (512,) * 8),
    _case("bf16_2x4096", "long texts, where arithmetic is all", (4096,) * 2),
    _case("fp16_32x128", "fp16", (128,) * 32, torch.float16),
    _case("fp32_32x128", "float32, rounded to bf16 on its way in", (128,) * 32, torch.float32),
)
