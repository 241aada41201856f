"""Microbenchmarks with pytest-benchmark: `pytest benches/test_micro.py --benchmark-enable`.

What a change of a kernel is judged by: one kernel of one ISA on one thread without PyTorch (`_native`), and beside it
what the dispatcher, autograd and the checks in Python add to the smallest calls.
"""

import numpy
import pytest
import torch

from kdkernels import _native, functional
from kdkernels.ops._common import KIND
from kdkernels.ops.quant_linear import ACTIVATION
from kdkernels.quant import NAMED, pack
from python_tests.case import OPS, upstream
from python_tests.cases import of

ISAS = [name for name, supported in _native.isas().items() if supported]
# One row block that stays in cache, and one that streams from memory.
SHAPES = {"cached": (16, 4096), "streaming": (128, 30522)}


def logits(rows: int, classes: int, dtype: str) -> numpy.ndarray:
    values = numpy.random.default_rng(0).standard_normal((rows, classes), dtype=numpy.float32)
    # The upper half of a float32 is a bfloat16, rounded towards zero.
    return (values.view(numpy.uint32) >> 16).astype(numpy.uint16) if dtype == "bfloat16" else values.astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "kind"), [*(("float32", kind) for kind in KIND), ("bfloat16", "kl"), ("float16", "kl")]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_kd_loss_kernel(benchmark, direction, isa, shape, dtype, kind):
    student, teacher = logits(*SHAPES[shape], dtype), logits(*SHAPES[shape], dtype)[::-1].copy()
    call = _native.KdLossCall(isa, student, teacher, kind=KIND[kind], temperature=4.0)
    call.forward()
    benchmark.extra_info["bytes"] = student.nbytes * (2 if direction == "forward" else 3)
    benchmark(getattr(call, direction))


@pytest.mark.parametrize("activation", [None, "gelu"], ids=str)
@pytest.mark.parametrize("scheme", list(NAMED))
@pytest.mark.parametrize("shape", [(1, 768, 3072), (16, 768, 3072), (128, 768, 3072), (1024, 768, 768)], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_quant_linear_kernel(benchmark, isa, shape, scheme, activation):
    """Rows x in x out features, activations quantised outside of the clock; `percent_of_ceiling` of the ISA's int8."""
    rows, columns, features = shape
    random = numpy.random.default_rng(0)
    weight = torch.from_numpy(random.standard_normal((64, columns), dtype=numpy.float32))
    packed = pack(weight.repeat(features // 64, 1), scheme)
    x = random.standard_normal((rows, columns), dtype=numpy.float32)
    call = _native.QuantLinearCall(isa, x, packed.blob.numpy(), activation=ACTIVATION[activation])
    benchmark(call.run)
    if isa != "generic" and benchmark.stats is not None:
        ceiling = _native.measure("int8", threads=1, isa=isa) * 1e9
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["percent_of_ceiling"] = 100 * 2 * rows * columns * features / seconds / ceiling


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("op", OPS)
def test_call_overhead(benchmark, op, grad):
    """The smallest case of each op: hardly any arithmetic."""
    case = min(of(op), key=lambda case: sum(x.numel() for x in case.make().leaves))
    call, function = case.make(), getattr(functional, op)
    above = upstream(function(**call.arguments)).detach()

    def step():
        loss = function(**call.arguments)
        if grad:
            torch.autograd.grad(loss, call.leaves, above)

    benchmark(step)
