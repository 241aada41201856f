"""Quantised linears: every scheme on every ISA against the reference, integer sums to the bit, what is not finite,
torch.compile, threads, memory beside the inputs."""

import threading

import pytest
import torch

from kdkernels import reference
from kdkernels.ops.quant_linear import ACTIVATION
from kdkernels.quant import Scheme, linear, pack
from kdkernels.reference.quant_linear import quantize_rows

from .isa import OWN, PRESENT, on_isa
from .test_guard_pages import beside_a_guard

SIZES = {"channel": None, "out": 6, "in": 10, "block": 64}
SCHEMES = [
    Scheme(bits, group, SIZES[group], symmetric, activation_bits)
    for bits in (8, 4, 3, 2)
    for group in SIZES
    for symmetric in (True, False)
    for activation_bits in (8, None)
]
SCHEMES.append(Scheme(8, "block", 32))  # half of what a tile takes at once
# Rows, in and out features: one, one more or less than a tile, a panel, a chunk of columns; more rows than a block.
SHAPES = [(1, 64, 64), (7, 100, 65), (13, 33, 3), (3, 1100, 130), (250, 96, 70)]


def name(scheme: Scheme) -> str:
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    return f"{scheme.bits}-{scheme.group}-{kind}-{'weight_only' if scheme.activation_bits is None else 'a8'}"


def draw(rows, columns, features, seed=0):
    """(x, weight, bias, residual), with rows of x and weight of very different size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    weight = torch.randn(features, columns, generator=generator) * torch.rand(features, 1, generator=generator)
    return x, weight, torch.randn(features, generator=generator), torch.randn(rows, features, generator=generator)


def magnitude(x, packed, bias, residual) -> torch.Tensor:
    """What rounding errors of an output are relative to: the sum of its terms' magnitudes, codes' rounding included."""
    x = x.double().abs()
    return (x + x.amax(-1, keepdim=True) / 254) @ packed.dequantize().double().abs().T + bias.abs() + residual.abs()


def assert_close(got, truth, scale, limit=1e-6):
    assert ((got.double() - truth).abs() <= limit * scale).all()


def check_scheme(scheme: Scheme) -> None:
    for index, shape in enumerate(SHAPES):
        x, weight, bias, residual = draw(*shape)
        packed = pack(weight, scheme)
        activation = list(ACTIVATION)[index]
        options = {"activation": activation, "residual": residual}
        truth = reference.quant_linear(x, packed, bias, **options)
        assert_close(linear(x, packed, bias, **options), truth, magnitude(x, packed, bias, residual))


def check_integers() -> None:
    """Sums of products are integers: with scales of 1 they come out to the bit, the largest that there can be too; of
    few rows, each number of which has a kernel of its own, as of many."""
    schemes = [Scheme(), *(Scheme(bits, "block", 64, symmetric) for bits in (4, 3, 2) for symmetric in (True, False))]
    for scheme in schemes:
        for columns in (64, 1100, 3072):
            generator = torch.Generator().manual_seed(columns)
            weight = torch.randn(70, columns, generator=generator)
            weight[0] = 1.0  # every code at its end
            weight[1, ::2], weight[1, 1::2] = 1.0, -1.0  # and at both
            x = torch.randint(-127, 128, (40, columns), generator=generator).float()
            x[:, 0] = 127.0  # so that scales are 1
            x[1:3] = torch.tensor([[127.0], [-127.0]])
            packed = pack(weight, scheme)
            values, scales = packed.factors
            sums = (x.double() @ values.double().T).to(torch.int64)
            expected = sums.float() * scales.view(1, -1)
            for rows in (*(slice(1, 1 + n) for n in range(1, 7)), slice(2, 3), slice(0, 16), slice(0, 40)):
                assert torch.equal(linear(x[rows], packed), expected[rows]), (scheme, columns, rows)


def check_guards() -> None:
    """Nothing beside an input is touched: each lies against a forbidden page."""
    for scheme in (
        Scheme(),
        Scheme(8, "in", 10, False),
        Scheme(4, "block", 32, False),
        Scheme(3, "block", activation_bits=None),
    ):
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                for side in ("behind", "before"):
                    x, weight, bias, residual = (t.to(dtype) for t in draw(*shape))
                    packed = pack(weight, scheme)
                    # A prepared weight is aligned to 64 bytes and a multiple of them: its end meets the page exactly.
                    packed.prepared = beside_a_guard(packed.prepared, side)
                    linear(
                        *(beside_a_guard(x, side), packed, beside_a_guard(bias, side)),
                        residual=beside_a_guard(residual, side),
                    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_scheme(scheme):
    check_scheme(scheme)


@pytest.mark.parametrize("isa", [isa for isa in PRESENT if isa != OWN])
def test_schemes_on(isa):
    on_isa(isa, "test_quant_linear", "for scheme in t.SCHEMES: t.check_scheme(scheme)")


@pytest.mark.parametrize("isa", PRESENT)
def test_integer_sums_are_exact_on(isa):
    on_isa(isa, "test_quant_linear", "t.check_integers()")


@pytest.mark.parametrize("isa", PRESENT)
def test_memory_beside_the_inputs_on(isa):
    on_isa(isa, "test_quant_linear", "t.check_guards()")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATION)
def test_activations(activation, dtype):
    x, weight, bias, residual = draw(40, 96, 70)
    x = (x / x.abs().amax(1, keepdim=True) * 8).to(dtype)
    packed = pack(weight, "int8")
    bias, residual = bias.to(dtype), residual.to(dtype)
    got = linear(x, packed, bias, activation=activation, residual=residual)
    assert got.dtype == dtype
    truth = reference.quant_linear(x, packed, bias, activation=activation, residual=residual)
    rounding = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]  # of the output
    assert_close(got, truth, magnitude(x, packed, bias, residual), 1e-6 + rounding)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "tanh"])
def test_activation_alone(activation):
    """A weight of ones and one column: the output is the function of the bias, with no product around it."""
    bias = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-20, 60.0, -60.0])])
    packed = pack(torch.ones(len(bias), 1), "int8")
    got = linear(torch.zeros(1, 1), packed, bias, activation=activation)[0].double()
    truth = reference.quant_linear(torch.zeros(1, 1), packed, bias.double(), activation=activation)[0]
    assert ((got - truth).abs() <= 4e-7 * truth.abs().clamp_min(1.0)).all()


@pytest.mark.usefixtures("one_thread")
def test_layouts():
    """Strides are followed, and leading dimensions stay."""
    x, weight, bias, _ = draw(24, 40, 30)
    packed = pack(weight, "int8")
    flat = linear(x, packed, bias)
    assert torch.equal(linear(x.view(2, 3, 4, 40), packed, bias), flat.view(2, 3, 4, 30))
    assert torch.equal(linear(x[0], packed, bias), flat[0])
    assert torch.equal(linear(x.t().contiguous().t(), packed, bias), flat)
    assert torch.equal(linear(x.view(6, 4, 40)[:, 0], packed, bias), flat.view(6, 4, 30)[:, 0])
    assert torch.equal(linear(x.view(6, 4, 40).transpose(0, 1), packed, bias), flat.view(6, 4, 30).transpose(0, 1))
    residual = torch.randn(30, 24).t()
    assert torch.equal(linear(x, packed, bias, residual=residual), flat + residual)
    assert linear(x[:0], packed, bias).shape == (0, 30)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("input_scale", [None, 0.05])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_what_is_not_finite_stays_in_its_row(scheme, input_scale):
    x, weight, _, _ = draw(8, 64, 20)
    packed = pack(weight, scheme)
    clean = linear(x, packed, input_scale=input_scale)
    x[1, 3], x[2, 5], x[3, 7], x[4] = torch.nan, torch.inf, -torch.inf, 0.0
    x[5], x[6] = x[5] * 1e-42, x[6].sign() * 3e38
    got = linear(x, packed, input_scale=input_scale)
    weights = packed.dequantize()
    assert got[1].isnan().all()
    nonzero = weights[:, 5] != 0
    assert torch.equal(got[2][nonzero], weights[nonzero, 5].sign() * torch.inf)
    nonzero = weights[:, 7] != 0
    assert torch.equal(got[3][nonzero], weights[nonzero, 7].sign() * -torch.inf)
    assert torch.equal(got[4], torch.zeros(20)) and got[5].abs().max() < 1e-30
    assert not got[6].isnan().any()
    assert torch.equal(got[[0, 7]], clean[[0, 7]])


def test_static_scale_clips():
    codes, scale = quantize_rows(torch.tensor([[1.0, -3.0, 0.04]]), 0.01)
    assert codes.tolist() == [[100.0, -127.0, 4.0]] and scale.item() == pytest.approx(0.01)


def test_threads_do_not_show(monkeypatch):
    x, weight, bias, _ = draw(300, 200, 300)
    packs = [pack(weight, scheme) for scheme in ("int8", "int4", Scheme(4, "block", activation_bits=None))]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([linear(x, packed, bias) for packed in packs])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_several_python_threads_share_a_weight():
    x, weight, bias, _ = draw(50, 100, 130)
    packed = pack(weight, "int4")
    expected, got = linear(x, packed, bias), []

    def work():
        got.extend(torch.equal(linear(x, packed, bias), expected) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(got) == 80 and all(got)


@pytest.mark.usefixtures("one_thread")
def test_float64_and_other_devices_go_to_the_reference():
    x, weight, bias, _ = draw(5, 40, 30)
    packed = pack(weight, "int8")
    got = linear(x.double(), packed, bias.double(), activation="gelu")
    assert got.dtype == torch.float64
    assert torch.equal(got, reference.quant_linear(x.double(), packed, bias.double(), activation="gelu"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("scheme", ["int8", "int4", Scheme(2, "in", 10, False), Scheme(activation_bits=None)], ids=str)
def test_opcheck(scheme):
    x, weight, bias, residual = draw(6, 40, 30)
    packed = pack(weight, scheme)
    quantize = packed.scheme.activation_bits is not None
    arguments = (x.view(2, 3, 40), packed.prepared, bias, residual.view(2, 3, 30), 30, 2, quantize, 0.0)
    torch.library.opcheck(torch.ops.kdkernels.quant_linear.default, arguments)
    torch.library.opcheck(torch.ops.kdkernels.quant_prepare.default, (packed.blob,))
    torch.library.opcheck(torch.ops.kdkernels.quant_restore.default, (packed.prepared, packed.blob[:64].clone()))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_break(backend, dynamic):
    x, weight, bias, residual = draw(6, 40, 30)
    packed = pack(weight, "int4")

    def layer(x, residual):
        return 2 * linear(x, packed, bias, activation="gelu", residual=residual)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)
    with torch.no_grad():
        for rows in (6, 4):
            torch.testing.assert_close(compiled(x[:rows], residual[:rows]), layer(x[:rows], residual[:rows]))


def test_a_gradient_is_refused():
    x, weight, bias, residual = draw(2, 8, 8)
    packed = pack(weight, "int8")
    for wanting in ((x.clone().requires_grad_(), bias), (x, bias.clone().requires_grad_())):
        with pytest.raises(RuntimeError, match="no gradient"):
            linear(wanting[0], packed, wanting[1])
        with torch.no_grad():
            linear(wanting[0], packed, wanting[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"packed": torch.zeros(3)}, TypeError, "packed must be a PackedWeight"),
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(2, 9)}, ValueError, r"x must be .* 8 in features, got shape \[2, 9\]"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, ValueError, "x must be float32"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias must have the shape \[6\].*got \[7\]"),
        ({"residual": torch.zeros(2, 7)}, ValueError, r"residual must have the output's shape \[2, 6\], got \[2, 7\]"),
        ({"activation": "swish"}, ValueError, "activation must be one of None, 'relu'.*got 'swish'"),
        ({"input_scale": 0.0}, ValueError, "input_scale must be a finite number > 0"),
        ({"input_scale": "1"}, TypeError, "input_scale must be a number"),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.zeros(2, 8), "packed": pack(torch.ones(6, 8), "int8"), **change}
    with pytest.raises(error, match=message):
        linear(**arguments)


def test_static_scale_of_weight_only():
    with pytest.raises(ValueError, match="input_scale needs a scheme with activation_bits=8"):
        linear(torch.zeros(2, 8), pack(torch.ones(6, 8), Scheme(activation_bits=None)), input_scale=1.0)


def test_the_op_protects_memory():
    x, weight, _, _ = draw(2, 8, 6)
    packed = pack(weight, "int8")
    op = torch.ops.kdkernels.quant_linear
    for bad in (packed.blob, packed.prepared[:-64], packed.prepared[:10]):
        with pytest.raises(RuntimeError, match="weight must come from|weight has not the size"):
            op(x, bad.clone(), None, None, 6, 0, True, 0.0)
    with pytest.raises(RuntimeError, match="x and out_features"):
        op(x[:, :7], packed.prepared, None, None, 6, 0, True, 0.0)
    with pytest.raises(RuntimeError, match="x and out_features"):
        op(x, packed.prepared, None, None, 7, 0, True, 0.0)


@pytest.mark.parametrize("isa", PRESENT)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_raw_kernel(isa, scheme):
    """What microbenchmarks time computes the same."""
    from kdkernels import _native

    x, weight, bias, _ = draw(70, 96, 130)
    packed = pack(weight, scheme)
    call = _native.QuantLinearCall(isa, x.numpy(), packed.blob.numpy(), activation=ACTIVATION["gelu"])
    truth = reference.quant_linear(x, packed, activation="gelu")
    assert_close(torch.from_numpy(call.run()), truth, magnitude(x, packed, torch.zeros(130), torch.zeros(130)))
    with pytest.raises(ValueError, match="packed has not the size"):
        _native.QuantLinearCall(isa, x.numpy(), packed.blob[:-64].numpy())
    with pytest.raises(ValueError, match="x must be"):
        _native.QuantLinearCall(isa, x[:, :5].numpy(), packed.blob.numpy())
