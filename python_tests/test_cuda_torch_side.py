"""The whole way of a CUDA op without a GPU: Python, csrc/torch/*_cuda.cpp on CPU tensors, and the kernels on the host.

That code is registered in place of the CPU's, so this file runs itself in a second process.
"""

import copy
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels
from kdkernels import reference
from kdkernels.quant import PackedWeight, Scheme, encoder, linear
from kdkernels.quant.pack import encode, find_ranges

from . import tolerance
from .cases import of
from .cuda_host import build_torch_side
from .test_quant_linear import assert_close, draw, magnitude
from .test_quantize import batch, tiny
from .test_varlen_attention import attention
from .test_varlen_attention import draw as draw_tokens

LIBRARY = os.environ.get("KDKERNELS_TEST_TORCH_SIDE")
here = pytest.mark.skipif(LIBRARY is None, reason="runs in test_in_a_process's process")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(LIBRARY is not None, reason="this is the process")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch's own stream would be found")
def test_in_a_process(tmp_path):
    environment = {**os.environ, "KDKERNELS_TEST_TORCH_SIDE": str(build_torch_side(tmp_path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "skipped" in run.stdout and "passed" in run.stdout


@pytest.fixture(scope="module")
def on_cpu():
    """{scheme: (a model, a batch, its hidden states)} of the CPU's kernels."""
    found = {}
    for scheme in ("int8", "int4"):
        model = kdkernels.quantize(tiny("bert"), scheme).requires_grad_(False)
        inputs = batch(model.config)
        found[scheme] = model, inputs, model(**inputs, output_hidden_states=True).hidden_states
    return found


@pytest.fixture
def host(on_cpu):
    """The library: from now on it serves CPU tensors. Each op asks for its stream and leaves no guard behind."""
    library = ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
    before = library.host_streams_asked_for()
    yield library
    assert library.host_streams_asked_for() > before and library.host_guards() == 0


@here
@pytest.mark.parametrize("case", of("kd_loss")[::8], ids=lambda case: case.id)
def test_kd_loss(host, case):
    assert tolerance.violations(case, (torch.bfloat16, torch.float32), seeds=range(1)) == []


@here
def test_attention(host):
    """With room behind the last token."""
    q, k, v, *rest = draw_tokens((5, 0, 70), 2, 26, torch.float16)
    room = [torch.cat((x, torch.full_like(x[:9], torch.nan))) for x in (q, k, v)]
    got, truth = attention(*room, *rest), reference.varlen_attention(q, k, v, *rest)
    torch.testing.assert_close(got[: len(q)], truth, rtol=2e-3, atol=2e-3)


@here
@pytest.mark.parametrize("rows", [3, 20, 300])
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(4, "block", 32, False), Scheme(3, "in", 16, False, None)], ids=str)
def test_products(host, scheme, rows):
    """Few rows, tiles, and of weights alone many rows, whose product is torch's."""
    x, weight, bias, residual = draw(rows, 100, 65)
    table = encode(weight, scheme, *find_ranges(weight, scheme), prepare=False)
    options = {"activation": "gelu", "residual": residual}
    truth = reference.quant_linear(x, table, bias, **options)
    packed = PackedWeight(table.blob)
    assert_close(linear(x, packed, bias, **options), truth, magnitude(x, table, bias, residual))
    x = (x / x.abs().amax(1, keepdim=True)).bfloat16()
    truth = reference.quant_linear(x, table, bias, activation="gelu")
    torch.testing.assert_close(linear(x, packed, bias, activation="gelu").double(), truth, rtol=2e-2, atol=2e-2)


@here
def test_a_weight_that_was_laid_out_otherwise_is_refused(host):
    x, weight, *_ = draw(3, 100, 65)
    packed = PackedWeight(encode(weight, Scheme(), *find_ranges(weight, Scheme()), prepare=False).blob)
    assert linear(x, packed).shape == (3, 65)
    for prepared, layout in ((packed.prepared[:-1], packed.layout), (packed.prepared, 4)):
        with pytest.raises(RuntimeError, match="weight must come from quant_prepare|layout must be that"):
            torch.ops.kdkernels.quant_linear(x, prepared, None, None, 65, 0, True, 0.0, layout)


@here
@pytest.mark.parametrize("all_states", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_encoder(host, on_cpu, scheme, all_states, monkeypatch):
    """Packed tokens with room for more, as on a GPU, where attention multiplies in bf16: one call for all blocks, and
    one for the pooler."""
    monkeypatch.setattr(encoder, "keeps_room", lambda device: True)
    model, inputs, expected = on_cpu[scheme]
    before, real = host.host_streams_asked_for(), inputs["attention_mask"].bool()
    got = copy.deepcopy(model)(**inputs, output_hidden_states=all_states)
    assert host.host_streams_asked_for() == before + 2
    states = got.hidden_states if all_states else [got.last_hidden_state]
    for state, true in zip(states, expected if all_states else expected[-1:], strict=True):
        assert not state[~real].any()
        assert torch.nn.functional.cosine_similarity(state[real], true[real]).min() > 0.99
