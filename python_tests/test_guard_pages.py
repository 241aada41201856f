"""No kernel touches a byte beside its inputs: they lie against a page that may not be read, so a bad access is fatal.

This sees what the address sanitizer does not, AVX-512's masked loads, and it needs no special build. Every case runs
with the forbidden page behind the inputs and before them, in one process for each ISA.
"""

import ctypes
import mmap

import pytest
import torch

import kdkernels

from .case import evaluate
from .cases import CASES
from .isa import PRESENT, in_a_process

PAGE = mmap.PAGESIZE
PROT_NONE = 0
# Rows of one 16-bit type are read as they are, mixed ones through a copy.
DTYPES = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float16)]


def beside_a_guard(x: torch.Tensor, side: str) -> torch.Tensor:
    """The same values and strides in memory whose last ("behind") or first ("before") byte touches a forbidden page."""
    if x.numel() == 0:
        return x
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    size = span * x.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = PAGE if side == "before" else (pages + 1) * PAGE - size
    copy = torch.frombuffer(memory, dtype=x.dtype, count=span, offset=start)
    copy.copy_(x.as_strided((span,), (1,)))
    forbid(copy.data_ptr() - start)
    forbid(copy.data_ptr() - start + (pages + 1) * PAGE)
    return copy.as_strided(x.shape, x.stride())


def forbid(address: int) -> None:
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")


def run_all() -> None:
    torch.set_num_threads(1)  # many small calls: waiting for a second thread takes most of the time
    for case in CASES:
        for side in ("behind", "before"):
            for dtypes in DTYPES:
                print(case.id, side, dtypes, flush=True)  # the last line names the one that died
                call = case.make(dtypes=dtypes).map(lambda x, side=side: beside_a_guard(x, side))
                evaluate(getattr(kdkernels.functional, case.op), call)


@pytest.mark.parametrize("isa", PRESENT)
def test_kernels_touch_nothing_beside_their_inputs(isa):
    done = in_a_process("from python_tests.test_guard_pages import run_all; run_all()", isa)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]}\n{done.stderr[-2000:]}"


def test_the_guard_is_fatal():
    code = """
import torch
from python_tests.test_guard_pages import beside_a_guard
x = beside_a_guard(torch.ones(8), "behind")
torch.as_strided(x, (8,), (1,))[7].item()
import ctypes
ctypes.c_float.from_address(x.data_ptr() + 32).value
"""
    assert in_a_process(code, "generic").returncode < 0
