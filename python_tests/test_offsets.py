"""Tensors of more than 2^31 elements: every offset that a CPU kernel computes is 64 bits wide, forward and backward.

Each small case is laid out with one axis stretched over 2^32 elements of virtual memory (sparse.py) and must give the
result of its compact copy, up to rounding: what lies apart may be added up in another order. A wrong offset may well
end the process, so that each ISA runs in one of its own. The Triton kernels have the same test in test_triton.py and
one on their compiled code in test_triton_compile.py, the CUDA ones in test_cuda_host.py.
"""

import pytest
import torch

import kdkernels

from .case import evaluate, upstream
from .cases import CASES
from .isa import PRESENT, in_a_process
from .sparse import far_apart

SMALL = 7000
# Where terms cancel, rounding is all that a gradient holds.
STRETCHED = [
    case
    for case in CASES
    if case.layout == "contiguous"
    and case.near is None
    and case.spread == 1.0
    and max(x.numel() for x in case.make().leaves) <= SMALL
]


def stretched(call, axis):
    """The call with every float tensor that has neighbours along `axis` stretched there: student, teacher, biases."""

    def stretch(x):
        return far_apart(x, axis) if x.dim() >= -axis and x.shape[axis] > 1 else x.clone()

    others = {name: x for name, x in call.other.items() if torch.is_tensor(x) and x.is_floating_point()}
    return call.map(stretch).with_options(**{name: stretch(x) for name, x in others.items()})


def run_all() -> None:
    torch.set_num_threads(1)
    for case in STRETCHED:
        function = getattr(kdkernels.functional, case.op)
        for dtype in (torch.float32, torch.bfloat16):
            call = case.make(dtypes=(dtype, dtype))
            expected = [x.detach() for x in flat(evaluate(function, call))]
            for axis in range(-max(leaf.dim() for leaf in call.leaves), 0):
                print(case.id, dtype, axis, flush=True)  # the last line names the one that died
                far = stretched(call, axis)
                loss = function(**far.arguments)
                above = upstream(loss)
                if above.dim() > 0 and above.shape[-1] > 1:
                    above = far_apart(above, -1)
                got = [loss, *torch.autograd.grad(loss, far.leaves, above)]
                for a, b in zip(got, expected, strict=True):
                    rounding = max(1e-5, 2 * torch.finfo(b.dtype).eps)
                    torch.testing.assert_close(a, b, rtol=rounding, atol=rounding * b.abs().max().item())


def flat(result) -> list[torch.Tensor]:
    return [result[0], *result[1]]


@pytest.mark.parametrize("isa", PRESENT)
def test_cpu_kernels(isa):
    done = in_a_process("from python_tests.test_offsets import run_all; run_all()", isa)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]}\n{done.stderr[-2000:]}"


def test_every_op_is_stretched():
    assert {case.op for case in STRETCHED} == {case.op for case in CASES}


def test_32_bit_offsets_miss():
    """What this file looks for: the product of an index and a stride that wraps around finds another element."""
    x = torch.arange(1.0, 7.0).view(2, 3)
    far = far_apart(x, 0)
    assert torch.equal(far, x)
    wrapped = torch.tensor(far.stride(0)).to(torch.int32).item()
    assert wrapped != far.stride(0)
    assert (far.as_strided((3,), (1,), wrapped) == 0).all()
