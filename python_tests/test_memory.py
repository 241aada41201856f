"""Memory beyond inputs and gradients: 32 bytes a row for logits, linear in N for attention, to the byte as ATen's
allocator counts it."""

import pytest
import torch

from benches.memory import extra_bytes
from benches.timing import Runner
from kdkernels import functional

from .cases.attention import attention, relation
from .cases.attention_map import maps
from .cases.hidden import cosine, gram, hidden, moment
from .cases.logits import kd

pytestmark = pytest.mark.usefixtures("one_thread")

SCALARS = 1024


def extra(case) -> int:
    return extra_bytes(Runner(case.name, getattr(functional, case.op), case.make()))


def test_it_counts():
    """An allocation of known size is seen, so that a limit below can fail."""

    def wasteful(student_logits, teacher_logits):
        return functional.kd_loss(student_logits.clone(), teacher_logits)

    call = kd("", "", (64,), 1000).make()
    assert extra_bytes(Runner("wasteful", wasteful, call)) >= 64 * 1000 * 4


@pytest.mark.parametrize("options", [{}, {"kind": "jsd"}, {"kind": "tv"}, {"labels": True, "alpha": 0.5}], ids=str)
def test_kd_loss_keeps_32_bytes_a_row(options):
    rows = 256
    assert extra(kd("", "", (rows,), 5000, temperature=2.0, **options)) <= 32 * rows + SCALARS


def test_kd_loss_does_not_copy_strided_logits():
    assert extra(kd("", "", (16, 16), 5000, layout="sliced")) <= 32 * 256 + SCALARS


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_attention_kl_is_linear_in_tokens(padded, reduction):
    sizes = [
        extra(
            attention(
                "attention_kl",
                "",
                "",
                n,
                16,
                32,
                batch=2,
                heads=4,
                mask=(n, n // 3) if padded else None,
                reduction=reduction,
            )
        )
        for n in (256, 512)
    ]
    assert sizes[1] <= 2 * sizes[0] + SCALARS
    assert sizes[1] < 2 * 4 * 512 * 512 * 4 / 4, "a quarter of one N x N map"


@pytest.mark.parametrize("on", ["scores", "probs"])
def test_attention_mse_is_linear_in_tokens(on):
    sizes = [extra(attention("attention_mse", "", "", n, 16, 32, batch=2, heads=4, on=on)) for n in (256, 512)]
    assert sizes[1] <= 2 * sizes[0] + SCALARS
    assert sizes[1] < 2 * 4 * 512 * 512 * 4 / 4


def test_attention_mse_on_scores_is_independent_of_tokens():
    sizes = [extra(attention("attention_mse", "", "", n, 16, 32, batch=2, heads=4, on="scores")) for n in (256, 1024)]
    assert sizes[1] <= sizes[0] + SCALARS


@pytest.mark.parametrize("head_reduction", [None, "mean"])
@pytest.mark.parametrize("mask", [None, (256, 100), "holes"], ids=str)
def test_maps_keep_no_map(mask, head_reduction):
    """Nothing for the mean squared error, 16 bytes a row for the KL."""
    given = dict(heads=4, mask=mask, head_reduction=head_reduction)
    assert extra(maps("attention_map_mse", "", "", 256, **given)) <= SCALARS
    rows = 2 * 256 * (1 if head_reduction else 4)
    assert extra(maps("attention_map_kl", "", "", 256, **given)) <= 16 * rows + SCALARS


def test_relation_kl_is_linear_in_tokens():
    sizes = [extra(relation("", "", n, 64, 128, num_heads=4)) for n in (256, 512)]
    assert sizes[1] <= 2 * sizes[0] + SCALARS
    assert sizes[1] < 2 * 4 * 512 * 512 * 4 / 4


def test_hidden_mse_keeps_nothing():
    assert extra(hidden("", "", 256, 128, batch=2, layers=4, mask=(256, 100))) <= SCALARS


def test_hidden_cosine_keeps_nothing():
    assert extra(cosine("", "", 256, 128, batch=2, layers=4, mask=(256, 100))) <= SCALARS


def test_moment_mse_keeps_12_bytes_a_row():
    assert extra(moment("", "", 256, 128, batch=2, layers=4, mask=(256, 100))) <= 12 * 4 * 2 * 256 + SCALARS


@pytest.mark.parametrize("same", [True, False], ids=["same", "two"])
@pytest.mark.parametrize("over", ["hidden", "token"])
def test_gram_mse_keeps_the_gradients(over, same):
    """In float32, for backward to scale: in place if the states are. Neither of the N x N or D x D matrices."""
    case = gram("", "", 640, 320, batch=1, same=same, over=over)
    assert extra(case) <= SCALARS
    halves = Runner(case.name, functional.gram_mse, case.make(dtypes=(torch.bfloat16, torch.bfloat16)))
    assert extra_bytes(halves) <= (1 if same else 2) * 640 * 320 * 4 + SCALARS
