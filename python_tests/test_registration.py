"""How the ops sit in PyTorch: opcheck on every op, fullgraph compilation, shapes without data."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from kdkernels import functional

from .case import OPS, Case, evaluate, upstream
from .cases import CASES, of

pytestmark = pytest.mark.usefixtures("one_thread")

# opcheck and the compiler take most of a second each: the plain row of each op, other layouts, masks and what is
# saved for backward.
CHOSEN = {
    "kd_loss": ("kl", "labels_masked", "row_t", "none", "transposed", "strided"),
    "linear_kd_loss": ("kl", "labels_masked", "row_t", "none", "transposed", "strided"),
    "topk_kd_loss": ("kl", "labels_bucket", "row_t", "none", "int32", "strided"),
    "attention_kl": (
        *("plain", "mask_holes", "none", "transposed", "strided", "expanded", "reverse_none", "head_mean_none"),
        *("causal_holes", "bias", "grouped_mapped", "lse", "packed_none", "packed_all"),
    ),
    "attention_mse": (
        *("scores_mask_holes", "probs_plain", "scores_transposed", "probs_strided", "scores_packed", "probs_packed"),
    ),
    "attention_map_mse": ("plain", "mask_holes", "mean_unlike", "transposed", "strided"),
    "attention_map_kl": ("plain", "mask_holes", "none", "none_mean", "transposed", "strided"),
    "relation_kl": ("plain", "mask_holes", "none", "transposed", "strided", "packed_none"),
    "hidden_cosine": ("layers", "mask_holes", "strided"),
    "gram_mse": ("hidden_plain", "hidden_same", "token_mask_holes", "token_strided"),
    "moment_mse": ("layers", "mask_holes", "squared", "strided"),
    "hidden_mse": ("layers", "projected_each", "mask_holes", "strided", "strided_projected", "l2"),
}
SOME = [case for case in CASES if case.name in CHOSEN[case.op]]
ids = {"ids": lambda case: case.id}


class Recorder(TorchDispatchMode):
    """The calls of our ops that pass the dispatcher, forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "kdkernels":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def recorded(case: Case) -> tuple[tuple, tuple]:
    """The calls of the op and of its backward: that of a second one, after which nothing that forward left is there."""
    call = case.make()
    with Recorder() as recorder:
        loss = getattr(functional, case.op)(**call.arguments)
        for _ in range(2):
            torch.autograd.grad(loss, call.leaves, upstream(loss), retain_graph=True)
    return recorder.calls[0], recorder.calls[-1]


@pytest.mark.parametrize("case", SOME, **ids)
def test_opcheck(case):
    (forward, *given), (backward, *saved) = recorded(case)
    assert [str(forward), str(backward)] == [f"kdkernels.{case.op}.default", f"kdkernels.{case.op}_backward.default"]
    torch.library.opcheck(forward, *given)
    # Backward has no derivative of its own, and says so (test_gradients.py).
    torch.library.opcheck(backward, *tree_map_only(torch.Tensor, torch.Tensor.detach, saved))


def test_chosen_rows_exist():
    assert {op: len(names) for op, names in CHOSEN.items()} == {op: sum(case.op == op for case in SOME) for op in OPS}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", SOME, **ids)
def test_compiles_without_a_break(case, dynamic):
    function, call = getattr(functional, case.op), case.make()
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected, got = evaluate(function, call), evaluate(compiled, call)
    assert torch.equal(expected[0], got[0])
    assert all(torch.equal(a, b) for a, b in zip(expected[1], got[1], strict=True))


@pytest.mark.parametrize("op", OPS)
def test_inductor(op):
    """With code of Inductor's own around the op."""
    case = of(op)[0]
    function, call = getattr(functional, op), case.make()
    torch._dynamo.reset()

    def step(**arguments):
        return 2 * function(**arguments)

    expected, got = evaluate(step, call), evaluate(torch.compile(step, fullgraph=True), call)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("case", CASES, **ids)
def test_fake_shapes(case):
    """Loss, and the gradients' shapes and dtypes, without any data."""
    loss, gradients = evaluate(getattr(functional, case.op), case.make(dtypes=(torch.bfloat16, torch.float32)))
    mode = FakeTensorMode()
    fake = case.make(dtypes=(torch.bfloat16, torch.float32)).map(mode.from_tensor)
    other = {name: mode.from_tensor(value) if torch.is_tensor(value) else value for name, value in fake.other.items()}
    with mode:
        fake_loss, fake_gradients = evaluate(getattr(functional, case.op), fake.with_options(**other))
    for real, imitation in zip([loss, *gradients], [fake_loss, *fake_gradients], strict=True):
        assert (real.shape, real.dtype, real.stride()) == (imitation.shape, imitation.dtype, imitation.stride())
