"""Every Triton kernel compiles for A100, H100 and B200 without a GPU, as it would be launched, and without spilling.

A driver that names the target and a launch that stops after compiling are enough: the package's own launchers then
compile their kernels with the specialisations of a real call. Nothing runs here; test_triton.py does that.
"""

import os
import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton.language as tl  # noqa: E402  after the skips
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from kdkernels.ops._common import HEAD_REDUCTION, KIND, NORMALIZE, ON, REDUCTION, TAIL, VARIANCE  # noqa: E402
from kdkernels.triton import (  # noqa: E402
    attention_kl,
    attention_map_kl,
    attention_map_mse,
    attention_mse,
    hidden_cosine,
    hidden_mse,
    linear_kd_loss,
    moment_mse,
    relation_kl,
    topk_kd_loss,
)

CAPABILITIES = (80, 90, 100)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# ptxas gives up a few registers to fit one more block on a multiprocessor; real spilling takes hundreds of bytes.
STACK = 48
MASK = torch.ones(2, 256, dtype=torch.bool)
UPSTREAM = torch.ones(())


class Target:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


@pytest.fixture
def kernels(monkeypatch):
    """compile(capability, call, *args) -> {kernel's name: [what each of its launches compiled to]}."""
    run = JITFunction.run
    found = {}

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.setdefault(self.fn.__name__, []).append(kernel)

    monkeypatch.setattr(JITFunction, "run", compile_only)

    def compile_for(capability, call, *args):
        found.clear()
        monkeypatch.setattr(driver, "_active", Target(capability))
        call(*args)
        return found

    return compile_for


def resources(kernel, path) -> dict:
    """Registers a thread and stack bytes, as the cubin states them."""
    cubin = path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout + text.stderr).groups()
    return {"registers": int(registers), "stack": int(stack), "shared": kernel.metadata.shared}


def narrow_products(kernel) -> list[str]:
    """Lines of the kernel's intermediate code that multiply an argument, a stride or a size, in 32 bits."""
    origin = {}  # what a value is a widened, reshaped or broadcast copy of
    found = []
    for line in kernel.asm["ttir"].splitlines():
        defined = re.match(r"\s*(%\S+) = (\S+) (.*?) : (.*?)(?: loc|$)", line)
        if "tt.func" in line:
            origin |= {name: "argument" for name in re.findall(r"(%\w+): i(?:32|64)", line)}
        elif defined:
            name, operation, operands, types = defined.groups()
            operands = re.findall(r"%[\w#]+", operands)
            if operation in ("tt.splat", "tt.expand_dims", "tt.broadcast", "arith.extsi", "arith.trunci"):
                origin[name] = origin.get(operands[0])
            if operation == "arith.muli" and "i64" not in types and "argument" in map(origin.get, operands):
                found.append(line.strip())
    return found


@triton.jit
def _narrow(x, stride, out):
    row = tl.arange(0, 16)
    tl.store(out + row, tl.load(x + tl.program_id(0) * stride + row))


@triton.jit
def _wide(x, stride, out):
    row = tl.arange(0, 16)
    tl.store(out + row, tl.load(x + tl.program_id(0).to(tl.int64) * stride + row))


def heads(dtype, d_s, d_t):
    return [torch.empty(2, 3, 256, d, dtype=dtype) for d in (d_s, d_s, d_t, d_t)]


def packed(tensors):
    """[B, H, N, d] as sequences one behind the other, [tokens, H, d], and their bounds."""
    return [x.transpose(1, 2).flatten(0, 1) for x in tensors], torch.tensor([0, 200, 500], dtype=torch.int32)


def attention_kl_options(option, inputs):
    """(reduction, the other options) of one row of OPTIONS."""
    q_s, _, q_t, _ = inputs
    bias = torch.empty(2, 1, 256, 256, dtype=q_s.dtype).expand(2, 3, 256, 256)
    lse = torch.empty(q_s.shape[:3])
    return {
        "batchmean": {},
        "none": {"reduction": "none", "grad": torch.ones(2, 3, 256)},
        "reverse_causal": {"kind": "reverse_kl", "causal": True},
        "bias": {"bias_s": bias, "bias_t": bias},
        "lse": {"lse_s": lse, "lse_t": lse},
        "head_sum": {"head_reduction": "sum"},
        "head_map": {"head_map": [2, 2, 0]},
        "grouped": {"inputs": [x[:, :1] if i % 2 else x for i, x in enumerate(inputs)]},
        "packed": {"packed": True},
        "full": {"mask": None},
    }[option]


def run_attention_kl(dtype, option):
    inputs = heads(dtype, 32, 64)
    given = attention_kl_options(option, inputs)
    inputs, mask, bounds = given.get("inputs", inputs), given.get("mask", MASK), None
    if given.get("packed"):
        (inputs, bounds), mask = packed(inputs), None
    tensors = *inputs, mask, bounds, *(given.get(name) for name in ("bias_s", "bias_t", "lse_s", "lse_t"))
    scalars = (
        *(256, 1.0, 0.1, 0.1, KIND[given.get("kind", "kl")], HEAD_REDUCTION[given.get("head_reduction")]),
        *(given.get("head_map", []), given.get("causal", False), REDUCTION[given.get("reduction", "batchmean")]),
    )
    _, *saved = attention_kl.attention_kl(*tensors, *scalars, True)
    attention_kl.attention_kl_backward(given.get("grad", UPSTREAM), *tensors, *saved, *scalars)


def run_attention_mse(dtype, option):
    inputs, mask, bounds, on = heads(dtype, 26, 64), MASK, None, option.split("_")[-1]
    if on != option:
        mask = None
    if option.startswith("packed"):
        inputs, bounds = packed(inputs)
    scalars = 256, ON[on], 0.1, 0.1
    _, *saved = attention_mse.attention_mse(*inputs, mask, bounds, *scalars, True)
    attention_mse.attention_mse_backward(UPSTREAM, *inputs, mask, bounds, *saved, *scalars)


def run_relation_kl(dtype, num_heads):
    inputs, mask, bounds = [torch.empty(2, 256, w, dtype=dtype) for w in (384, 768)], MASK, None
    if num_heads == "packed":
        inputs, mask, num_heads = [x.flatten(0, 1) for x in inputs], None, 12
        bounds = torch.tensor([0, 200, 500])
    scalars = 256, num_heads, REDUCTION["batchmean"]
    _, *saved = relation_kl.relation_kl(*inputs, mask, bounds, *scalars, True)
    relation_kl.relation_kl_backward(UPSTREAM, *inputs, mask, bounds, *saved, *scalars)


def maps(dtype):
    return [torch.empty(2, heads, 256, 256, dtype=dtype) for heads in (3, 3)]


def run_attention_map_mse(dtype, head_reduction):
    inputs = *maps(dtype), MASK
    attention_map_mse.attention_map_mse(*inputs, HEAD_REDUCTION[head_reduction])
    attention_map_mse.attention_map_mse_backward(UPSTREAM, *inputs, HEAD_REDUCTION[head_reduction])


def run_attention_map_kl(dtype, reduction):
    inputs, grad = (*maps(dtype), MASK), UPSTREAM if reduction != "none" else torch.ones(2, 3, 256)
    scalars = 2.0, HEAD_REDUCTION[None], REDUCTION[reduction]
    _, stats = attention_map_kl.attention_map_kl(*inputs, *scalars)
    attention_map_kl.attention_map_kl_backward(grad, *inputs, stats, *scalars)


def run_hidden_mse(dtype, normalize):
    student, teacher = ([torch.empty(2, 256, 768, dtype=dtype) for _ in range(3)] for _ in range(2))
    arguments = student, teacher, MASK, [], []
    _, saved = hidden_mse.hidden_mse(*arguments, NORMALIZE[normalize], True)
    hidden_mse.hidden_mse_backward(UPSTREAM, *arguments, saved, NORMALIZE[normalize])


def run_hidden_mse_projected(dtype, normalize):
    student, teacher = torch.empty(2, 256, 384, dtype=dtype), torch.empty(2, 256, 768, dtype=dtype)
    weight, bias = torch.empty(768, 384, dtype=dtype), torch.empty(768, dtype=dtype)
    hidden_mse.hidden_mse([student], [teacher], MASK, [weight], [bias], NORMALIZE[normalize], True)


def run_topk_kd_loss(dtype, tail):
    student, values = torch.empty(2, 256, 30522, dtype=dtype), torch.empty(2, 256, 64, dtype=dtype)
    labels = torch.empty(2, 256, dtype=torch.int64) if tail == "bucket" else None
    inputs = student, values, torch.arange(64).repeat(2, 256, 1), MASK, labels, torch.ones(2, 256)
    scalars = TAIL[tail], KIND["kl"], 1.0, True, 0.5, 0.5, -100, REDUCTION["batchmean"]
    _, *saved = topk_kd_loss.topk_kd_loss(*inputs, *scalars)
    topk_kd_loss.topk_kd_loss_backward(UPSTREAM, *inputs, *saved, *scalars)


def run_linear_kd_loss(dtype, kind):
    hidden, weight, bias = (torch.empty(shape, dtype=dtype).fill_(1) for shape in ((2, 256, 16), (30522, 16), (30522,)))
    labels = torch.empty(2, 256, dtype=torch.int64) if kind == "ce" else None
    inputs = hidden, weight, bias, hidden, weight, bias, MASK, labels, torch.ones(2, 256)
    scalars = KIND[kind], 1.0, True, 0.5, 0.5, -100, REDUCTION["batchmean"]
    _, *saved = linear_kd_loss.linear_kd_loss(*inputs, *scalars, True)
    linear_kd_loss.linear_kd_loss_backward(UPSTREAM, *inputs, *saved, *scalars)


def run_hidden_cosine(dtype, layers):
    student, teacher = ([torch.empty(2, 256, 768, dtype=dtype) for _ in range(layers)] for _ in range(2))
    hidden_cosine.hidden_cosine(student, teacher, MASK)
    hidden_cosine.hidden_cosine_backward(UPSTREAM, student, teacher, MASK)


def run_moment_mse(dtype, variance):
    student, teacher = ([torch.empty(2, 256, 512, dtype=dtype) for _ in range(3)] for _ in range(2))
    _, stats = moment_mse.moment_mse(student, teacher, MASK, 5000.0, 5.0, VARIANCE[variance], True)
    moment_mse.moment_mse_backward(UPSTREAM, student, MASK, stats)


OPTIONS = {
    run_attention_kl: (
        *("batchmean", "none", "reverse_causal", "bias", "lse", "head_sum", "head_map", "grouped", "packed", "full"),
    ),
    run_attention_mse: (*ON, "full_scores", "packed_scores", "full_probs", "packed_probs"),
    run_relation_kl: (12, 1, "packed"),
    run_attention_map_mse: (None, "mean"),
    run_attention_map_kl: ("batchmean", "none"),
    run_hidden_mse: tuple(NORMALIZE),
    run_hidden_mse_projected: (None,),
    run_topk_kd_loss: tuple(TAIL),
    run_linear_kd_loss: tuple(KIND),
    run_hidden_cosine: (1, 3),
    run_moment_mse: tuple(VARIANCE),
}
# float16 differs from bfloat16 in nothing but the type: one option of each family has it.
CALLS = [
    (call, option, dtype)
    for call, options in OPTIONS.items()
    for option in options
    for dtype in DTYPES
    if dtype != "float16" or option == options[0]
]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("call", "option", "dtype"), CALLS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_compiles(call, option, dtype, capability, kernels, tmp_path):
    compiled = kernels(capability, call, DTYPES[dtype], option)
    assert sum(map(len, compiled.values())) >= 2
    for name, launches in compiled.items():
        for kernel in launches:
            used = resources(kernel, tmp_path)
            assert used["stack"] <= STACK, f"{name} spills: {used}"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_16_bit_products_run_on_tensor_cores(capability, kernels):
    instruction = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[capability]
    compiled = kernels(capability, run_attention_kl, torch.bfloat16, "batchmean")
    for name in ("_forward_kernel", "_backward_kernel"):
        assert all(instruction in kernel.asm["ptx"] for kernel in compiled[name])


@pytest.mark.parametrize("capability", (80, 90))
def test_gram_products_run_on_float64_tensor_cores(capability, kernels):
    compiled = kernels(capability, run_attention_mse, torch.float32, "scores")
    for name in ("_gram_kernel", "_gram_backward_kernel"):
        assert all("f64.f64.f64.f64" in kernel.asm["ptx"] for kernel in compiled[name])


@pytest.mark.parametrize(
    ("call", "option"), [(call, option) for call, options in OPTIONS.items() for option in options]
)
def test_offsets_have_64_bits(call, option, kernels):
    """An index times a stride may be past 2^31; test_triton.py shows that it arrives there."""
    for launches in kernels(90, call, torch.bfloat16, option).values():
        assert [line for kernel in launches for line in narrow_products(kernel)] == []


def test_32_bit_offsets_are_seen(kernels):
    x = torch.empty(64)
    for kernel, products in ((_narrow, 1), (_wide, 0)):
        (compiled,) = kernels(90, lambda kernel=kernel: kernel[(4,)](x, 48, x))[kernel.fn.__name__]
        assert len(narrow_products(compiled)) == products


def test_sums_stay_unfused(kernels):
    """c * a - c * b as an fma would round the two products differently: identical inputs would not give 0."""
    compiled = kernels(90, run_attention_kl, torch.bfloat16, "batchmean")
    for kernel in compiled["_forward_kernel"] + compiled["_backward_kernel"]:
        assert "mul.rn.f32" in kernel.asm["ptx"]
        assert "fma.rn.f32" not in kernel.asm["ptx"]
