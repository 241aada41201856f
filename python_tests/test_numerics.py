"""Numerics of single ops beyond the list that test_checklist.py goes through: where terms cancel, overflow or are NaN.

Accuracy per dtype on the table of cases is in test_values.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from benches.peers import eager
from kdkernels import functional, reference

from .case import evaluate
from .cases import of

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("kl", "ce", "reverse_kl", "jsd", "tv")
INF = torch.inf


def gradient(function, student, *rest, **options):
    student = student.detach().requires_grad_()
    loss = function(student, *rest, **options)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("kind", ["jsd", "tv"])
def test_bounded_kinds_stay_bounded(kind):
    """Disjoint supports: jsd = log 2, tv = 1, and no NaN."""
    student, teacher = torch.full((2, 8), -INF), torch.full((2, 8), -INF)
    student[:, :3], teacher[:, 5:] = 0.0, 0.0
    loss, grad = gradient(functional.kd_loss, student, teacher, kind=kind)
    torch.testing.assert_close(loss.item(), math.log(2) if kind == "jsd" else 1.0, rtol=1e-6, atol=0)
    assert grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, INF])
def test_nan_in_a_real_row_shows(kind, value):
    """Silence would hide a diverged model. +inf has no softmax either."""
    student, teacher = torch.randn(3, 20), torch.randn(3, 20)
    student[1, 4] = value
    rows = functional.kd_loss(student, teacher, kind=kind, reduction="none")
    assert rows[1].isnan()
    assert rows[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    "op",
    [
        *("attention_kl", "attention_mse", "attention_map_kl", "attention_map_mse", "relation_kl"),
        *("hidden_mse", "hidden_cosine", "moment_mse", "gram_mse"),
    ],
)
def test_nan_in_a_real_token_shows(op):
    case = next(case for case in of(op) if case.mask is not None)
    call = case.make()
    batch, token = call.other["mask"].nonzero()[0].tolist()
    with torch.no_grad():
        leaf = call.leaves[0]
        (leaf[batch, 0, token] if op.startswith("attention") else leaf[batch, token]).fill_(torch.nan)
        assert getattr(functional, op)(**call.arguments).isnan()


def test_total_variation_ties():
    """A tie between some classes of a row whose others differ."""
    teacher = torch.tensor([[0.0, 0.0, 1.0, -1.0]]).repeat(2, 1)
    loss, grad = gradient(functional.kd_loss, teacher.flip(1).contiguous(), teacher, kind="tv")
    truth, true_grad = gradient(reference.kd_loss, teacher.flip(1).double(), teacher.double(), kind="tv")
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jsd", "tv"])
@pytest.mark.parametrize("magnitude", [1.0, 100.0, 1e4])
def test_divergences_are_never_negative_by_much(kind, magnitude):
    """Rounding may leave a few ulp of the logits below zero, no more (verl #2899: masked tails gave positive
    log-probabilities)."""
    teacher = magnitude + torch.randn(64, 130)
    rows = functional.kd_loss(teacher + 1e-3 * torch.randn(64, 130), teacher, kind=kind, reduction="none")
    assert rows.min() >= -4 * torch.finfo(torch.float32).eps * magnitude


@pytest.mark.parametrize("kind", KINDS)
def test_shift_by_a_constant(kind):
    """Logits are only defined up to a constant per row; a shift that float32 represents exactly changes nothing."""
    student, teacher = torch.randn(5, 64).mul(256).round() / 256, torch.randn(5, 64).mul(256).round() / 256
    loss, grad = gradient(functional.kd_loss, student, teacher, kind=kind)
    far_loss, far_grad = gradient(functional.kd_loss, student + 1024, teacher - 2048, kind=kind)
    torch.testing.assert_close(far_loss, loss, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(far_grad, grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_gram_identity_where_student_is_near_teacher(scale):
    """Item 7.4: |A|^2 + |B|^2 - 2 <A, B> loses all digits when A is near B; the loss must not."""
    q, k = torch.randn(2, 3, 65, 26), torch.randn(2, 3, 65, 26)
    q_s, k_s = q + scale * torch.randn_like(q), k + scale * torch.randn_like(k)
    got = functional.attention_mse(q_s, k_s, q, k)
    truth = reference.attention_mse(*(x.double() for x in (q_s, k_s, q, k)))
    plain = eager.attention_mse(q_s, k_s, q, k)
    assert (got - truth).abs() <= 2 * (plain - truth).abs() + 1e-5 * truth
    width = 26**-0.5

    def gram(a, b, c, d):
        return ((a.mT @ c) * (b.mT @ d)).sum(dtype=torch.float32)

    naive = gram(q_s, k_s, q_s, k_s) + gram(q, k, q, k) - 2 * gram(q_s, k_s, q, k)
    naive = naive * width**2 / (2 * 3 * 65 * 65)
    if scale <= 1e-3:
        assert (naive - truth).abs() > 1e-2 * truth


@pytest.mark.parametrize("scale", [1e-1, 1e-3])
def test_gram_identity_with_heads_of_different_size(scale):
    """The guard cannot subtract heads of different width: padded with zero features, the maps are near all the same."""
    q, k = torch.randn(2, 3, 65, 12), torch.randn(2, 3, 65, 12)
    wide_q, wide_k = (F.pad(x, (0, 14)) for x in (q, k))
    q_s, k_s = wide_q + scale * torch.randn_like(wide_q), wide_k + scale * torch.randn_like(wide_k)
    got, truth = (
        f(*(x.to(dtype) for x in (q_s, k_s, q, k)), scale_s=0.3, scale_t=0.3)
        for f, dtype in ((functional.attention_mse, torch.float32), (reference.attention_mse, torch.float64))
    )
    plain = eager.attention_mse(q_s, k_s, q, k, scale_s=0.3, scale_t=0.3)
    assert (got - truth).abs() <= 2 * (plain - truth).abs() + 1e-5 * truth


@pytest.mark.parametrize("magnitude", [1.0, 30.0, 1e3])
def test_attention_scores_of_any_size(magnitude):
    """Scores far beyond exp's range on either side, after a max-shift, and one-hot maps."""
    q_s, k_s, q_t, k_t = (magnitude * torch.randn(1, 2, 33, 12) for _ in range(4))
    loss = functional.attention_kl(q_s, k_s, q_t, k_t)
    truth = reference.attention_kl(*(x.double() for x in (q_s, k_s, q_t, k_t)))
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)


def test_zero_hidden_states_have_a_direction_to_learn():
    """PKD divides by the norm: 0 / 0 without an epsilon."""
    student, teacher = torch.zeros(1, 3, 8), torch.randn(1, 3, 8)
    loss, grad = gradient(functional.hidden_mse, student, teacher, normalize="l2")
    assert loss.isfinite() and grad.isfinite().all()
    assert (student / student.norm(dim=-1, keepdim=True)).isnan().all()
    loss, grad = gradient(functional.hidden_mse, torch.ones(1, 3, 8), teacher, normalize="layer_norm")
    assert loss.isfinite() and grad.isfinite().all()


def test_hidden_states_far_from_zero():
    """BERT's outlier features: a mean of thousands beside differences of one."""
    student = 4096 + torch.randn(2, 9, 64)
    teacher = 4096 + torch.randn(2, 9, 64)
    loss = functional.hidden_mse(student, teacher)
    torch.testing.assert_close(
        loss.double(), reference.hidden_mse(student.double(), teacher.double()), rtol=1e-6, atol=0
    )


def test_zero_states_have_cosine_0():
    """A norm below 1e-8 counts as 1e-8, as in torch's cosine_similarity; dividing by the norm gives 0 / 0."""
    student, teacher = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    student[0, 0], teacher[0, 1] = 0, 0
    student[0, 2:], teacher[0, 2] = 1e-10 * student[0, 2:], 0
    loss, grad = gradient(functional.hidden_cosine, student, teacher)
    truth, true_grad = gradient(reference.hidden_cosine, student.double(), teacher.double())
    torch.testing.assert_close(loss, (1 - F.cosine_similarity(student, teacher, dim=-1)).mean())
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-8)
    assert (student / student.norm(dim=-1, keepdim=True)).isnan().any()


def test_cosine_of_a_student_near_its_teacher():
    """1 - cos subtracts two numbers near 1: of a distance of 1e-8 nothing is left."""
    teacher = torch.randn(2, 9, 64)
    student = teacher + 1e-4 * torch.randn_like(teacher)
    loss = functional.hidden_cosine(student, teacher)
    truth = reference.hidden_cosine(student.double(), teacher.double())
    torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=0)
    assert ((1 - F.cosine_similarity(student, teacher, dim=-1)).mean() - truth).abs() > 0.1 * truth


def test_cosines_of_all_sizes():
    """From one half on 1 - cos is made from the distance: neither way loses digits where they meet, nor at the ends."""
    teacher, other = torch.randn(2, 64, 96), torch.randn(2, 64, 96)
    wanted = torch.cat([torch.linspace(-1, 1, 64), torch.linspace(0.499, 0.501, 64)]).view(2, 64, 1)
    unit = F.normalize(teacher, dim=-1)
    across = F.normalize(other - (other * unit).sum(-1, keepdim=True) * unit, dim=-1)
    student = wanted * unit + (1 - wanted.square()).clamp(min=0).sqrt() * across
    for row in range(64):
        given = student[:, row : row + 1], teacher[:, row : row + 1]
        loss, grad = gradient(functional.hidden_cosine, *given)
        truth, true_grad = gradient(reference.hidden_cosine, *(x.double() for x in given))
        torch.testing.assert_close(loss.double(), truth, rtol=3e-7, atol=0)
        torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-7)


def test_padding_has_no_gradient_whatever_comes_from_above():
    student, mask = torch.randn(1, 3, 8, requires_grad=True), torch.tensor([[True, True, False]])
    functional.hidden_cosine(student, torch.randn(1, 3, 8), mask).backward(torch.tensor(torch.inf))
    assert torch.equal(student.grad[0, 2], torch.zeros(8))


def test_variance_of_states_far_from_zero():
    """E[x^2] - E[x]^2 loses a variance of 1 beside a mean of 4096."""
    student, teacher = 4096 + torch.randn(2, 9, 64), 4096 + 1.1 * torch.randn(2, 9, 64)
    loss, grad = gradient(functional.moment_mse, student, teacher)
    truth, true_grad = gradient(reference.moment_mse, student.double(), teacher.double())
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-4, atol=1e-7)
    naive = student.square().mean(-1) - student.mean(-1).square()
    assert (naive - student.double().var(-1, correction=0)).abs().max() > 0.1


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)], ids=["mean", "variance"])
def test_moments_of_a_student_near_its_teacher(weights):
    """Two means or variances that differ in their last digits only, which rounding takes from each."""
    teacher = 3 + torch.randn(2, 9, 100)
    student = teacher + 1e-5 * torch.randn_like(teacher)
    options = {"mean_weight": weights[0], "variance_weight": weights[1], "variance": "squared"}
    loss, grad = gradient(functional.moment_mse, student, teacher, **options)
    truth, true_grad = gradient(reference.moment_mse, student.double(), teacher.double(), **options)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    assert (grad - true_grad).norm() < 1e-5 * true_grad.norm()
    _, naive = gradient(reference.moment_mse, student, teacher, **options)
    assert (naive - true_grad).norm() > 1e-2 * true_grad.norm()


@pytest.mark.parametrize(
    "case", [c for c in of("kd_loss", "topk_kd_loss") if c.near is None and not c.shape["labels"]], ids=lambda c: c.id
)
def test_gradient_of_a_row_sums_to_zero(case):
    """Softmax is invariant to shifts, so what it hands back has no component along them."""
    _, (grad,) = evaluate(getattr(functional, case.op), case.make())
    assert grad.double().sum(-1).abs().max() <= 2e-6 * grad.double().abs().sum(-1).max() + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [INF, -INF, torch.nan], ids=str)
@pytest.mark.parametrize("where", ["student", "teacher", "weight", "bias"])
def test_a_projection_hides_nothing_infinite(where, value, dtype):
    """Products of parts of numbers must not make finite what is not, nor NaN what is infinite."""
    given = {"student": torch.rand(2, 9, 40) + 0.1, "teacher": torch.randn(2, 9, 50)}
    given |= {"weight": torch.rand(50, 40) + 0.1, "bias": torch.randn(50)}
    given[where].view(-1)[7] = value
    given = {name: x.to(dtype) for name, x in given.items()}
    loss = functional.hidden_mse(given["student"], given["teacher"], weight=given["weight"], bias=given["bias"])
    assert loss.isnan() if math.isnan(value) else loss == INF


@pytest.mark.parametrize("scale", [2.0**127, 2.0**100, 2.0**-96, 2.0**-110, 2.0**-126], ids="{:.0e}".format)
@pytest.mark.parametrize("where", ["student", "weight", "one row"])
def test_a_projection_takes_numbers_of_any_size(where, scale):
    """One side's scale makes up for the other's: large numbers don't overflow, small ones keep their last bits."""
    student, weight, teacher = torch.rand(2, 9, 40) + 1, torch.rand(50, 40) + 1, torch.rand(2, 9, 50)
    student *= scale if where == "student" else 1 / scale if where == "weight" else 1
    weight *= scale if where == "weight" else 1 / scale if where == "student" else 1
    if where == "one row":
        student[1, 3] *= min(scale, 2.0**20)
    given = {"student": student, "weight": weight}
    call = {name: x.clone().requires_grad_() for name, x in given.items()}
    truth = {name: x.double().requires_grad_() for name, x in given.items()}
    normalize = "layer_norm" if where == "one row" else None
    loss = functional.hidden_mse(call["student"], teacher, weight=call["weight"], normalize=normalize)
    exact = reference.hidden_mse(truth["student"], teacher.double(), weight=truth["weight"], normalize=normalize)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    for name, grad in zip(call, torch.autograd.grad(loss, [*call.values()]), strict=True):
        (expected,) = torch.autograd.grad(exact, truth[name], retain_graph=True)
        largest = expected.abs().max()
        if 1e-37 < largest < 3e38:
            assert (grad - expected).abs().max() <= 2e-6 * largest, name
