"""quant_linear's CUDA kernels, compiled by the host compiler and run on the CPU, against the reference: codes and sums
to the bit, everything behind them within fp32's rounding. Where there is a GPU, the same cases run on it too."""

import pytest
import torch

from kdkernels import reference
from kdkernels.ops.quant_linear import ACTIVATION
from kdkernels.quant import Scheme, linear, pack
from kdkernels.reference.quant_linear import quantize_rows

from .cuda_host import PLACES, threads_reversed
from .cuda_host.quant_linear import Host
from .test_quant_linear import SCHEMES, assert_close, draw, magnitude, name

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows, in and out features: one, one more or less than a tile of 64 or 128, odd ones, more tiles than stages.
SHAPES = [(1, 64, 64), (65, 100, 63), (3, 33, 129), (130, 330, 2)]
A8 = [scheme for scheme in SCHEMES if scheme.activation_bits]
WEIGHT_ONLY = [scheme for scheme in SCHEMES if not scheme.activation_bits]
# Rows, in and out features, of each type: an incomplete unit of columns, columns split among blocks, two tiles of rows.
FLOATS = dict(zip(DTYPES, [(3, 330, 65), (2, 1100, 10), (33, 100, 63)], strict=True))


class Gpu:
    """The op on a GPU, called as `Host` is."""

    def linear(self, x, packed, bias=None, *, residual=None, **options):
        x, bias, residual = (None if t is None else t.cuda() for t in (x, bias, residual))
        return linear(x, packed.to("cuda"), bias, residual=residual, **options).cpu()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return Host(tmp_path_factory.mktemp("quant_linear"))


@pytest.fixture(params=PLACES)
def device(request):
    return request.getfixturevalue("host") if request.param == "host" else Gpu()


@pytest.mark.parametrize("scheme", A8, ids=name)
def test_scheme(device, scheme):
    for index, shape in enumerate(SHAPES):
        x, weight, bias, residual = draw(*shape)
        packed = pack(weight, scheme)
        options = {"activation": list(ACTIVATION)[index], "residual": residual}
        truth = reference.quant_linear(x, packed, bias, **options)
        assert_close(device.linear(x, packed, bias, **options), truth, magnitude(x, packed, bias, residual))


@pytest.mark.parametrize("scheme", WEIGHT_ONLY, ids=name)
def test_weight_only(device, scheme):
    """Weights are exact in every type, and float32 is the sum of its parts, so only sums and the output round."""
    for dtype, shape in FLOATS.items():
        x, weight, bias, residual = draw(*shape)
        x = x if dtype == torch.float32 else (x / x.abs().amax(1, keepdim=True)).to(dtype)
        packed = pack(weight, scheme)
        got = device.linear(x, packed, bias, activation="relu", residual=residual)
        truth = reference.quant_linear(x, packed, bias, activation="relu", residual=residual)
        rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        assert_close(got, truth, magnitude(x, packed, bias, residual), 1e-6 + rounding)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("scheme", WEIGHT_ONLY, ids=name)
def test_weight_only_of_many_rows(device, scheme, dtype):
    """The product of weights rounded to x's type, and no further from the truth than such a product of torch's is."""
    for columns, features in ((40, 9), (99, 70)):
        x, weight, bias, residual = draw(257, columns, features)
        x = (x / x.abs().amax(1, keepdim=True)).to(dtype)
        packed = pack(weight, scheme)
        got = device.linear(x, packed, bias, activation="relu", residual=residual)
        product = x.float() @ packed.dequantize(dtype).float().T
        rounding = 2 * torch.finfo(dtype).eps * (product.abs() + bias.abs() + residual.abs())
        assert ((got - (torch.relu(product + bias) + residual)).abs() <= rounding + 1e-5).all()


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_weight_only_sums_in_any_order_of_threads(host, bits):
    """Rows in any strides; the same bits whichever thread goes first, with columns split among blocks too."""
    scheme = Scheme(bits, "block" if bits < 8 else "channel", 32 if bits < 8 else None, activation_bits=None)
    x, weight, _, _ = draw(5, 1100, 70)
    packed, rows = pack(weight, scheme), x.bfloat16()
    expected = host.linear(rows, packed)
    for strided in (rows.T.contiguous().T, rows.repeat_interleave(2, 0)[::2]):
        assert torch.equal(host.linear(strided, packed), expected)
    with threads_reversed(host.library):
        assert torch.equal(host.linear(rows, packed), expected)


@pytest.mark.parametrize("bits", [8, 2])
def test_weight_only_keeps_what_is_not_finite_in_its_row(device, bits):
    """Large numbers stay finite in their parts."""
    x, weight, _, _ = draw(5, 70, 9)
    packed = pack(weight, Scheme(bits, activation_bits=None))
    clean = device.linear(x, packed)
    x[1, 5], x[2, 7], x[3] = torch.nan, torch.inf, 0
    x[3, 11] = 1.9999999 * 2.0**112
    y, weights = device.linear(x, packed), packed.dequantize()
    assert torch.equal(y[[0, 4]], clean[[0, 4]])
    assert y[1].isnan().all()
    zero = weights[:, 7] == 0
    assert y[2][zero].isnan().all() and torch.equal(y[2][~zero], weights[~zero, 7].sign() * torch.inf)
    torch.testing.assert_close(y[3].double(), x[3, 11].double() * weights[:, 11].double(), rtol=1e-6, atol=0)


def extremes(bits, rows, columns, features):
    """(x, packed, x W^T): sums are integers, the largest that there can be among them, and scales of x are 1."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(features, columns, generator=generator)
    weight[0] = 1.0
    x = torch.randint(-127, 128, (rows, columns), generator=generator).float()
    x[:, 0] = 127.0
    x[1:3] = torch.tensor([[127.0], [-127.0]])
    packed = pack(weight, Scheme(bits, "block", 32) if bits < 8 else Scheme())
    values, scales = packed.factors
    return x, packed, (x.double() @ values.double().T).float() * scales.view(1, -1)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tile", [32, 64, 128])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_integer_sums_are_exact(host, bits, tile, reverse):
    """To the bit, whichever thread goes first; of the small tile's four groups of warps, two have a turn less."""
    x, packed, expected = extremes(bits, 133 if tile > 32 else 37, 400 if tile > 32 else 1100, 75)
    conflicts = host.library.host_bank_conflicts()
    with threads_reversed(host.library, reverse):
        assert torch.equal(host.linear(x, packed, tile=tile), expected)
    assert host.library.host_bank_conflicts() == conflicts


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_integer_sums_of_few_rows_are_exact(host, bits, reverse):
    """Each warp has columns of its own, and two blocks share them."""
    x, packed, expected = extremes(bits, 11, 1100, 70)
    with threads_reversed(host.library, reverse):
        assert torch.equal(host.linear(x, packed), expected)


@pytest.mark.parametrize("columns", [1, 33, 1024, 1500, 9000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_the_reference_s(host, dtype, columns):
    """However long a row is, so however many threads share it; and in any strides."""
    generator = torch.Generator().manual_seed(columns)
    x = (torch.randn(columns, 5, generator=generator) * torch.logspace(-3, 3, 5)).to(dtype).T
    x[3] = 0
    packed = pack(torch.randn(3, columns, generator=generator), "int8")
    for rows in (x, x.contiguous(), x.contiguous()[::2]):
        _, _, codes, scales, _ = host.quantize_rows(rows, packed)
        expected, expected_scales = quantize_rows(rows)
        assert torch.equal(codes[:, :columns].float(), expected.float()) and not codes[:, columns:].any()
        assert torch.equal(scales, expected_scales.flatten())


def test_static_scale_clips(host):
    x, weight, _, _ = draw(5, 70, 9)
    packed = pack(weight, "int8")
    _, _, codes, _, _ = host.quantize_rows(x, packed, input_scale=0.01)
    assert torch.equal(codes[:, :70].float(), quantize_rows(x, 0.01)[0])


def test_what_is_not_finite_stays_in_its_row(device):
    x, weight, _, _ = draw(4, 70, 9)
    x = x / x.abs().amax(1, keepdim=True)
    clean = device.linear(x, packed := pack(weight, "int8"))
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    y = device.linear(x, packed)
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
    assert y[1].isnan().all()
    assert torch.equal(y[2], packed.factors[0][:, 7].sign() * torch.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATION)
def test_epilogue(device, activation, dtype):
    """Every activation and element type; a strided residual of another type."""
    x, weight, bias, residual = draw(9, 96, 70)
    x = (x / x.abs().amax(1, keepdim=True) * 8).to(dtype)
    packed = pack(weight, "int8")
    residual = residual.T.contiguous().T.half()
    got = device.linear(x, packed, bias.to(dtype), activation=activation, residual=residual)
    truth = reference.quant_linear(x, packed, bias.to(dtype), activation=activation, residual=residual)
    limit = {torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps / 2 + 1e-6)
    assert got.dtype == dtype
    assert_close(got, truth, magnitude(x, packed, bias.to(dtype), residual), limit)
