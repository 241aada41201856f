"""What the Triton kernels are launched with; nothing is compiled or run, so that it costs nothing."""

import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter launches otherwise", allow_module_level=True)

from triton.runtime.jit import JITFunction  # noqa: E402  after the skips

from .triton_launches import OPTIONS  # noqa: E402


@pytest.mark.parametrize(
    ("call", "option"), [(call, option) for call, options in OPTIONS.items() for option in options]
)
def test_tuples_hold_no_tuples(call, option):
    """Of those Triton 3.6 loses what is constant, such as a stride of 1, where a loop begins: some kernels, not all,
    then fail to compile."""
    launches = []
    with mock.patch.object(JITFunction, "run", lambda self, *args, **_: launches.append((self.fn.__name__, args))):
        call(torch.bfloat16, option)
    assert len(launches) >= 2
    nested = {
        name
        for name, args in launches
        for given in args
        if isinstance(given, tuple) and any(isinstance(x, tuple) for x in given)
    }
    assert nested == set()
