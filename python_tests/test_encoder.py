"""The fused encoder against the same blocks call by call: every ISA, schemes and shapes, what is not finite, threads,
opcheck, memory beside the inputs. test_quantize.py has whole models."""

import types

import pytest
import torch

from kdkernels.ops.quant_linear import ACTIVATION
from kdkernels.quant import Scheme
from kdkernels.quant.architectures import Block
from kdkernels.quant.encoder import run_block, run_blocks, why_not_fused
from kdkernels.quant.modules import QuantLinear

from .isa import PRESENT, on_isa
from .test_guard_pages import beside_a_guard

SCHEMES = [
    Scheme(),
    Scheme(8, "block", 32, False),
    Scheme(8, symmetric=False),
    Scheme(4, "block", 32, False),
    Scheme(2),
]
# Lengths, features, heads, inner features: one token; no text; widths that are no multiple of anything; several chunks;
# a group for each of two threads.
SHAPES = [
    ((1,), 64, 4, 128),
    ((5, 0, 17), 36, 3, 50),
    ((130, 600, 250), 32, 2, 70),
    ((0,), 32, 2, 64),
    ((200, 190, 30), 36, 3, 50),
]


def block(features, inner, scheme, seed=0) -> Block:
    generator = torch.Generator().manual_seed(seed)

    def dense(columns, rows):
        module = torch.nn.Linear(columns, rows)
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * columns**-0.5
        return QuantLinear.of(module, scheme)

    def norm():
        module = torch.nn.LayerNorm(features, eps=1e-12)
        for parameter in module.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        return module

    query, key, value, output = (dense(features, features) for _ in range(4))
    return Block(query, key, value, output, norm(), dense(features, inner), dense(inner, features), norm())


def draw(shape, scheme=SCHEMES[0], blocks=2):
    """x, cu_seqlens, blocks, config"""
    lengths, features, heads, inner = shape
    x = torch.randn(sum(lengths), features, generator=torch.Generator().manual_seed(1))
    cumulative = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    config = types.SimpleNamespace(num_attention_heads=heads, hidden_act="gelu")
    return x, cumulative, [block(features, inner, scheme, seed) for seed in range(blocks)], config


def arguments(x, cumulative, blocks, config, all_states=False) -> list:
    """What the op takes."""
    norms = [norm for block in blocks for norm in (block.attention_norm, block.output_norm)]
    return [
        x,
        cumulative,
        [part.weight.prepared for block in blocks for part in block.linears],
        [part.bias for block in blocks for part in block.linears],
        [parameter.detach() for norm in norms for parameter in (norm.weight, norm.bias)],
        config.num_attention_heads,
        ACTIVATION["gelu"],
        1e-12,
        all_states,
        [part.weight.layout for block in blocks for part in block.linears],
    ]


@torch.no_grad()
def check_values() -> None:
    """One block, token by token to rounding, but for few where it flips a code, which moves them by a step: one in a
    thousand on AVX2, none elsewhere. A mistake, be it of one percent in one factor, moves them all.
    """
    for scheme in SCHEMES:
        for shape in SHAPES:
            x, cumulative, blocks, config = draw(shape, scheme, 1)
            assert not why_not_fused(x, blocks, config)
            (got,) = run_blocks(x, cumulative, blocks, config, False)
            expected = run_block(x, cumulative, blocks[0], config, torch.bfloat16)
            assert got.shape == expected.shape
            error = (got - expected).abs().amax(1)
            assert (error < 0.1).all() and (error < 1e-5).sum() >= 0.95 * len(x), (scheme, shape)


@torch.no_grad()
def check_guards() -> None:
    """Nothing beside an input is touched: each lies against a forbidden page."""
    for scheme in SCHEMES:
        for side in ("behind", "before"):
            given = arguments(*draw(SHAPES[1], scheme))
            for index in range(2):
                given[index] = beside_a_guard(given[index], side)
            for index in range(2, 5):
                given[index] = [beside_a_guard(x, side) for x in given[index]]
            torch.ops.kdkernels.encoder(*given)


@pytest.mark.parametrize("isa", PRESENT)
def test_values_and_memory_on(isa):
    on_isa(isa, "test_encoder", "t.check_values(); t.check_guards()")


@torch.no_grad()
def test_states_of_all_blocks():
    given = draw(SHAPES[1], blocks=3)
    states = run_blocks(*given, True)
    assert len(states) == 3
    assert torch.equal(states[2], run_blocks(*given, False)[0])
    x, cumulative, blocks, config = given
    assert torch.equal(states[0], run_blocks(x, cumulative, blocks[:1], config, False)[0])


@torch.no_grad()
def test_texts_do_not_see_each_other():
    x, cumulative, blocks, config = draw(((40, 7, 500), 64, 4, 128))
    clean = run_blocks(x, cumulative, blocks, config, False)[0]
    for bad in (torch.nan, torch.inf):
        dirty = x.clone()
        dirty[42, 3] = bad
        got = run_blocks(dirty, cumulative, blocks, config, False)[0]
        assert got[40:47].isnan().all()
        assert torch.equal(got[:40], clean[:40]) and torch.equal(got[47:], clean[47:])
    alone = run_blocks(x[47:], torch.tensor([0, 500], dtype=torch.int32), blocks, config, False)[0]
    assert torch.equal(alone, clean[47:])


@torch.no_grad()
@pytest.mark.parametrize(
    "lengths", [(200, 3, 333), (150, 0, 160, 90, 200)]
)  # in phases on 2 and 3 threads; in groups on 2
def test_threads_do_not_show(lengths):
    given = draw((lengths, 64, 4, 128), Scheme(8, symmetric=False))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_blocks(*given, False)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_what_it_does_not_take_runs_call_by_call():
    for scheme in (Scheme(activation_bits=None), Scheme(8, "in", 16)):
        x, _, blocks, config = draw(SHAPES[0], scheme)
        assert why_not_fused(x, blocks, config)
    x, _, blocks, config = draw(SHAPES[0])
    assert not why_not_fused(x, blocks, config)
    assert why_not_fused(x.double(), blocks, config) and why_not_fused(x.bfloat16(), blocks, config)
    blocks[1].up.bias = None
    assert why_not_fused(x, blocks, config)


def test_a_gradient_is_refused():
    x, *rest = draw(SHAPES[0])
    with pytest.raises(RuntimeError, match="no gradient"):
        run_blocks(x.requires_grad_(), *rest, False)


@pytest.mark.parametrize("all_states", [False, True])
def test_opcheck(all_states):
    torch.library.opcheck(torch.ops.kdkernels.encoder.default, tuple(arguments(*draw(SHAPES[1]), all_states)))


@torch.no_grad()
def test_compiles_without_a_break():
    x, cumulative, blocks, config = draw(SHAPES[1])

    def encode(x):
        return 2 * run_blocks(x, cumulative, blocks, config, False)[0]

    torch._dynamo.reset()
    expected = encode(x)  # weights are laid out at the first call, which is not to be traced
    assert torch.equal(torch.compile(encode, fullgraph=True)(x), expected)


def _swap(given, index, place, value):
    given[index] = [*given[index][:place], value, *given[index][place + 1 :]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.__setitem__(0, g[0].t()), "x must be contiguous"),
        (lambda g: g.__setitem__(0, g[0][:, :-1].contiguous()), "as many columns"),
        (lambda g: g.__setitem__(0, g[0][1:]), "cu_seqlens must rise"),
        (lambda g: g[2].pop(), "a block has 6 weights"),
        (lambda g: g.__setitem__(5, 5), "num_heads must divide"),
        (lambda g: g.__setitem__(6, 9), "activation is unknown"),
        (lambda g: (_swap(g, 2, 1, g[2][4]), _swap(g, 3, 1, g[3][4])), "projections must have one shape"),
        (lambda g: _swap(g, 2, 5, g[2][3]), "as many columns"),
        (lambda g: _swap(g, 2, 3, g[2][3][:-64].clone()), "weight has not the size"),
        (lambda g: _swap(g, 3, 4, g[3][0]), "bias must be contiguous"),
        (lambda g: _swap(g, 4, 2, g[4][2][1:]), "norms must be contiguous"),
    ],
)
def test_the_op_protects_memory(change, message):
    given = arguments(*draw(SHAPES[1]))
    change(given)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kdkernels.encoder(*given)
