"""What the contract says in words: padding never matters, nothing real gives 0, reductions agree with one another,
any strides, mixed dtypes, lists of layers. Values are compared with the same op called in a simpler way,
mostly to the bit."""

from inspect import signature

import pytest
import torch

from kdkernels import functional, nn

from .case import OPS, evaluate, padding
from .cases import CASES, of

pytestmark = pytest.mark.usefixtures("one_thread")

MASKED = [case for case in CASES if case.mask is not None]
ROWS = [case for case in CASES if case.options.get("reduction") == "none"]
ids = {"ids": lambda case: case.id}


def equal(a, b) -> bool:
    """The same bits, NaN included."""
    return torch.equal(a[0], b[0]) and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize("case", MASKED, **ids)
def test_padding_may_hold_anything(case, poison):
    call = case.make()
    mask = call.other["mask"]
    expected = evaluate(getattr(functional, case.op), call)

    def poisoned(x):
        if x.dim() < 3:  # a projection has no tokens
            return x.clone()
        return torch.where(padding(case.op, x, mask), poison, x)

    assert equal(evaluate(getattr(functional, case.op), call.map(poisoned)), expected)


@pytest.mark.parametrize("case", [c for c in MASKED if c.op.endswith("kd_loss")], **ids)
def test_padding_of_labels_temperatures_and_indices_may_hold_anything(case):
    call = case.make()
    function, expected = getattr(functional, case.op), evaluate(getattr(functional, case.op), call)
    junk = {"labels": 10**6, "temperature": torch.nan}
    other = {
        name: torch.where(call.other["mask"], call.other[name], value)
        for name, value in junk.items()
        if torch.is_tensor(call.other.get(name))
    }
    if "teacher_indices" in call.other:
        other["teacher_indices"] = call.other["teacher_indices"].masked_fill(~call.other["mask"].unsqueeze(-1), -7)
    assert equal(evaluate(function, call.with_options(**other)), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
@pytest.mark.parametrize("op", OPS)
def test_mask_dtypes(op, dtype):
    call = next(case for case in MASKED if case.op == op).make()
    expected = evaluate(getattr(functional, op), call)
    assert equal(evaluate(getattr(functional, op), call.with_options(mask=call.other["mask"].to(dtype))), expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.mask is None and not case.packed], **ids)
def test_all_real_mask_is_no_mask(case):
    call = case.make()
    first = call.leaves[0]
    shape = (first.shape[0], first.shape[2]) if case.op.startswith("attention") else first.shape[:-1]
    expected = evaluate(getattr(functional, case.op), call)
    assert equal(
        evaluate(getattr(functional, case.op), call.with_options(mask=torch.ones(shape, dtype=torch.bool))), expected
    )


@pytest.mark.parametrize("case", MASKED, **ids)
def test_nothing_real_gives_zero(case):
    call = case.make().map(lambda x: torch.full_like(x, torch.nan) if x.dim() > 2 else x.clone())
    masked = call.with_options(mask=torch.zeros_like(call.other["mask"]))
    loss, gradients = evaluate(getattr(functional, case.op), masked)
    assert (loss == 0).all()
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("empty", ["batch", "tokens"])
@pytest.mark.parametrize("case", [*(of(op)[0] for op in OPS), *(c for c in CASES if c.name == "projected_each")], **ids)
def test_empty_inputs(case, empty):
    """A projection, which is not empty, still has a gradient: 0."""
    op, call = case.op, case.make()
    call = call.with_options(mask=None) if "mask" in call.other else call
    axes = [0] if empty == "batch" else [-2, -1] if op.startswith("attention_map") else [-2]
    heads = [x for name, x in call.arguments.items() if name.endswith("_weight") and torch.is_tensor(x)]
    heads += call.student.get("weight", [])

    def narrowed(x):
        if x.dim() < 2 or any(x.shape == w.shape for w in heads):
            return x
        for axis in axes:
            x = x.narrow(axis, 0, 0)
        return x

    cut = call.map(narrowed)
    if "teacher_indices" in call.other:
        cut = cut.with_options(teacher_indices=call.other["teacher_indices"].narrow(axes[0], 0, 0))
    function = getattr(functional, op)
    for reduction in ({}, {"reduction": "none"}) if "reduction" in signature(function).parameters else ({},):
        loss, gradients = evaluate(function, cut.with_options(**reduction))
        assert (loss == 0).all()
        assert [g.shape for g in gradients] == [leaf.shape for leaf in cut.leaves]
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("case", ROWS, **ids)
def test_reductions_agree(case):
    """sum and batchmean are the sum of "none", and its mean over real rows; a labelled loss has two denominators and
    is apart."""
    call = case.make()
    function = getattr(functional, case.op)
    rows = function(**call.arguments).detach().double()
    total = function(**call.with_options(reduction="sum").arguments)
    torch.testing.assert_close(total.double(), rows.sum(), rtol=1e-6, atol=0)
    if "labels" in call.other:
        return
    mask = call.other.get("mask")
    real = rows.numel() if mask is None else mask.sum() * rows.numel() / mask.numel()
    if case.packed:
        real = call.other["cu_seqlens"][-1] * rows.numel() / rows.shape[0]
    mean = function(**call.with_options(reduction="batchmean").arguments)
    torch.testing.assert_close(mean.double(), rows.sum() / real, rtol=1e-6, atol=0)
    if case.op.endswith("kd_loss"):
        per_class = function(**call.with_options(reduction="mean").arguments)
        torch.testing.assert_close(per_class.double(), rows.sum() / real / case.shape["classes"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ROWS, **ids)
def test_masked_rows_are_zero(case):
    call = case.make()
    rows = getattr(functional, case.op)(**call.arguments)
    mask = call.other.get("mask")
    if mask is not None:
        mask = mask if rows.shape == mask.shape else mask[:, None, :].expand(rows.shape)
        assert (rows[~mask] == 0).all()
        if not case.options.get("causal"):  # a first token sees itself alone: its maps agree
            assert (rows[mask] != 0).all()


@pytest.mark.parametrize("case", [case for case in CASES if case.layout != "contiguous"], **ids)
def test_layout_changes_nothing(case):
    """The strided tensors give the bits of their contiguous copies: no value is read from between them."""
    call = case.make()
    contiguous = call.map(lambda x: x.clone(memory_format=torch.contiguous_format))
    function = getattr(functional, case.op)
    assert torch.equal(function(**call.arguments), function(**contiguous.arguments))
    for a, b in zip(evaluate(function, call)[1], evaluate(function, contiguous)[1], strict=True):
        assert torch.equal(a, b)


def test_student_broadcast_with_stride_zero():
    student = torch.randn(1, 1, 33, requires_grad=True)
    teacher = torch.randn(4, 5, 33)
    functional.kd_loss(student.expand(4, 5, 33), teacher).backward()
    spread = student.detach().repeat(4, 5, 1).requires_grad_()
    functional.kd_loss(spread, teacher).backward()
    torch.testing.assert_close(student.grad, spread.grad.sum((0, 1), keepdim=True))


def test_inputs_stay_untouched():
    for case in (of(op)[0] for op in OPS):
        call = case.make()
        before = [x.detach().clone() for x in call.leaves + call.teachers]
        evaluate(getattr(functional, case.op), call)
        assert all(torch.equal(a, b) for a, b in zip(before, call.leaves + call.teachers, strict=True))


def test_lists_of_layers_are_the_sum():
    """For each layer alone and all together: the same loss and the same gradients, the shared weight's being the
    sum."""
    for case in (case for case in of("hidden_mse") if (case.shape["layers"] or 0) > 1):
        call = case.make()
        loss, gradients = evaluate(functional.hidden_mse, call)
        layers = case.shape["layers"]
        single = []
        for layer in range(layers):
            student = {
                name: value[layer if len(value) > 1 else 0] if isinstance(value, list) else value
                for name, value in call.student.items()
            }
            teacher = call.teacher["teacher"][layer]
            single.append(functional.hidden_mse(**student, teacher=teacher, **call.other))
        torch.testing.assert_close(loss, sum(single).detach(), rtol=1e-6, atol=0)
        expected = torch.autograd.grad(sum(single), call.leaves, torch.tensor(0.375))
        torch.testing.assert_close(gradients, list(expected), rtol=1e-5, atol=1e-8)


def test_row_temperature_of_one_value_is_the_number():
    call = of("kd_loss")[0].make()
    number = evaluate(functional.kd_loss, call.with_options(temperature=3.0))
    rows = torch.full(call.leaves[0].shape[:-1], 3.0)
    assert equal(evaluate(functional.kd_loss, call.with_options(temperature=rows)), number)
    assert equal(evaluate(functional.kd_loss, call.with_options(temperature=torch.tensor(3.0))), number)


def test_alpha_ends():
    call = next(case for case in of("kd_loss") if case.name == "labels").make()
    plain = {name: value for name, value in call.arguments.items() if name not in ("labels", "alpha")}
    assert torch.equal(functional.kd_loss(**plain, labels=call.other["labels"], alpha=1.0), functional.kd_loss(**plain))
    hard = torch.nn.functional.cross_entropy(call.leaves[0].flatten(0, -2), call.other["labels"].flatten())
    torch.testing.assert_close(functional.kd_loss(**plain, labels=call.other["labels"], alpha=0.0), hard)


def test_all_labels_ignored():
    """No labelled row: the hard term is 0 and not 0 / 0."""
    call = next(case for case in of("kd_loss") if case.name == "labels").make()
    ignored = call.with_options(labels=torch.full_like(call.other["labels"], -100))
    soft = {name: value for name, value in call.arguments.items() if name not in ("labels", "alpha")}
    torch.testing.assert_close(
        functional.kd_loss(**ignored.arguments), call.other["alpha"] * functional.kd_loss(**soft)
    )


def test_own_ignore_index():
    call = next(case for case in of("kd_loss") if case.name == "labels").make()
    labels = torch.where(call.other["labels"] == -100, 7, (call.other["labels"] + 8) % 129)
    labels = torch.where((call.other["labels"] != -100) & (labels == 7), 8, labels)
    renamed = torch.where(labels == 7, -100, labels)
    assert equal(
        evaluate(functional.kd_loss, call.with_options(labels=labels, ignore_index=7)),
        evaluate(functional.kd_loss, call.with_options(labels=renamed)),
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_label_dtypes(dtype):
    student, teacher, labels = torch.randn(9, 50), torch.randn(9, 50), torch.randint(50, (9,))
    expected = functional.kd_loss(student, teacher, labels=labels, alpha=0.5)
    assert torch.equal(functional.kd_loss(student, teacher, labels=labels.to(dtype), alpha=0.5), expected)


@pytest.mark.parametrize("op", OPS)
def test_gradient_may_come_expanded(op):
    """`loss.expand(n).sum().backward()` hands down a gradient with stride 0, from "none" a strided one."""
    call = of(op)[0].make()
    loss = getattr(functional, op)(**call.arguments)
    (loss.expand(3).sum()).backward()
    expected = torch.autograd.grad(getattr(functional, op)(**call.arguments), call.leaves, torch.tensor(3.0))
    assert all(torch.equal(leaf.grad, g) for leaf, g in zip(call.leaves, expected, strict=True))


def test_gradient_per_row_may_be_strided():
    for case in ROWS:
        call = case.make()
        loss = getattr(functional, case.op)(**call.arguments)
        above = torch.randn((*loss.shape, 2))[..., 0]
        strided = torch.autograd.grad(loss, call.leaves, above, retain_graph=True)
        plain = torch.autograd.grad(loss, call.leaves, above.clone(memory_format=torch.contiguous_format))
        assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True)), case.id


def test_module_shows_its_options_and_takes_more_at_the_call():
    module = nn.KdLoss(kind="jsd", temperature=2.0)
    assert "kind='jsd'" in repr(module)
    student, teacher = torch.randn(3, 7), torch.randn(3, 7)
    assert torch.equal(
        module(student, teacher, temperature=3.0), functional.kd_loss(student, teacher, kind="jsd", temperature=3.0)
    )
    with pytest.raises(TypeError, match="'temprature'"):
        nn.KdLoss(temprature=2.0)
