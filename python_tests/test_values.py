"""Every case of the table against float64: the loss and each gradient, in every dtype and mix. Fresh memory is NaN
(conftest.py)."""

import pytest
import torch

import kdkernels
from kdkernels import nn

from . import tolerance
from .case import evaluate
from .cases import CASES

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16_student": (torch.bfloat16, torch.float32),
    "float16_teacher": (torch.float32, torch.float16),
}
MODULES = {
    "kd_loss": nn.KdLoss,
    "linear_kd_loss": nn.LinearKdLoss,
    "topk_kd_loss": nn.TopkKdLoss,
    "attention_kl": nn.AttentionKl,
    "attention_mse": nn.AttentionMse,
    "attention_map_mse": nn.AttentionMapMse,
    "attention_map_kl": nn.AttentionMapKl,
    "relation_kl": nn.RelationKl,
    "hidden_mse": nn.HiddenMse,
    "hidden_cosine": nn.HiddenCosine,
    "moment_mse": nn.MomentMse,
    "gram_mse": nn.GramMse,
}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_error_against_float64(case, dtypes):
    found = tolerance.violations(case, dtypes)
    assert not found, f"{case.why}\n" + "\n".join(found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_dtypes_of_results(case):
    call = case.make(dtypes=(torch.bfloat16, torch.float32))
    loss, gradients = evaluate(getattr(kdkernels.functional, case.op), call)
    assert loss.dtype == torch.float32
    assert [g.dtype for g in gradients] == [torch.bfloat16] * len(call.leaves)
    assert [g.shape for g in gradients] == [leaf.shape for leaf in call.leaves]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_float64_is_the_reference(case):
    call = case.make(dtypes=(torch.float64, torch.float64))
    loss, gradients = evaluate(getattr(kdkernels.functional, case.op), call)
    truth, expected = evaluate(getattr(kdkernels.reference, case.op), call)
    assert loss.dtype == torch.float64
    torch.testing.assert_close([loss, *gradients], [truth, *expected], rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_module_is_the_function(case):
    """Options at construction; tensors, the mask among them, at the call."""
    call = case.make()
    tensors = {name: value for name, value in call.arguments.items() if name not in case.options}
    module = MODULES[case.op](**case.options)
    assert torch.equal(module(**tensors), getattr(kdkernels.functional, case.op)(**call.arguments))


def test_the_rule_can_fail():
    """Typical wrong kernels: zeros, the next row's result, a forgotten mask, a forgotten factor, an uncounted row."""
    table = {case.id: case for case in CASES}
    kd_loss, case = kdkernels.reference.kd_loss, table["kd_loss-mask_holes"]

    def rolled(student_logits, teacher_logits, **options):
        return kd_loss(student_logits, teacher_logits.roll(1, -2), **options)

    def maskless(student_logits, teacher_logits, mask, **options):
        return kd_loss(student_logits, teacher_logits, **options)

    def unscaled(student_logits, teacher_logits, **options):
        return kd_loss(student_logits, teacher_logits, **options, scale_t2=False)

    def miscounted(student_logits, teacher_logits, **options):
        return kd_loss(student_logits, teacher_logits, **options) * 1.00001

    def zeros(student_logits, teacher_logits, **options):
        return 0 * student_logits.sum()

    assert not tolerance.violations(case, function=kd_loss)
    for wrong in (rolled, maskless, unscaled, miscounted, zeros):
        assert tolerance.violations(case, function=wrong), wrong.__name__
