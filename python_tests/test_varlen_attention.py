"""Attention on packed tokens: every ISA against float64, what is not finite, threads, memory beside the inputs."""

import pytest
import torch

from kdkernels import reference

from .isa import PRESENT, on_isa
from .test_guard_pages import beside_a_guard

# Lengths of the sequences, heads, size of a head: empty ones, one token, more than a block of queries or of keys.
SHAPES = [((5,), 2, 16), ((1, 0, 300, 97), 3, 20), ((128, 128), 2, 64), ((0,), 1, 8), ((), 1, 8), ((17, 3), 1, 5)]
ROUNDING = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def draw(lengths, heads, size, dtype=torch.float32, seed=0):
    """q, k, v, cu_seqlens, heads, scale; scores spread over some +-30."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(sum(lengths), heads * size, generator=generator).mul(2).to(dtype) for _ in range(3))
    cumulative = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return q, k, v, cumulative, heads, size**-0.5


def attention(q, k, v, cumulative, heads, scale):
    return torch.ops.kdkernels.varlen_attention(q, k, v, cumulative, heads, scale)


def assert_close(got, q, k, v, *rest) -> None:
    truth = reference.varlen_attention(q.double(), k.double(), v.double(), *rest)
    assert ((got.double() - truth).abs() <= 4e-5 + ROUNDING[got.dtype] * truth.abs()).all()


def check_values() -> None:
    for shape in SHAPES:
        for dtype in ROUNDING:
            arguments = draw(*shape, dtype)
            got = attention(*arguments)
            assert got.dtype == dtype and got.shape == arguments[0].shape
            assert_close(got, *arguments)


def check_guards() -> None:
    """Nothing beside an input is touched: each lies against a forbidden page."""
    for shape in SHAPES:
        for dtype in ROUNDING:
            for side in ("behind", "before"):
                q, k, v, cumulative, *rest = draw(*shape, dtype)
                attention(*(beside_a_guard(x, side) for x in (q, k, v, cumulative)), *rest)


@pytest.mark.parametrize("isa", PRESENT)
def test_values_and_memory_on(isa):
    on_isa(isa, "test_varlen_attention", "t.check_values(); t.check_guards()")


def test_strides_are_followed():
    q, k, v, *rest = draw((9, 4), 2, 8)
    joint = torch.stack([q, k, v], 1)
    assert torch.equal(attention(*joint.unbind(1), *rest), attention(q, k, v, *rest))
    assert torch.equal(attention(q.t().contiguous().t(), k, v, *rest), attention(q, k, v, *rest))


def test_a_sequence_does_not_see_the_others():
    """Neither their values, NaN included, nor their number."""
    q, k, v, cumulative, *rest = draw((7, 130, 5), 2, 16)
    k[3], v[140] = torch.nan, torch.inf
    got = attention(q, k, v, cumulative, *rest)
    assert got[:7].isnan().all() and got[7:137].isfinite().all() and not got[137:].isfinite().any()
    alone = (x[7:137] for x in (q, k, v))
    assert torch.equal(attention(*alone, torch.tensor([0, 130], dtype=torch.int32), *rest), got[7:137])


def test_scores_of_minus_infinity():
    """A whole block of keys of them weighs nothing; where there is nothing else, there is no softmax."""
    q, k, v, cumulative, *rest = draw((300,), 1, 8)
    q, k = q.abs(), k.abs()
    k[:260, 0] = -torch.inf
    assert_close(attention(q, k, v, cumulative, *rest), q, k, v, cumulative, *rest)
    k[:, 0] = -torch.inf
    assert attention(q, k, v, cumulative, *rest).isnan().all()


def test_threads_do_not_show():
    arguments = draw((100, 3, 250), 3, 16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(attention(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_opcheck():
    torch.library.opcheck(torch.ops.kdkernels.varlen_attention.default, draw((4, 0, 3), 2, 8))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (1, torch.zeros(13, 15), r"k must be \[tokens"),
        (2, torch.zeros(12, 16), r"v must be \[tokens"),
        (0, torch.zeros(13, 16, dtype=torch.int32), "q must be float32"),
        (3, torch.tensor([0, 9, 13]), "cu_seqlens must be contiguous int32"),
        (3, torch.tensor([0, 9, 14], dtype=torch.int32), "cu_seqlens must rise"),
        (3, torch.tensor([0, 14, 13], dtype=torch.int32), "cu_seqlens must rise"),
        (4, 3, "num_heads must divide"),
        (4, 0, "num_heads must divide"),
        (5, 0.0, "scale must be > 0"),
    ],
)
def test_errors(index, value, message):
    arguments = list(draw((9, 4), 2, 8))
    arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        attention(*arguments)
