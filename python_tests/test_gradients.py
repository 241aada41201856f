"""Gradients: the references' against finite differences, and what autograd around the fused ops has to keep in order.

The gradients' values are checked against float64 with the losses, in test_values.py.
"""

import pytest
import torch

import kdkernels
from kdkernels import functional

from .case import OPS, evaluate, padding, upstream
from .cases import CASES, of

pytestmark = pytest.mark.usefixtures("one_thread")

# Finite differences cost one forward per input element and direction: the smallest cases only, and where the loss has
# no jumps.
SMALL = 1200
CHECKED = [
    case
    for case in CASES
    if sum(x.numel() for x in case.make().leaves) <= SMALL and case.spread == 1.0 and case.layout == "contiguous"
]
MASKED = [case for case in CASES if case.mask is not None]
ids = {"ids": lambda case: case.id}


@pytest.mark.parametrize("case", CHECKED, **ids)
def test_gradcheck_of_the_reference(case):
    call = case.make(dtypes=(torch.float64, torch.float64))
    function = getattr(kdkernels.reference, case.op)
    names = list(call.student)
    sizes = [len(value) if isinstance(value, list) else None for value in call.student.values()]

    def of_leaves(*leaves):
        leaves = iter(leaves)
        student = [next(leaves) if n is None else [next(leaves) for _ in range(n)] for n in sizes]
        return function(**dict(zip(names, student, strict=True)), **call.teacher, **call.other)

    assert torch.autograd.gradcheck(of_leaves, call.leaves, fast_mode=True)


def test_gradcheck_reaches_every_op():
    assert {case.op for case in CHECKED} == set(OPS)


@pytest.mark.parametrize("case", MASKED, **ids)
def test_padding_gets_exactly_zero(case):
    call = case.make()
    _, gradients = evaluate(getattr(functional, case.op), call)
    mask = call.other["mask"]
    for gradient in gradients:
        if gradient.dim() > 2:  # a projection has no tokens
            left_out = padding(case.op, gradient, mask)
            assert (gradient[left_out] == 0).all()
            assert (gradient[~left_out] != 0).any()


@pytest.mark.parametrize("case", CASES, **ids)
def test_upstream_gradient_scales(case):
    """A power of two from above must come through exactly: no rounding, and nothing that assumes 1."""
    call = case.make()
    loss = getattr(functional, case.op)(**call.arguments)
    above = upstream(loss)
    once = torch.autograd.grad(loss, call.leaves, above, retain_graph=True)
    eightfold = torch.autograd.grad(loss, call.leaves, 8 * above, retain_graph=True)
    for a, b in zip(once, eightfold, strict=True):
        normal = a.abs() > 1e-30
        torch.testing.assert_close((8 * a)[normal], b[normal], rtol=0, atol=0)
    nothing = torch.autograd.grad(loss, call.leaves, torch.zeros_like(above))
    assert all((g == 0).all() for g in nothing)


@pytest.mark.parametrize(
    "case", [of(op)[0] for op in OPS] + [c for c in CASES if c.name in ("none", "projected_each")], **ids
)
def test_backward_twice(case):
    """With retain_graph the second pass gives the first one's numbers: what was saved is not scaled in place."""
    call = case.make()
    loss = getattr(functional, case.op)(**call.arguments)
    above = upstream(loss)
    first = torch.autograd.grad(loss, call.leaves, above, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, call.leaves, above)
    for a, b, c in zip(kept, second, first, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("case", [c for c in CASES if len(c.make().leaves) > 1], **ids)
def test_partial_requires_grad(case):
    """Each leaf alone gets the gradient that it gets among all."""
    call = case.make()
    function = getattr(functional, case.op)
    _, together = evaluate(function, call)
    for index, expected in enumerate(together):
        alone = case.make()
        for other, leaf in enumerate(alone.leaves):
            leaf.requires_grad_(other == index)
        loss = function(**alone.arguments)
        (got,) = torch.autograd.grad(loss, [alone.leaves[index]], upstream(loss))
        assert torch.equal(got, expected), f"leaf {index}"


@pytest.mark.parametrize("op", OPS)
def test_no_gradient_asked_for(op):
    call = of(op)[0].make()
    function = getattr(functional, op)
    with_graph = function(**call.arguments).detach()
    with torch.no_grad():
        loss = function(**call.arguments)
    assert not loss.requires_grad
    assert torch.equal(loss, with_graph)
    for leaf in call.leaves:
        leaf.requires_grad_(False)
    loss = function(**call.arguments)
    assert not loss.requires_grad
    assert torch.equal(loss, with_graph)


@pytest.mark.parametrize("op", OPS)
def test_double_backward_raises(op):
    call = of(op)[0].make()
    loss = getattr(functional, op)(**call.arguments)
    gradients = torch.autograd.grad(loss, call.leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        sum(g.square().sum() for g in gradients).backward()


@pytest.mark.parametrize("op", OPS)
def test_double_backward_in_float64(op):
    """The reference is plain torch and can do it."""
    call = of(op)[0].make(dtypes=(torch.float64, torch.float64))
    loss = getattr(functional, op)(**call.arguments)
    gradients = torch.autograd.grad(loss, call.leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), call.leaves)
    assert all(g.isfinite().all() and (g != 0).any() for g in second)


@pytest.mark.parametrize("op", OPS)
def test_gradients_accumulate(op):
    """Two losses on the same tensors add up, as in a training step with several matches."""
    call = of(op)[0].make()
    function = getattr(functional, op)
    (function(**call.arguments) + 2 * function(**call.arguments)).backward()
    loss = function(**call.arguments)
    expected = torch.autograd.grad(loss, call.leaves)
    torch.testing.assert_close([leaf.grad for leaf in call.leaves], [3 * g for g in expected])
