"""The Triton kernels against the table of cases: on the GPU where there is one, else interpreted on the CPU.

Whether Triton interprets is decided when it is imported, so that without a GPU this file runs itself in a second
process with TRITON_INTERPRET=1. There the CUDA implementations serve CPU tensors, and the public functions lead to
them.
"""

import importlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kdkernels import _load, functional, ops, reference
from python_tests.case import evaluate, padding
from python_tests.cases import of
from python_tests.nosync import NoSync
from python_tests.test_offsets import flat, stretched
from python_tests.tolerance import violations

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
FAMILIES = sorted(_load._TRITON_FAMILIES)


def bounded(case):
    """Interpreted, every program costs. Cases on rows keep a second chunk's first; those on maps keep two sequences,
    long ones without padding one, and two heads unless something else of the case counts its heads."""
    shape = case.shape
    if not INTERPRETED:
        return case
    if "lead" in shape:
        from kdkernels.triton.linear_kd_loss import LEAST_ROWS

        return replace(case, shape={**shape, "lead": tuple(min(size, LEAST_ROWS + 1) for size in shape["lead"])})
    if not ("heads" in shape or "num_heads" in case.options):
        return case
    small = {}
    if not isinstance(case.mask, tuple):
        small["batch"] = 1 if case.mask is None and shape["tokens"] >= 64 else min(shape["batch"], 2)
    heads = shape.get("heads")
    counted = "head_map" in case.options or any(key in shape for key in ("kv_s", "kv_t", "bias_s", "bias_t"))
    if heads and not counted and shape.get("heads_t", heads) == heads:
        small |= {key: min(heads, 2) for key in ("heads", "heads_t") if key in shape}
    return replace(case, shape={**shape, **small})


CASES = [bounded(case) for case in of(*FAMILIES)]
here = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_interpreted's process")


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="this process runs the kernels itself")
def test_interpreted():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def without_sync(implementation):
    def call(*args):
        with NoSync():
            return implementation(*args)

    return call


@pytest.fixture(scope="module", autouse=True)
def triton_on_cpu():
    """Under the interpreter, the dispatcher's CPU entries of the families become the Triton ones. No operator that
    these call may make the host wait."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    for family in FAMILIES:
        module = importlib.import_module(f"kdkernels.triton.{family}")
        for op in (family, f"{family}_backward"):
            ops._common.LIBRARY.impl(op, without_sync(getattr(module, op)), "CPU", allow_override=True)
    multiply = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        # numpy has no bfloat16: the interpreter would multiply the bit patterns.
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(self, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot
    yield
    InterpreterBuilder.create_dot = multiply


def by_name(*names):
    return [case for case in CASES if case.id in names]


# numpy tells of the 1 / 0 of rows that are then dropped.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
PADDED = by_name(
    "attention_kl-mask_holes", "attention_kl-none_holes", "attention_kl-bias", "attention_kl-grouped_mapped",
    "attention_kl-causal_holes", "attention_mse-probs_mask_lengths",
    "attention_mse-scores_mask_lengths", "relation_kl-mask_lengths", "hidden_mse-layer_norm",
    "hidden_mse-projected_each", "hidden_cosine-mask_lengths", "moment_mse-weights",
    "topk_kd_loss-mask_lengths", "topk_kd_loss-labels_bucket", "topk_kd_loss-row_t", "attention_map_mse-mask_holes",
    "attention_map_mse-mean", "attention_map_kl-mask_lengths", "attention_map_kl-none_holes",
    "attention_map_kl-none_mean", "linear_kd_loss-labels_masked", "linear_kd_loss-same_width",
    "linear_kd_loss-none_masked",
    "gram_mse-hidden_mask_lengths", "gram_mse-token_mask_lengths_same",
)  # fmt: skip
# One case of every family, and the other ways through some of them.
STRETCHED = [next(case for case in CASES if case.op == family) for family in FAMILIES] + [
    case
    for case in CASES
    if case.name in ("none_holes", "none_mean", "bias", "probs_plain", "layer_norm", "projected_bias")
]
HALVES = PADDED + by_name(
    "attention_kl-d80", "attention_kl-head_sum", "attention_kl-lse", "attention_kl-packed_all", "hidden_mse-l2",
    "hidden_cosine-plain", "moment_mse-squared", "topk_kd_loss-vocabulary", "attention_map_mse-plain",
    "attention_map_kl-plain", "linear_kd_loss-panels",
)  # fmt: skip
# float16 differs from bfloat16 in nothing but the type: interpreted, one case of each family has it.
IN_16_BITS = [
    (case, dtypes)
    for case in HALVES
    for dtypes in ((torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32))
    if not INTERPRETED or dtypes[0] != torch.float16 or case == next(first for first in HALVES if first.op == case.op)
]


@here
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_values(case):
    """Rounding is chance: where the terms cancel, one seed says little."""
    assert violations(case, device=DEVICE, seeds=range(1 if INTERPRETED and case.near is None else 4)) == []


@here
@pytest.mark.parametrize(("case", "dtypes"), IN_16_BITS, ids=lambda x: getattr(x, "id", str(x)))
def test_values_in_16_bits(case, dtypes):
    assert violations(case, dtypes, device=DEVICE, seeds=range(2)) == []


@here
@pytest.mark.parametrize("case", PADDED, ids=lambda case: case.id)
def test_padding_may_hold_anything(case):
    """Poisoned padding changes no bit, and its gradient is exactly 0. Twice the same call gives the same bits; the
    interpreter, which runs one program after another, need not show it."""
    call = case.make(0, device=DEVICE)
    mask = call.other["mask"]

    def poison(x):
        if x.dim() < 3:
            return x.clone()
        return x.masked_fill(padding(case.op, x, mask), torch.nan)

    function = getattr(functional, case.op)
    calls = (call, call.map(poison)) if INTERPRETED else (call, call, call.map(poison))
    for clean, *others in zip(*(flat(evaluate(function, each)) for each in calls), strict=True):
        assert clean.isfinite().all()
        assert all(map(clean.equal, others))


@here
@pytest.mark.parametrize("case", PADDED, ids=lambda case: case.id)
def test_no_real_token(case):
    call = case.make(0, device=DEVICE)
    call = call.with_options(mask=torch.zeros_like(call.other["mask"]))
    loss, gradients = evaluate(getattr(functional, case.op), call)
    assert all((x == 0).all() for x in (loss, *gradients))


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    by_name(
        "attention_kl-d26",
        "attention_mse-probs_d26",
        "attention_mse-scores_d26",
        "relation_kl-d6",
        "hidden_mse-l2",
        "attention_map_mse-mean",
        "attention_map_kl-plain",
        "attention_map_kl-mean",
        "topk_kd_loss-all_named",
        "linear_kd_loss-same_width",
        "hidden_cosine-layers",
        "moment_mse-layers",
    ),
    ids=lambda case: case.id,
)
def test_identical_inputs_give_exactly_0(case, dtype):
    call = case.make(0, (dtype, dtype), DEVICE)
    names = dict(zip(call.teacher, call.student, strict=True))
    call = replace(call, teacher={name: detached(call.student[names[name]]) for name in call.teacher})
    loss, gradients = evaluate(getattr(functional, case.op), call)
    assert all((x == 0).all() for x in (loss, *gradients))


def detached(value):
    return [x.detach() for x in value] if isinstance(value, list) else value.detach()


@here
@pytest.mark.skipif(not INTERPRETED, reason="memory that is not there is the host's")
@pytest.mark.parametrize("case", STRETCHED, ids=lambda case: case.id)
def test_offsets_beyond_32_bits(case):
    """The interpreter's integers wrap around as the GPU's do. Every axis in turn spans 2^32 elements."""
    sizes = {"batch": 2, "heads": 2, "heads_t": 2, "tokens": 5}
    small = {key: size for key, size in sizes.items() if key in case.shape}
    small = {} if case.shape.get("bias_s") else small  # which states the shape of the whole map
    call = replace(case, shape={**case.shape, **small}).make(0)
    function = getattr(functional, case.op)
    loss, gradients = evaluate(function, call)
    for axis in range(-call.leaves[0].dim(), 0):
        far_loss, far_gradients = evaluate(function, stretched(call, axis))
        assert far_loss.equal(loss)
        assert all(map(torch.equal, far_gradients, gradients))


@here
@pytest.mark.parametrize("op", ["hidden_mse", "hidden_cosine", "moment_mse"])
def test_layers_that_differ(op):
    """Layers of unlike width and dtype are launched in groups."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 8), (2, 5, 12), (2, 5, 8)]
    layers = [torch.randn(2, *shape, generator=generator).to(DEVICE) for shape in shapes]
    student = [
        x[0].to(dtype).requires_grad_()
        for x, dtype in zip(layers, (torch.float32, torch.float32, torch.float16), strict=True)
    ]
    teacher = [x[1] for x in layers]
    loss = getattr(functional, op)(student, teacher)
    expected = getattr(reference, op)(student, teacher)
    torch.testing.assert_close(loss, expected)
    for got, true in zip(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(got, true)


@here
def test_nan_in_a_real_token_reaches_the_loss():
    for case in by_name(
        "attention_kl-plain",
        "attention_mse-probs_plain",
        "attention_mse-scores_plain",
        "attention_map_mse-plain",
        "attention_map_kl-plain",
        "hidden_mse-plain",
        "topk_kd_loss-kl",
        "linear_kd_loss-kl",
        "hidden_cosine-plain",
        "moment_mse-plain",
    ):
        call = case.make(0, device=DEVICE)
        with torch.no_grad():
            call.leaves[0].view(-1)[0] = torch.nan
        assert getattr(functional, case.op)(**call.arguments).isnan()
