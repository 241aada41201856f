"""The numerics list, second half: how a loss sits in PyTorch. The table of all items is in test_checklist.py."""

import pytest
import torch
import torch.nn.functional as F

from benches.peers import eager
from kdkernels import _checks, functional, reference
from kdkernels.distill.taps import collect

from . import tiny
from .case import OPS, evaluate
from .cases import of
from .nosync import NoSync
from .test_checklist import PRODUCTS, gradient, masked, naive, ours, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


def test_10_strides_are_followed():
    """logits[:, :-1], heads inside [B, N, H, d], a teacher with stride 0: read as if contiguous, each is another
    tensor."""
    logits, one = torch.randn(3, 6, 20), torch.randn(1, 1, 20)
    heads = torch.randn(2, 9, 3, 8)
    q = heads.transpose(1, 2)
    views = [
        (functional.kd_loss, (logits[:, :-1], one.expand(3, 5, 20))),
        (functional.attention_kl, (q, q, torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4))),
        (functional.hidden_mse, (logits[:, :-1], one.expand(3, 5, 20))),
    ]
    for function, tensors in views:
        loss = function(*tensors)
        assert torch.equal(loss, function(*(x.clone(memory_format=torch.contiguous_format) for x in tensors)))
        first = tensors[0]
        misread = torch.empty(first.shape).set_(first.untyped_storage(), 0, first.shape)
        assert function(misread, *tensors[1:]) != loss


def test_11_sums_have_one_order():
    """A sum whose parts depend on the number of threads has other bits for each; the losses have the same."""
    student, teacher = torch.randn(4096, 41), torch.randn(4096, 41)
    rows = functional.kd_loss(student, teacher, reduction="none")
    assert len({sum(part.sum() for part in rows.chunk(threads)).item() for threads in range(1, 65)}) > 1
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(gradient(functional.kd_loss, student, teacher))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


class GradientInForward(torch.autograd.Function):
    """How many fused losses are written: forward leaves the gradient, backward scales it, in place if asked to."""

    @staticmethod
    def forward(ctx, student, teacher, in_place):
        with torch.enable_grad():
            loss, grad = gradient(functional.kd_loss, student, teacher.detach())
        ctx.grad, ctx.in_place = grad, in_place
        return loss

    @staticmethod
    def backward(ctx, above):
        return (ctx.grad.mul_(above) if ctx.in_place else ctx.grad * above), None, None


def test_12_a_second_derivative_raises():
    """The gradient made in forward is a constant to autograd: the second derivative of loss^2 lacks 2 loss H, and
    nobody is told."""
    student, teacher = torch.randn(3, 7), torch.randn(3, 7)

    def second(function, student):
        student = student.detach().requires_grad_()
        (first,) = torch.autograd.grad(function(student).square(), student, create_graph=True)
        return torch.autograd.grad(first.square().sum(), student)[0]

    truth = second(lambda s: reference.kd_loss(s, teacher.double()), student.double())
    wrong = second(lambda s: GradientInForward.apply(s, teacher, False), student)
    assert relative_error(wrong, truth) > 0.05
    with pytest.raises(RuntimeError, match="kdkernels.kd_loss: double backward"):
        second(lambda s: functional.kd_loss(s, teacher), student)
    assert torch.equal(second(lambda s: functional.kd_loss(s, teacher.double()), student.double()), truth)


def test_13_backward_twice_gives_the_same():
    """A saved gradient that is scaled in place is scaled again the second time."""

    def twice(function):
        student = torch.ones(3, 7).cumsum(-1).requires_grad_()
        loss = function(student)
        above = torch.tensor(0.375)
        return [torch.autograd.grad(loss, student, above, retain_graph=True)[0].clone() for _ in range(2)]

    teacher = torch.randn(3, 7)
    first, second = twice(lambda s: functional.kd_loss(s, teacher))
    assert torch.equal(first, second)
    first, second = twice(lambda s: GradientInForward.apply(s, teacher, True))
    torch.testing.assert_close(second, 0.375 * first)


def test_14_transforms_and_graphs():
    """A plain autograd.Function does not take part in torch.func, and code that asks for a value breaks the graph."""
    student, teacher = torch.randn(3, 7), torch.randn(3, 7)
    _, expected = gradient(functional.kd_loss, student, teacher)
    torch.testing.assert_close(torch.func.grad(functional.kd_loss)(student, teacher), expected)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda s: GradientInForward.apply(s, teacher, False))(student)

    def asks(student, teacher):
        loss = eager.kd_loss(student, teacher)
        return loss if loss.item() > 0 else loss * 0

    def compiled(function):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    assert torch.equal(compiled(functional.kd_loss)(student, teacher), functional.kd_loss(student, teacher))
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled(asks)(student, teacher)


@pytest.mark.parametrize("op", OPS)
def test_15_the_host_never_waits(op, monkeypatch):
    """Selecting the real tokens first, as TextBrewer's losses do, has a shape that the host must be told."""
    monkeypatch.setattr(_checks, "readable", lambda value: False)  # as for a CUDA tensor
    call = masked(op)
    with NoSync():
        evaluate(ours(op), call)
    with pytest.raises(AssertionError, match="makes the host wait"), NoSync():
        call.leaves[0].flatten()[call.leaves[0].flatten() > 0]


@pytest.mark.parametrize("op", PRODUCTS)
def test_16_autocast_rounds_nothing(op):
    call = of(op)[0].make()
    truth = getattr(reference, op)(**call.to(torch.float64).arguments)
    with torch.autocast("cpu", torch.bfloat16):
        loss, rounded = ours(op)(**call.arguments), naive(op)(**call.arguments)
    assert loss.dtype == torch.float32
    assert abs(loss - truth) < 1e-6 * truth
    assert abs(rounded - truth) > 1e-5 * truth


@pytest.mark.parametrize("op", OPS)
def test_17_a_teacher_that_wants_a_gradient_is_told(op):
    """A fused loss with no gradient for the teacher leaves it without one, silently."""
    call = of(op)[0].make()
    first = call.teachers[0].requires_grad_()
    with pytest.raises(ValueError, match="requires grad"):
        ours(op)(**call.arguments)
    first.requires_grad_(False)
    student, teacher = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    GradientInForward.apply(student, teacher, False).backward()
    assert student.grad is not None and teacher.grad is None


def test_17_vocabularies_are_not_padded_with_zeros():
    """Liger's chunked loss gives a shorter vocabulary logits of 0, which are probability."""
    student, teacher = torch.randn(3, 40) - 5, torch.randn(3, 48)
    with pytest.raises(ValueError, match="vocabulary"):
        functional.kd_loss(student, teacher)
    assert F.pad(student, (0, 8)).softmax(-1)[:, 40:].sum(-1).min() > 0.5


def test_20_dropout_stays_out_of_the_loss():
    """A model in training returns attention maps after dropout: their zeros make a KL infinite. Queries and keys have
    none."""
    batch, seeds = tiny.batch(), (0, 1)
    teacher = collect(tiny.bert(0), batch, ["qk.0"])["qk.0"]
    student = tiny.bert(1, attention_probs_dropout_prob=0.3).train()

    def tapped(seed):
        torch.manual_seed(seed)
        q, k = collect(student, batch, ["qk.0"])["qk.0"]
        return functional.attention_kl(q, k, *(x.detach() for x in teacher), batch["attention_mask"])

    losses = [tapped(seed) for seed in seeds]
    assert losses[0].isfinite() and torch.equal(*losses)
    student.set_attn_implementation("eager")
    torch.manual_seed(0)
    dropped = student(**batch, output_attentions=True).attentions[0]
    real = batch["attention_mask"].bool()[:, None, :].expand(dropped.shape[:-1])
    target = torch.softmax(teacher[0] @ teacher[1].mT / teacher[0].shape[-1] ** 0.5, -1)
    assert F.kl_div(dropped.log(), target.detach(), reduction="none").sum(-1)[real].isinf().any()
