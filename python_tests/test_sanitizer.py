"""Every case once through the C++ kernels; `make asan` runs it on an instrumented build, where a bad access is fatal.

It judges memory, not numbers (test_values.py does), so one float32 and one bfloat16 run per case are enough. Masked
AVX-512 loads go past the address sanitizer; test_guard_pages.py catches those.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels
from kdkernels import _native

from . import test_encoder, test_varlen_attention
from .case import evaluate
from .cases import CASES
from .test_quant_linear import SCHEMES, check_scheme, name

DTYPES = {"float32": (torch.float32, torch.float32), "bfloat16": (torch.bfloat16, torch.bfloat16)}

if not _native.build_info()["sanitize"]:
    pytest.skip("this build is not instrumented; `make asan` builds one", allow_module_level=True)


def test_the_instrumented_copy_is_the_one_that_runs():
    assert Path(kdkernels.__file__).parent.parent.name == "asan"


def test_a_bad_access_is_noticed(tmp_path):
    """A row of 9 in memory for 8; run elsewhere than in the checkout, whose package would come first."""
    code = """
import ctypes, numpy, kdkernels._native as native
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
row = numpy.ctypeslib.as_array((ctypes.c_float * 9).from_address(libc.malloc(32))).reshape(1, 9)
native.KdLossCall("generic", row, numpy.zeros((1, 9), "float32")).forward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_kernels_stay_inside_their_memory(case, dtypes):
    loss, gradients = evaluate(getattr(kdkernels.functional, case.op), case.make(dtypes=dtypes))
    assert loss.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_quantised_linears_stay_inside_their_memory(scheme):
    check_scheme(scheme)


def test_attention_on_packed_tokens_stays_inside_its_memory():
    test_varlen_attention.check_values()


def test_encoders_stay_inside_their_memory():
    test_encoder.check_values()
