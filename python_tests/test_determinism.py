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
    and case.shape.get("named") in (None, case.shape.get("classes"))
    and case.options.get("tail") != "bucket"
    and case.options.get("head_map") is None
    and not {"bias_s", "lse"} & set(case.shape)
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


def gradient_of(function, student, *arguments, **options):
    student = student.detach().requires_grad_()
    function(student, *arguments, **options).backward(torch.tensor(0.5))
    return student.grad


@pytest.mark.parametrize("labelled", [False, True], ids=["soft", "labelled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_gradient_of_logits_has_the_bits_of_small_ones(dtype, labelled):
    """Past 16 MB a gradient is stored in another way; 28001 classes leave lines that two rows share."""
    student, teacher = (3 * torch.randn(300, 28001)).to(dtype), torch.randn(300, 28001).to(dtype)
    labels = torch.randint(28001, (300,))

    def of(rows: slice) -> torch.Tensor:
        hard = {"labels": labels[rows], "alpha": 0.5} if labelled else {}
        return gradient_of(functional.kd_loss, student[rows], teacher[rows], reduction="sum", **hard)

    large = of(slice(300))
    assert large.nbytes > 16 << 20
    for rows in (slice(100), slice(100, 300)):
        assert torch.equal(large[rows], of(rows))


def test_large_gradient_of_hidden_states_has_the_bits_of_small_ones():
    student, teacher = torch.randn(4, 2600, 413), torch.randn(4, 2600, 413)
    large = gradient_of(functional.hidden_mse, student, teacher)
    assert large.nbytes > 16 << 20
    for half in (slice(2), slice(2, 4)):
        assert torch.equal(2 * large[half], gradient_of(functional.hidden_mse, student[half], teacher[half]))
