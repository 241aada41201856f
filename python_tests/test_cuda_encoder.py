"""The encoder's CUDA kernels, compiled by the host compiler and run on the CPU: LayerNorm with codes, and all blocks as
csrc/cuda/encoder.cu queues them, against the CPU's encoder."""

import pytest
import torch

import kdkernels
from kdkernels.quant import Scheme, architectures, encoder, pack
from kdkernels.quant.encoder import run_blocks

from .cuda_host.encoder import Host
from .test_encoder import draw as draw_blocks
from .test_quantize import batch, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-12
# One segment, several; sums of codes or none.
READERS = [
    Scheme(),
    Scheme(8, "channel", symmetric=False),
    Scheme(8, "block", 32, symmetric=False),
    Scheme(4, "block", 32),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return Host(tmp_path_factory.mktemp("encoder"))


def draw(rows, columns, dtype=torch.float32, norm_dtype=torch.float32):
    """x, residual, weight, bias"""
    generator = torch.Generator().manual_seed(columns)
    x, residual = (torch.randn(rows, columns, generator=generator) * 3 + 1 for _ in range(2))
    weight, bias = (torch.randn(columns, generator=generator) for _ in range(2))
    return x.to(dtype), residual.to(dtype), weight.to(norm_dtype), bias.to(norm_dtype)


def truth(x, residual, weight, bias):
    y = x.double() + residual.double()
    return torch.nn.functional.layer_norm(y, y.shape[1:], weight.double(), bias.double(), EPS)


# Within a warp and up to its limit, a row for two warps, one that takes 64 columns a thread.
@pytest.mark.parametrize("columns", [1, 33, 768, 1024, 1500, 20000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize_rows(host, dtype, columns):
    """Values within fp32's rounding and that of the type; codes, scales and sums those of quantize_rows to the bit."""
    given = draw(3, columns, dtype, DTYPES[columns % 3])
    expected = truth(*given)
    limit = 2e-6 * expected.abs().max() + torch.finfo(dtype).eps / 2 * expected.abs()
    for scheme in READERS if columns in (33, 1500) else READERS[:1]:
        packed = pack(torch.randn(3, columns, generator=torch.Generator().manual_seed(1)), scheme)
        out, codes, scales, sums = host.normalize_rows(*given, EPS, packed)
        assert ((out.double() - expected).abs() <= limit).all()
        _, _, same_codes, same_scales, same_sums = host.quantize_rows(out, packed)
        assert torch.equal(codes, same_codes) and torch.equal(scales, same_scales) and torch.equal(sums, same_sums)
    assert torch.equal(host.normalize_rows(*given, EPS)[0], out)


def test_rows_that_are_not_in_use_are_not_touched(host):
    """Neither read, which NaN would show, nor written; more in use than there are is all of them."""
    given = draw(7, 96)
    packed = pack(torch.eye(3, 96), "int8")
    every = host.normalize_rows(*given, EPS, packed)
    given[0][3:], given[1][3:] = torch.nan, torch.nan
    for in_use in (3, 0):
        out, codes, scales, _ = host.normalize_rows(*given, EPS, packed, in_use)
        for got, whole, untouched in (
            (out, every[0], out.isnan()),
            (scales, every[2], scales.isnan()),
            (codes, every[1], codes == 99),
        ):
            assert torch.equal(got[:in_use], whole[:in_use]) and untouched[in_use:].all()
    assert torch.equal(host.normalize_rows(*draw(7, 96), EPS, packed, 9)[1], every[1])


def test_what_is_not_finite_stays_in_its_row(host):
    given = draw(4, 70)
    packed = pack(torch.eye(3, 70), "int8")
    clean = host.normalize_rows(*given, EPS, packed)
    given[0][1, 5], given[1][2, 7] = torch.nan, torch.inf
    out, codes, scales, _ = host.normalize_rows(*given, EPS, packed)
    assert out[1:3].isnan().all() and scales[1:3].isnan().all()
    assert torch.equal(out[::3], clean[0][::3]) and torch.equal(codes[::3], clean[1][::3])


# Lengths, features, heads, inner: less and more than a tile of 64, an empty text; the projections wider than f(W_up a).
SHAPES = [((5, 1, 0, 19), 48, 3, 80), ((70, 3), 64, 1, 100), ((9,), 96, 6, 40)]


def by_parts(host, x, cumulative, blocks, config) -> torch.Tensor:
    """The states behind the blocks, each part a call of its own."""
    states, heads = [], config.num_attention_heads
    for block in blocks:
        q, k, v = (host.linear(x, part.weight, part.bias) for part in (block.query, block.key, block.value))
        context = host.attention(q, k, v, cumulative, heads, (q.shape[1] // heads) ** -0.5)
        summed, norm = host.linear(context, block.output.weight, block.output.bias), block.attention_norm
        a = host.normalize_rows(summed, x, norm.weight, norm.bias, EPS)[0]
        inner = host.linear(a, block.up.weight, block.up.bias, activation="gelu")
        summed, norm = host.linear(inner, block.down.weight, block.down.bias), block.output_norm
        x = host.normalize_rows(summed, a, norm.weight, norm.bias, EPS)[0]
        states.append(x)
    return torch.stack(states)


CASES = [
    *((scheme, SHAPES[0], torch.float32) for scheme in READERS),
    *((READERS[0], shape, torch.float32) for shape in SHAPES[1:]),
    *((READERS[0], SHAPES[0], dtype) for dtype in DTYPES[1:]),
]


@pytest.mark.parametrize(("scheme", "shape", "dtype"), CASES)
@torch.no_grad()
def test_encoder(host, scheme, shape, dtype):
    """The bits that its parts give one by one, with room for more tokens than there are, which holds NaN; and what the
    CPU gives but for rounding, attention's in bf16 above all, which flips codes here and there."""
    x, cumulative, blocks, config = draw_blocks(shape, scheme, 2)
    on_cpu = torch.stack(run_blocks(x, cumulative, blocks, config, True))
    for block in blocks:
        for module in (*block.linears, block.attention_norm, block.output_norm):
            module.to(dtype)
    x = x.to(dtype)
    room = torch.cat((x, x.new_full((2 * len(x) + 7, x.shape[1]), torch.nan)))
    states = host.encoder(room, cumulative, blocks, config.num_attention_heads, "gelu", EPS, all_states=True)
    assert states[:, len(x) :].isnan().all()
    assert torch.equal(states[:, : len(x)], by_parts(host, x, cumulative, blocks, config))
    (last,) = host.encoder(x, cumulative, blocks, config.num_attention_heads, "gelu", EPS)
    assert torch.equal(last, states[1, : len(x)])
    error = (states[:, : len(x)].float() - on_cpu).abs()
    assert error.mean() < 1.5e-2 and error.max() < 0.2


@torch.no_grad()
def test_a_model(host, monkeypatch):
    """From padded texts and back, in bf16, as on a GPU, where the host never learns how many tokens are real."""
    model = kdkernels.quantize(tiny("roberta"), "int4").requires_grad_(False)
    inputs = batch(model.config)
    real, expected = inputs["attention_mask"].bool(), model(**inputs).last_hidden_state

    def run_on_host(x, cumulative, blocks, config, keep_all):
        activation, eps = architectures.activation(config), blocks[0].output_norm.eps
        return list(host.encoder(x, cumulative, blocks, config.num_attention_heads, activation, eps, keep_all))

    monkeypatch.setattr(encoder, "keeps_room", lambda device: True)
    monkeypatch.setattr(encoder, "run_blocks", run_on_host)
    got = model.bfloat16()(**inputs).last_hidden_state
    assert got.dtype == torch.bfloat16 and not got[~real].any()
    assert torch.nn.functional.cosine_similarity(got[real].float(), expected[real]).min() > 0.997
