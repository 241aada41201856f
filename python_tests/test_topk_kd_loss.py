"""A cached top-k teacher: what it means beside the dense loss, and the ends of its mass. Values, gradients and the
rest of the contract are checked with all ops, by the rows of `cases/logits.py`."""

import pytest
import torch

from benches.peers import eager
from kdkernels import functional, reference

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("kl", "ce", "jsd", "tv")
INF = torch.inf


def gradient(function, student, *rest, **options):
    student = student.detach().requires_grad_()
    loss = function(student, *rest, **options)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def logits(request):
    return tuple(torch.randn(6, 50, dtype=request.param) for _ in range(2))


@pytest.mark.parametrize("kind", KINDS)
def test_renormalised_is_a_teacher_without_mass_elsewhere(kind, logits):
    """The whole vocabulary with -inf for all but K classes: the dense loss, which stores and reads V values a row."""
    student, teacher = logits
    values, indices = teacher.topk(5)
    dense = torch.full_like(teacher, -INF).scatter(-1, indices, values)
    expected = gradient(functional.kd_loss, student, dense, kind=kind, temperature=2.0)
    got = gradient(functional.topk_kd_loss, student, values, indices, kind=kind, temperature=2.0)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", (*KINDS, "reverse_kl"))
def test_a_bucket_of_one_class_is_the_dense_loss(kind, logits):
    student, teacher = logits
    expected = gradient(functional.kd_loss, student, teacher, kind=kind, temperature=2.0)
    for named in (49, 50):  # the rest is one class, or none
        values, indices = (teacher / 2).log_softmax(-1).topk(named)
        got = gradient(functional.topk_kd_loss, student, values, indices, tail="bucket", kind=kind, temperature=2.0)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_bucket_tells_less_than_the_whole_teacher(logits):
    """Merging classes can only lower a divergence: 0 <= bucket <= dense, from K to K more of it."""
    student, teacher = (x.double() for x in logits)
    losses = []
    for named in (1, 5, 20, 50):
        values, indices = teacher.log_softmax(-1).topk(named)
        losses.append(functional.topk_kd_loss(student, values, indices, tail="bucket"))
    assert 0 <= losses[0] < losses[1] < losses[2] < losses[3]


@pytest.mark.parametrize("kind", ("kl", "reverse_kl", "jsd"))
def test_a_student_that_has_learnt_everything(kind):
    """Its own log-probabilities come back as the teacher's: 0 to the rounding of the cache."""
    student = 3 * torch.randn(6, 1000)
    values, indices = student.log_softmax(-1).topk(8)
    loss, grad = gradient(functional.topk_kd_loss, student, values, indices, tail="bucket", kind=kind)
    assert loss.abs() < 1e-6
    assert grad.abs().max() < 1e-6


def test_the_students_rest_keeps_its_digits():
    """1 minus the named probabilities loses the rest below 1e-7; its own exponentials do not."""
    student = torch.zeros(1, 1000)
    student[0, 0] = 40.0
    values, indices = torch.tensor([[-0.7]]), torch.zeros(1, 1, dtype=torch.long)
    loss, grad = gradient(functional.topk_kd_loss, student, values, indices, tail="bucket")
    truth, true_grad = gradient(reference.topk_kd_loss, student.double(), values.double(), indices, tail="bucket")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=0)
    assert not eager.topk_kd_loss(student, values, indices, tail="bucket").isfinite()


@pytest.mark.parametrize("temperature", [20.0, 1000.0])
def test_a_hard_term_beside_a_high_temperature(temperature):
    """The rest's logit T log sum exp(x / T) is far above all others then: what is stored relative to it has lost the
    digits that the cross-entropy at T = 1 needs."""
    student, teacher, labels = 3 * torch.randn(6, 3000), torch.randn(6, 3000), torch.randint(3000, (6,))
    values, indices = (teacher / temperature).log_softmax(-1).topk(8)
    labels[:3] = indices[:3, 0]
    options = {"tail": "bucket", "temperature": temperature, "labels": labels, "alpha": 0.0}
    loss, grad = gradient(functional.topk_kd_loss, student, values, indices, **options)
    truth, true_grad = gradient(reference.topk_kd_loss, student.double(), values.double(), indices, **options)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=2e-6, atol=1e-12)
    base = temperature * torch.logsumexp(student / temperature, -1, keepdim=True)
    stored = ((student - base) + base).softmax(-1).double()
    assert ((stored / student.double().softmax(-1) - 1).abs() > 2e-6).any()


@pytest.mark.parametrize("excess", [0.0, 1e-7, 1e-3])
def test_teacher_without_a_rest(excess):
    """Probabilities that reach 1, or pass it by rounding, leave nothing and are renormalised."""
    student = torch.randn(4, 30)
    values = torch.tensor([0.5, 0.3, 0.2]).mul(1 + excess).log().expand(4, 3)
    indices = torch.tensor([3, 14, 15]).expand(4, 3)
    got = gradient(functional.topk_kd_loss, student, values, indices, tail="bucket")
    expected = gradient(functional.topk_kd_loss, student, values, indices)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    if excess:
        assert functional.topk_kd_loss(student, values, indices, tail="bucket", kind="reverse_kl") == INF


def test_classes_without_mass():
    """-inf in the student: nothing where the teacher has no mass, +inf where it has."""
    student, values = torch.randn(3, 20), torch.randn(3, 4)
    indices = torch.arange(4).expand(3, 4)
    expected = gradient(functional.topk_kd_loss, student, values, indices, reduction="sum")
    padded = torch.cat([student, torch.full((3, 12), -INF)], -1)
    got = gradient(functional.topk_kd_loss, padded, values, indices, reduction="sum")
    torch.testing.assert_close((got[0], got[1][:, :20]), expected)
    assert (got[1][:, 20:] == 0).all()
    values[:, 2] = -INF
    student[1, 2] = -INF
    assert functional.topk_kd_loss(student, values, indices).isfinite()
    student[1, 3] = -INF
    rows = functional.topk_kd_loss(student, values, indices, reduction="none")
    assert rows[1] == INF and rows[[0, 2]].isfinite().all()


@pytest.mark.parametrize("column", [2, 17])
@pytest.mark.parametrize("value", [torch.nan, INF])
def test_nan_in_a_real_row_shows(value, column):
    """In a named class or elsewhere."""
    student, values = torch.randn(3, 20), torch.randn(3, 4)
    student[1, column] = value
    rows = functional.topk_kd_loss(student, values, torch.arange(4).expand(3, 4), reduction="none")
    assert rows[1].isnan()
    assert rows[[0, 2]].isfinite().all()


def test_a_class_named_twice_raises():
    student, values, indices = torch.randn(3, 20), torch.randn(3, 4), torch.arange(4).repeat(3, 1)
    indices[1, 3] = 0
    with pytest.raises(RuntimeError, match="teacher_indices must not name a class twice in a row, got 0 twice"):
        functional.topk_kd_loss(student, values, indices)
    functional.topk_kd_loss(student, values, indices, mask=torch.tensor([True, False, True]))


def test_strided_indices():
    """A cache slices its rows: the first K of 10 stored columns, and every second position."""
    student, teacher = torch.randn(4, 6, 50), torch.randn(8, 6, 50)
    values, indices = teacher.topk(10)
    got = functional.topk_kd_loss(student, values[::2, :, :4], indices[::2, :, :4])
    expected = functional.topk_kd_loss(student, values[::2, :, :4].contiguous(), indices[::2, :, :4].contiguous())
    assert torch.equal(got, expected)
