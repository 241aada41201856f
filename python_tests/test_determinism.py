"""The same bits from run to run and for any thread count, and exactly 0 where student and teacher are the same."""

import pytest
import torch

from kdkernels import functional

from .case import OPS, evaluate
from .cases import CASES

IDENTICAL = [
    case
    for case in CASES
    if not case.shape.get("labels")
    and not case.shape.get("weights")
    and case.layout != "expanded"
    and case.options.get("kind") != "ce"
    and case.options.get("scale_s") is None
]
ids = {"ids": lambda case: case.id}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def flat(result) -> list[torch.Tensor]:
    return [result[0], *result[1]]


@pytest.mark.parametrize("case", CASES, **ids)
def test_bitwise_for_any_thread_count(case, threads):
    function, results = getattr(functional, case.op), []
    for count in (1, 1, 2, 3):
        threads(count)
        results.append(flat(evaluate(function, case.make())))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", IDENTICAL, **ids)
def test_identical_inputs_give_exactly_zero(case, dtype, threads):
    """Student = teacher, bit by bit, in another memory layout too."""
    threads(1)
    call = case.make(dtypes=(dtype, dtype))
    for name, value in zip(call.teacher, call.student.values(), strict=True):
        call.teacher[name] = [x.detach().clone() for x in value] if isinstance(value, list) else value.detach().clone()
    loss, gradients = evaluate(getattr(functional, case.op), call)
    assert (loss == 0).all(), loss
    assert all((g == 0).all() for g in gradients)


def test_identical_reaches_every_op():
    assert {case.op for case in IDENTICAL} == set(OPS)
