"""Every Triton kernel compiles for A100, H100 and B200 without a GPU, as it would be launched, within its limits.

Nothing runs here; test_triton.py does that.
"""

import os
import re

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton.language as tl  # noqa: E402  after the skips

from benches import gpu_resources  # noqa: E402

from .triton_launches import CALLS, DTYPES, OPTIONS, compiled, run_attention_kl, run_attention_mse  # noqa: E402

CAPABILITIES = (80, 90, 100)


def compiled_for(call, option, dtype) -> tuple[int, ...]:
    """The GPUs that a row of CALLS is compiled for. A family's first option has every type everywhere. What another
    option adds to a kernel, it adds on each GPU: it has float32, whose tiles take the most registers, on the oldest,
    and 16 bits where other instructions multiply them than on the oldest."""
    if dtype == "float16":
        return (90,)
    if option == OPTIONS[call][0]:
        return CAPABILITIES
    return (80,) if dtype == "float32" else (90, 100)


COMPILED = [(*each, capability) for each in CALLS for capability in compiled_for(*each)]


def narrow_products(kernel) -> list[str]:
    """Lines of the kernel's intermediate code that multiply in 32 bits what may be large: an argument (a stride or a
    size) or the number of a program. Programs of the second axis are fewer than 2^16; a remainder is bounded anew."""
    large, found = set(), []  # arguments and programs, and their widened, reshaped or broadcast copies
    for line in kernel.asm["ttir"].splitlines():
        defined = re.match(r"\s*(%\S+) = (\S+) (.*?) : (.*?)(?: loc|$)", line)
        if "tt.func" in line:
            large |= set(re.findall(r"(%\w+): i(?:32|64)", line))
        elif defined:
            name, operation, given, types = defined.groups()
            operands = set(re.findall(r"%[\w#]+", given))
            copied = operation in ("tt.splat", "tt.expand_dims", "tt.broadcast", "arith.extsi", "arith.trunci")
            if (copied and operands & large) or (operation, given) == ("tt.get_program_id", "x"):
                large.add(name)
            if operation == "arith.muli" and "i64" not in types and operands & large:
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


@triton.jit
def _narrow_blocks(x, stride, out):
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    tl.store(out + row, tl.load(x + row))


@pytest.mark.parametrize(
    ("call", "option", "dtype", "capability"), COMPILED, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_compiles_within_its_limits(call, option, dtype, capability):
    launches = [kernel for each in compiled(capability, call, DTYPES[dtype], option).values() for kernel in each]
    assert len(launches) >= 2
    for kernel in launches:
        used = gpu_resources.of_compiled(kernel, f"sm_{capability}", f"{option}, {dtype}")
        assert used.excess == "", used


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_16_bit_products_run_on_tensor_cores(capability):
    instruction = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[capability]
    launches = compiled(capability, run_attention_kl, torch.bfloat16, "batchmean")
    for name in ("_forward_kernel", "_backward_kernel"):
        assert all(instruction in kernel.asm["ptx"] for kernel in launches[name])


@pytest.mark.parametrize("capability", (80, 90))
def test_gram_products_run_on_float64_tensor_cores(capability):
    launches = compiled(capability, run_attention_mse, torch.float32, "scores")
    for name in ("_gram_kernel", "_gram_backward_kernel"):
        assert all("f64.f64.f64.f64" in kernel.asm["ptx"] for kernel in launches[name])


@pytest.mark.parametrize(
    ("call", "option"), [(call, option) for call, options in OPTIONS.items() for option in options]
)
def test_offsets_have_64_bits(call, option):
    """An index times a stride may be past 2^31; test_triton.py shows that it arrives there."""
    for launches in compiled(90, call, torch.bfloat16, option).values():
        assert [line for kernel in launches for line in narrow_products(kernel)] == []


def test_32_bit_offsets_are_seen():
    x = torch.empty(64)
    for kernel, products in ((_narrow, 1), (_narrow_blocks, 1), (_wide, 0)):
        (launch,) = compiled(90, lambda kernel=kernel: kernel[(4,)](x, 48, x))[kernel.fn.__name__]
        assert len(narrow_products(launch)) == products


def test_sums_stay_unfused():
    """c * a - c * b as an fma would round the two products differently: identical inputs would not give 0."""
    launches = compiled(90, run_attention_kl, torch.bfloat16, "batchmean")
    for kernel in launches["_forward_kernel"] + launches["_backward_kernel"]:
        assert "mul.rn.f32" in kernel.asm["ptx"]
        assert "fma.rn.f32" not in kernel.asm["ptx"]
