"""The numerics list of the field's known failures, item by item: what naive code gets wrong, asserted, beside what the
losses give.

     1  a fully masked sequence             here
     2  nothing real at all                 here
     3  logits of -inf                      here
     4  no logarithm of a probability       here, test_determinism.py
     5  16-bit inputs, float32 arithmetic   here
     6  T^2, KL or cross-entropy            here
     7  reductions, accumulated parts       here, test_semantics.py
     8  upstream gradients, GradScaler      here, test_gradients.py, test_integrations.py
     9  64-bit offsets, broken tails        here, test_offsets.py, test_triton*.py, test_cuda_host.py
    10  strides                             test_checklist_torch.py, test_semantics.py, test_memory.py
    11  results repeat                      test_checklist_torch.py, test_determinism.py
    12  double backward                     test_checklist_torch.py, test_gradients.py
    13  backward twice                      test_checklist_torch.py, test_gradients.py
    14  torch.func, torch.compile           test_checklist_torch.py, test_integrations.py, test_registration.py
    15  CUDA graphs, no waiting             test_checklist_torch.py, test_layers.py, test_triton.py, test_cuda_gpu.py
    16  autocast                            test_checklist_torch.py, test_integrations.py
    17  teachers                            test_checklist_torch.py, test_errors.py
    18  saturation                          here
    19  exponentials, thread counts         here, test_determinism.py
    20  dropout                             test_checklist_torch.py

A test's name begins with its item: test_01_... Accuracy in every dtype against float64 is test_values.py's, and
further numerics are in test_numerics.py.
"""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benches.peers import eager
from kdkernels import functional, reference

from .case import OPS, evaluate
from .cases import of
from .sparse import far_apart

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("kl", "ce", "reverse_kl", "jsd", "tv")
PRODUCTS = [op for op in ("attention_kl", "attention_mse", "relation_kl", "linear_kd_loss") if op in OPS]
INF = torch.inf


def ours(op):
    return getattr(functional, op)


def naive(op):
    return eager.VARIANTS[op][0]


def gradient(function, student, *rest, above=1.0, **options):
    student = student.detach().requires_grad_()
    loss = function(student, *rest, **options)
    return loss.detach(), torch.autograd.grad(loss, student, torch.full_like(loss, above))[0]


def masked(op):
    return next(c for c in of(op) if c.mask is not None).make()


def relative_error(got, truth) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


def naive_extended_mask(student_scores, teacher_scores, mask, **options):
    """As BERT's extended mask: added to the scores of padding, where NaN stays NaN."""
    extended = -1e4 * (~mask[:, None, None, :]).float()
    return naive("attention_map_kl")(student_scores + extended, teacher_scores + extended, **options)


@pytest.mark.parametrize("op", OPS)
def test_01_a_masked_sequence_counts_nothing(op):
    """What it holds is NaN, which a mask multiplied in afterwards keeps, in the loss or in the gradient. Its gradient
    is 0 and the others' mean is theirs alone."""
    call = masked(op)
    mask = call.other["mask"]
    mask[0] = False

    def sequences(x) -> bool:
        return torch.is_tensor(x) and x.shape[:1] == mask.shape[:1]  # and no projection

    def poison(x):
        nan = torch.full_like(x[:1], torch.nan)
        return torch.cat((nan, x[1:])) if sequences(x) else x.clone()

    rest = call.map(lambda x: x[1:].clone() if sequences(x) else x.clone())
    rest = rest.with_options(**{name: x[1:] for name, x in call.other.items() if sequences(x)})
    dirty = call.map(poison)
    loss, gradients = evaluate(ours(op), dirty)
    # The eager code of this op fills padded scores in, which hides a map that is all padding.
    careless = evaluate(naive_extended_mask if op == "attention_map_kl" else naive(op), dirty)
    expected, other_gradients = evaluate(ours(op), rest)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for leaf, got, other in zip(call.leaves, gradients, other_gradients, strict=True):
        if sequences(leaf):
            assert (got[0] == 0).all()
            got = got[1:]
        torch.testing.assert_close(got, other)
    assert any(x.isnan().any() for x in (careless[0], *careless[1]))


@pytest.mark.parametrize("op", OPS)
def test_02_nothing_real_gives_zero(op):
    """0 / 0 otherwise."""
    call = masked(op)
    call = call.with_options(mask=torch.zeros_like(call.other["mask"]))
    loss, gradients = evaluate(ours(op), call)
    assert loss == 0 and all((g == 0).all() for g in gradients)
    assert naive(op)(**call.arguments).isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_03_vocabulary_padding_is_a_no_op(kind):
    """-inf on both sides: the loss without those classes, and gradient 0. Naive: 0 * (-inf - -inf) = NaN."""
    student, teacher = torch.randn(5, 40), torch.randn(5, 40)
    padded = [F.pad(x, (0, 24), value=-INF) for x in (student, teacher)]
    loss, grad = gradient(functional.kd_loss, student, teacher, kind=kind, temperature=2.0)
    padded_loss, padded_grad = gradient(functional.kd_loss, *padded, kind=kind, temperature=2.0)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(padded_grad[:, :40], grad, rtol=1e-5, atol=1e-8)
    assert (padded_grad[:, 40:] == 0).all()
    if kind != "tv":
        assert eager.kd_loss(*padded, kind=kind, temperature=2.0).isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_03_teacher_without_mass(kind):
    """p_t = 0 where the teacher is -inf: the term is 0 and everything stays finite, except KL(student || teacher)."""
    student, teacher = torch.randn(3, 20), torch.randn(3, 20)
    teacher[:, 7] = -INF
    loss, grad = gradient(functional.kd_loss, student, teacher, kind=kind)
    if kind == "reverse_kl":
        assert loss == INF
        return
    truth, true_grad = gradient(reference.kd_loss, student.double(), teacher.double(), kind=kind)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-8)
    if kind == "kl":
        assert eager.kd_loss(student, teacher).isnan()


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_03_student_without_mass(kind):
    """p_t > 0 where the student is -inf: +inf, in that row alone."""
    student, teacher = torch.randn(3, 20), torch.randn(3, 20)
    student[1, 7] = -INF
    rows = functional.kd_loss(student, teacher, kind=kind, reduction="none")
    assert rows[1] == INF
    assert rows[[0, 2]].isfinite().all()
    assert functional.kd_loss(student, teacher, kind=kind) == INF
    # A term clamped to be finite hides it.
    p_t, log_s = teacher.softmax(-1), student.softmax(-1).clamp_min(1e-10).log()
    assert -(p_t * log_s).sum(-1).mean() < 10


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jsd", "tv"])
def test_04_identical_inputs_give_exactly_zero(kind):
    """log_softmax's derivative, p_s sum(p_t) - p_t, is not 0: the sum is not 1 to the bit."""
    logits = 3 * torch.randn(16, 999)
    loss, grad = gradient(functional.kd_loss, logits, logits.clone(), kind=kind, temperature=3.0)
    assert loss == 0 and (grad == 0).all()
    if kind == "kl":
        loss, grad = gradient(eager.kd_loss_softmax_target, logits, logits.clone(), temperature=3.0)
        assert loss != 0 and (grad != 0).any()


def test_04_underflow_on_both_sides():
    """Liger #1453: both probabilities below 1e-45. Naive: log(0) - log(0)."""
    student, teacher = torch.tensor([[0.0, -150.0, -200.0]]), torch.tensor([[0.0, -200.0, -150.0]])
    loss, grad = gradient(functional.kd_loss, student, teacher, kind="jsd")
    assert loss.isfinite() and loss >= 0
    assert grad.isfinite().all()
    assert eager.kd_loss(student, teacher, kind="jsd").isnan()


def test_04_total_variation_ties():
    """p_s = p_t: gradient 0, and not half of a sign that calls a tie negative (Liger #1373)."""
    student = torch.zeros(2, 4)
    _, grad = gradient(functional.kd_loss, student, student.clone(), kind="tv")
    assert (grad == 0).all()
    p = student.softmax(-1)
    assert (torch.where(p > p.clone(), 0.5, -0.5) * p != 0).all()


def test_05_logits_leave_16_bits_before_they_are_divided():
    """float16 logits over a small temperature leave float16's range (Liger #1432: and sums lose percents)."""
    student, teacher = 60 * torch.randn(4, 300).half(), 60 * torch.randn(4, 300).half()
    loss, grad = gradient(functional.kd_loss, student, teacher, temperature=1e-3)
    assert loss.isfinite() and grad.isfinite().all()
    assert not eager.kd_loss(student, teacher, temperature=1e-3).isfinite()


@pytest.mark.parametrize("op", PRODUCTS)
def test_05_products_are_not_rounded_to_16_bits(op):
    """Scores or logits that leave a product as bfloat16 have lost percents of a small difference."""
    call = of(op)[0].make(dtypes=(torch.bfloat16, torch.bfloat16))
    truth = getattr(reference, op)(**call.to(torch.float64).arguments)
    got, rounded = (abs(f(**call.arguments).double() - truth) / truth for f in (ours(op), naive(op)))
    assert got < 1e-6 and rounded > 1e-4


def test_05_counts_are_not_16_bits():
    """TextBrewer with float16 maps: 256 tokens squared is past 65504, its count becomes inf and the loss silently 0."""
    q, k = (torch.randn(1, 2, 300, 8).half() for _ in range(2))
    mask = torch.ones(1, 300, dtype=torch.bool)
    loss = functional.attention_mse(q, k, k, q, mask)
    truth = reference.attention_mse(*(x.double() for x in (q, k, k, q)), mask)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    assert (mask.half().sum(-1) ** 2).sum().isinf()


def test_06_teacher_entropy_is_all_that_ce_and_kl_differ_by():
    """The same gradient. Without T^2 it shrinks as 1 / T^2 and the hard term beside it takes over."""
    student, teacher = torch.randn(4, 50), torch.randn(4, 50)
    kl, kl_grad = gradient(functional.kd_loss, student, teacher, temperature=3.0)
    ce, ce_grad = gradient(functional.kd_loss, student, teacher, temperature=3.0, kind="ce")
    entropy = torch.distributions.Categorical(logits=teacher / 3.0).entropy().mean()
    torch.testing.assert_close(ce, kl + 9.0 * entropy)
    torch.testing.assert_close(ce_grad, kl_grad)
    unscaled, small = gradient(functional.kd_loss, student, teacher, temperature=3.0, scale_t2=False)
    torch.testing.assert_close(kl, 9.0 * unscaled)
    cold, hot = (
        gradient(functional.kd_loss, student, teacher, temperature=t, scale_t2=False)[1].norm() for t in (10.0, 100.0)
    )
    assert 80 < cold / hot < 120 and small.norm() < kl_grad.norm() / 8


@pytest.mark.parametrize("op", [op for op in OPS if any(c.options.get("reduction") == "none" for c in of(op))])
def test_07_every_row_has_its_own_upstream_gradient(op):
    """A gradient made in forward for the sum and scaled by one number afterwards is another one (Liger #1298)."""
    call = next(c for c in of(op) if c.options.get("reduction") == "none").make()
    loss = ours(op)(**call.arguments)
    above = torch.rand_like(loss)
    got = torch.autograd.grad(loss, call.leaves, above)
    truth_call = call.to(torch.float64)
    truth = torch.autograd.grad(
        getattr(reference, op)(**truth_call.arguments), truth_call.leaves, above.double(), allow_unused=True
    )
    total = ours(op)(**call.with_options(reduction="sum").arguments)
    in_forward = [g * above.mean() for g in torch.autograd.grad(total, call.leaves)]
    for a, b, c in zip(got, truth, in_forward, strict=True):
        assert relative_error(a, b) < 1e-5 < 0.05 < relative_error(c, b)


def test_07_accumulated_parts_are_the_whole():
    """Parts with unequal numbers of real rows: sums over the whole's count, where a mean of means is wrong."""
    student, teacher, mask = torch.randn(8, 9, 20), torch.randn(8, 9, 20), torch.rand(8, 9) < 0.5
    mask[:2] = True
    teacher[:2] *= 3
    whole = functional.kd_loss(student, teacher, mask=mask)
    parts = [(student[rows], teacher[rows], mask[rows]) for rows in (slice(0, 2), slice(2, 8))]
    sums = [functional.kd_loss(s, t, mask=m, reduction="sum") / mask.sum() for s, t, m in parts]
    torch.testing.assert_close(sum(sums), whole)
    means = [functional.kd_loss(s, t, mask=m) / len(parts) for s, t, m in parts]
    assert abs(sum(means) - whole) > 1e-3 * whole


def test_08_a_gradient_scale_reaches_numbers_below_float16():
    """A gradient stored in 16 bits for an upstream of 1 and scaled afterwards has lost what the scale was for."""
    student, teacher = torch.randn(64, 4000).half(), torch.randn(64, 4000).half()
    scale, options = 2.0**14, {"temperature": 16.0, "scale_t2": False}
    _, got = gradient(functional.kd_loss, student, teacher, above=scale, **options)
    _, truth = gradient(reference.kd_loss, student.double(), teacher.double(), above=scale, **options)
    late = gradient(functional.kd_loss, student, teacher, **options)[1] * scale
    assert relative_error(got, truth) < 1e-3 < 1e-2 < relative_error(late, truth)
    assert (late == 0).sum() > 100 * (got == 0).sum()


@pytest.mark.parametrize("classes", [*range(1, 19), 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_09_tails_hold_nothing(classes):
    """Classes up to the next whole vector would have probability if read as 0 (verl #2899: log-probabilities > 0)."""
    student, teacher = torch.randn(3, classes) - 3, torch.randn(3, classes) - 3
    rows = functional.kd_loss(student, teacher, kind="ce", reduction="none")
    truth = reference.kd_loss(student.double(), teacher.double(), kind="ce", reduction="none")
    torch.testing.assert_close(rows.double(), truth, rtol=1e-6, atol=1e-6)
    padded = [F.pad(x, (0, 1)) for x in (student, teacher)]
    assert ((functional.kd_loss(*padded, kind="ce", reduction="none") - rows).abs() > 1e-3).all()


def test_09_an_index_times_a_stride_needs_64_bits():
    student, teacher = torch.randn(3, 41), torch.randn(3, 41)
    far = far_apart(student, 0)
    assert torch.equal(functional.kd_loss(far, teacher), functional.kd_loss(student, teacher))
    assert torch.tensor(2 * far.stride(0)).to(torch.int32).item() != 2 * far.stride(0)


@pytest.mark.parametrize("near", [1e-1, 1e-2, 1e-3, 1e-4])
def test_18_a_gradient_near_convergence(near):
    """p_s - p_t of 16-bit softmaxes is wrong by tens of percents where ours only has the rounding of its storage. With
    float32 logits the same difference stays within a few units of the last place of p."""
    teacher = torch.randn(16, 1000)
    student = teacher + near * torch.randn(16, 1000)
    halves = student.bfloat16(), teacher.bfloat16()
    _, truth = gradient(reference.kd_loss, *(x.double() for x in halves))
    assert relative_error(gradient(functional.kd_loss, *halves)[1], truth) < 4e-3
    rounded = (halves[0].softmax(-1) - halves[1].softmax(-1)) / 16
    assert relative_error(rounded, truth) > 2e-2
    _, truth = gradient(reference.kd_loss, student.double(), teacher.double())
    assert relative_error(gradient(functional.kd_loss, student, teacher)[1], truth) < 3e-7 / near


class PublishedGradient(torch.autograd.Function):
    """KL of rows of scores whose gradient is the published -p_s expm1(log p_t - log p_s)."""

    @staticmethod
    def forward(ctx, student, teacher):
        ctx.save_for_backward(student.log_softmax(-1), teacher.log_softmax(-1))
        return reference.kd_loss(student, teacher, reduction="sum")

    @staticmethod
    def backward(ctx, above):
        log_s, log_t = ctx.saved_tensors
        return -above * log_s.exp() * torch.expm1(log_t - log_s), None


@pytest.mark.parametrize("near", [1e-2, 1e-4])
@pytest.mark.parametrize("op", ["kd_loss", "attention_map_kl", "topk_kd_loss"])
def test_18_no_worse_than_the_published_form(op, near):
    """p_s - p_t as -p_s expm1((t - lse_t) - (s - lse_s)), which is to save it from cancelling: in float32 those two
    differences are rounded at the size of log p, which costs more digits than p_s and p_t lose at their own size. Where
    scores come from products, the products' rounding is more than either."""
    teacher = 2 * torch.randn(1, 4, 300, 300)
    student = teacher + near * torch.randn_like(teacher)
    rest = (torch.arange(300).expand(teacher.shape),) if op == "topk_kd_loss" else ()  # K = V
    _, got = gradient(getattr(functional, op), student, teacher, *rest, reduction="sum")
    _, published = gradient(PublishedGradient.apply, student, teacher)
    _, truth = gradient(reference.kd_loss, student.double(), teacher.double(), reduction="sum")
    assert relative_error(got, truth) < relative_error(published, truth)


def test_19_exponentials():
    """e^-x to two units in the last place, beside the rounding of log2(e): naive code rounds the product with it, and
    the error grows with x."""
    x = torch.linspace(0, 87, 20001)
    student = torch.stack((torch.zeros_like(x), -x), -1)
    teacher = torch.tensor([0.0, -INF]).expand_as(student)
    _, grad = gradient(functional.kd_loss, student, teacher, reduction="sum")
    truth = torch.sigmoid(-x.double())
    eps = torch.finfo(torch.float32).eps
    error = (grad[:, 1].double() - truth).abs() / truth
    constant = abs(torch.tensor(math.log2(math.e)).double().item() / math.log2(math.e) - 1)
    assert (error <= 4 * eps + constant * x).all()
    product = torch.exp2(-x * math.log2(math.e))
    assert ((product.double() / (-x.double()).exp() - 1).abs() > 4 * eps + constant * x).any()


@pytest.mark.parametrize("most", [10, 40, 80])
def test_19_exponentials_of_logits_as_they_come(most):
    """Of each class, however improbable: what torch's own exponential loses, to which x - max is rounded as well. A
    log2(e) that is rounded beside it adds less than that."""
    student = torch.randn(2000, 1) - most * torch.rand(2000, 30)
    student[:, 0] = student.amax(-1) + 1
    teacher = torch.full_like(student, -INF)
    teacher[:, 0] = 0
    _, grad = gradient(functional.kd_loss, student, teacher, reduction="sum")
    truth = student.double().softmax(-1)[:, 1:]
    ours, torchs = ((p.double() / truth - 1).abs() for p in (grad[:, 1:], student.softmax(-1)[:, 1:]))
    assert ours.max() <= 2 * torchs.max() and ours.square().mean() <= 4 * torchs.square().mean()


def test_19_probabilities_below_float32_are_zero_or_close():
    x = torch.linspace(87.4, 200, 2001)
    student = torch.stack((torch.zeros_like(x), -x), -1)
    teacher = torch.tensor([0.0, -INF]).expand_as(student)
    loss, grad = gradient(functional.kd_loss, student, teacher, reduction="sum")
    assert loss.isfinite() and (grad[:, 1].double() - (-x.double()).exp()).abs().max() <= 2.0**-126


def test_every_item_has_a_test():
    here = Path(__file__)
    found = re.findall(
        r"^def test_(\d\d)_", here.read_text() + here.with_name("test_checklist_torch.py").read_text(), re.M
    )
    assert set(map(int, found)) == set(range(1, 21))
