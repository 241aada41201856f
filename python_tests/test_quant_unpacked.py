"""Products with quantised weights where the kernels for 8-bit integers are not used: above sm_90a, and on request.
There is no such GPU here: its answer is made up, and the CPU does torch's products."""

import copy

import pytest
import torch
import torch.nn.functional as F

import kdkernels
from kdkernels import _load
from kdkernels.quant import PackedWeight, Scheme, linear, pack

from .test_quantize import batch, tiny

GPU = torch.device("cuda", 0)
WHY = "compute capability 10.0, above sm_90a"


@pytest.fixture
def capability(monkeypatch):
    """Sets the GPU's."""
    monkeypatch.delenv("KDKERNELS_CUDA_PRODUCTS", raising=False)
    monkeypatch.setattr(_load, "_TOO_OLD", {})
    return lambda *value: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: value)


@pytest.fixture
def unpacking(monkeypatch):
    """Every device is such a GPU."""
    monkeypatch.setattr(_load, "unpacks", lambda device: WHY)


@pytest.mark.parametrize(("value", "why"), [((7, 5), ""), ((9, 0), ""), ((10, 0), WHY), ((12, 1), WHY)])
def test_the_capability_decides(capability, value, why):
    capability(*value)
    assert _load.unpacks(GPU) == why.replace("10.0", "12.1" if value[0] == 12 else "10.0")
    assert _load.unpacks(torch.device("cpu")) == ""


def test_a_request_decides_before_it(capability, monkeypatch):
    capability(9, 0)
    monkeypatch.setenv("KDKERNELS_CUDA_PRODUCTS", "bf16")
    assert _load.unpacks(GPU) == "KDKERNELS_CUDA_PRODUCTS=bf16"
    capability(10, 0)
    monkeypatch.setenv("KDKERNELS_CUDA_PRODUCTS", "int8")
    assert _load.unpacks(GPU) == ""
    monkeypatch.setenv("KDKERNELS_CUDA_PRODUCTS", "fp4")
    with pytest.raises(RuntimeError, match='KDKERNELS_CUDA_PRODUCTS must be "int8" or "bf16", got "fp4"'):
        _load.unpacks(GPU)


def explained(capability, monkeypatch, *value) -> dict[str, str]:
    """What explain() says of each op on a GPU of that capability, where everything is installed."""
    capability(*value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_load, "_MISSING_ON_CUDA", dict.fromkeys(_load._MISSING_ON_CUDA, ""))
    return {op: devices["cuda"] for op, devices in kdkernels.explain().items()}


def test_explain_says_so(capability, monkeypatch):
    said = explained(capability, monkeypatch, 10, 0)
    expected = f"torch's bf16 products of unpacked weights: {WHY}"
    assert {op for op, text in said.items() if text == expected} == {"encoder", "quant_linear"}
    assert said["kd_loss"] == said["varlen_attention"] == "CUDA C++" and said["attention_kl"] == "Triton"


@pytest.mark.parametrize(
    ("value", "why"), [((7, 0), "compute capability 7.0, before sm_75"), ((7, 5), ""), ((12, 0), "")]
)
def test_the_reference_serves_gpus_that_are_too_old(capability, monkeypatch, value, why):
    """For which CUDA C++ can't be compiled; those that are newer take what the library has for others."""
    said = explained(capability, monkeypatch, *value)
    cuda = {"kd_loss", "topk_kd_loss", "quant_linear", "varlen_attention", "encoder"}
    assert {op for op, text in said.items() if text == f"reference (torch): {why}"} == (cuda if why else set())
    assert {op for op in said if not _load.serves(op, GPU)} == (cuda if why else set())


def test_a_model_that_no_kernel_serves_says_so(monkeypatch):
    monkeypatch.setattr(_load, "serves", lambda family, device: False)
    model = kdkernels.quantize(tiny("bert"), "int8")
    said = kdkernels.explain(model)["encoder.layer.0.output.dense"]
    assert said.endswith("by the reference: no kernel serves cpu here")


@pytest.mark.parametrize(("value", "served"), [((7, 0), False), ((7, 5), True)])
def test_compiled_code_knows_which_gpus_are_too_old(capability, monkeypatch, value, served):
    capability(*value)
    monkeypatch.setattr(_load, "_MISSING_ON_CUDA", dict.fromkeys(_load._MISSING_ON_CUDA, ""))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + _load.serves("kd_loss", GPU), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == served


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(4, "block", 32, False), Scheme(2, "in", 16, activation_bits=None)])
def test_linear(unpacking, scheme, dtype):
    """Of bf16 weights and bf16 activations, everything behind the product in float32."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 5, size, generator=generator).to(dtype) for size in (70, 33))
    packed, bias = pack(torch.randn(33, 70, generator=generator), scheme), torch.randn(33, generator=generator)
    got = linear(x, packed, bias, activation="gelu", residual=residual)
    weight = packed.dequantize(torch.bfloat16).double()
    product = x.bfloat16().double() @ weight.T
    expected = F.gelu(product + bias) + residual
    assert got.dtype == dtype and packed.prepared is None
    rounding = torch.finfo(torch.bfloat16).eps * product.abs() + torch.finfo(dtype).eps * expected.abs() + 1e-5
    assert ((got - expected).abs() <= rounding).all()
    assert linear(x.double(), packed).dtype == torch.float64
    assert torch.equal(PackedWeight(packed.blob).blob, packed.blob)


@torch.no_grad()
def test_a_model(unpacking):
    """Padding-free, and no further from the model of the dequantised weights than that is in bf16."""
    model = tiny("bert")
    quantised = kdkernels.quantize(copy.deepcopy(model), "int8")
    inputs = batch(model.config)
    for name, module in quantised.named_modules():
        if hasattr(module, "weight") and isinstance(module.weight, PackedWeight):
            model.get_submodule(name).weight.data = module.weight.dequantize()
    real, explained = inputs["attention_mask"].bool(), kdkernels.explain(quantised)
    got, expected = (each(**inputs).last_hidden_state for each in (quantised, model))
    assert "call by call, since products are torch's, of unpacked weights" in explained[""] and not got[~real].any()
    assert explained["encoder.layer.0.output.dense"].endswith(f"unpacked to bf16: {WHY}")
    in_bf16 = model.bfloat16()(**inputs).last_hidden_state
    assert (got - expected)[real].abs().mean() < (in_bf16 - expected)[real].abs().mean()
    state = quantised.state_dict()["encoder.layer.0.output.dense.packed"]
    assert torch.equal(state, quantised.encoder.layer[0].output.dense.weight.blob)
