"""`kdkernels.compat.textbrewer` beside the textbrewer package itself: values and gradients of every loss, masked and
not, and each of its defects with its wrong value and ours."""

import inspect

import pytest
import textbrewer
import torch
from textbrewer import losses as theirs
from textbrewer import presets

from kdkernels.compat import textbrewer as ours
from kdkernels.functional import attention_map_mse, gram_mse

from .case import Call, evaluate
from .tolerance import beside

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = (
    "kd_mse_loss", "kd_ce_loss", "att_mse_loss", "att_mse_sum_loss", "att_ce_loss", "att_ce_mean_loss",
    "hid_mse_loss", "cos_loss", "pkd_loss", "fsp_loss", "mmd_loss",
)  # fmt: skip
BATCH, HEADS, LENGTH, HIDDEN, CLASSES = 3, 4, 19, 26, 11
LENGTHS = torch.arange(LENGTH) < torch.tensor([19, 7, 1])[:, None]
MASKS = {"none": None, "lengths": LENGTHS.long(), "holes": LENGTHS & (torch.arange(LENGTH) % 3 != 1)}
SHAPES = {
    "kd": (BATCH, LENGTH, CLASSES), "att": (BATCH, HEADS, LENGTH, LENGTH),
    "hid": (BATCH, LENGTH, HIDDEN), "cos": (BATCH, LENGTH, HIDDEN), "pkd": (BATCH, LENGTH, HIDDEN),
    "fsp": (BATCH, LENGTH, HIDDEN), "mmd": (BATCH, LENGTH, HIDDEN),
}  # fmt: skip


def make(loss, seed=0, dtype=torch.float32, shape=None, teacher_shape=None, change=lambda x: x, **other) -> Call:
    """Both sides' tensors under TextBrewer's argument names; `change` is applied to each."""
    generator = torch.Generator().manual_seed(seed)
    names = {"kd": "logits", "att": "attention"}.get(loss.split("_")[0], "state")
    shape = shape or SHAPES[loss.split("_")[0]]

    def side(shape):
        made = [change(1.5 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2)]
        return made if loss in ("fsp_loss", "mmd_loss") else made[0]

    student, teacher = {f"{names}_S": side(shape)}, {f"{names}_T": side(teacher_shape or shape)}
    return Call(student, teacher, {k: v for k, v in other.items() if v is not None}).map(torch.clone)


def check(loss, **given):
    """Ours is at least as near to the float64 value of TextBrewer's own function as TextBrewer is."""
    assert beside(getattr(theirs, loss), getattr(ours, loss), lambda seed: make(loss, seed, **given)) == []


def test_names_signatures_and_tables():
    for loss in LOSSES:
        signature = inspect.signature(getattr(theirs, loss))
        assert inspect.signature(getattr(ours, loss)) == signature, loss
    defined = {name for name, value in vars(theirs).items() if inspect.isfunction(value)}
    assert defined == set(LOSSES)
    for table in ("KD_LOSS_MAP", "MATCH_LOSS_MAP"):
        names = {key: loss.__name__ for key, loss in getattr(ours, table).items()}
        assert names == {key: loss.__name__ for key, loss in getattr(presets, table).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if not loss.startswith("kd")])
def test_features(loss, mask, dtype):
    check(loss, dtype=dtype, mask=MASKS[mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, CLASSES), (BATCH, LENGTH, CLASSES)], ids=["sentence", "tokens"])
@pytest.mark.parametrize("temperature", ["default", "number", "tensor", "rows"])
@pytest.mark.parametrize("loss", ["kd_mse_loss", "kd_ce_loss"])
def test_logits(loss, temperature, shape, dtype):
    rows = 1 + 7 * torch.rand(shape[:-1], generator=torch.Generator().manual_seed(0))
    given = {"default": None, "number": 8, "tensor": torch.tensor(2.5), "rows": rows}[temperature]
    check(loss, dtype=dtype, shape=shape, temperature=given)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("loss", ["att_mse_loss", "att_mse_sum_loss", "att_ce_loss", "att_ce_mean_loss"])
def test_scores_as_bert_masks_them(loss, mask):
    """-10000 at padded keys, as TextBrewer's models add it."""
    padding = (~LENGTHS).float()[:, None, None, :] * -1e4
    check(loss, change=lambda x: x + padding, mask=MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("loss", ["att_mse_loss", "att_mse_sum_loss", "att_ce_loss", "att_ce_mean_loss"])
def test_probabilities_as_transformers_returns_them(loss, mask):
    """All entries are positive, and padded keys are 0: the softmax of the cross-entropy gives them probability."""
    padding = (~LENGTHS).float()[:, None, None, :] * -1e4
    check(loss, change=lambda x: (x + padding).softmax(-1), mask=MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("loss", ["att_mse_sum_loss", "att_ce_mean_loss"])
def test_maps_without_heads(loss, mask):
    check(loss, shape=(BATCH, LENGTH, LENGTH), mask=MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("hidden_t", [41, 12])
def test_mmd_of_other_hidden_sizes(hidden_t, mask):
    check("mmd_loss", teacher_shape=(BATCH, LENGTH, hidden_t), mask=MASKS[mask])


def test_pkd_of_pooled_states():
    check("pkd_loss", shape=(BATCH, HIDDEN))
    check("pkd_loss", teacher_shape=(BATCH, HIDDEN))


@pytest.mark.parametrize("loss", ["hid_mse_loss", "cos_loss"])
def test_states_of_any_shape_without_a_mask(loss):
    check(loss, shape=(5, HIDDEN))
    check(loss, shape=(2, 3, 5, HIDDEN))


@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_without_a_graph_break(loss):
    given = {"temperature": 2.0} if loss.startswith("kd") else {"mask": MASKS["lengths"]}
    call = make(loss, **given)
    compiled = torch.compile(getattr(ours, loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(evaluate(compiled, call), evaluate(getattr(ours, loss), call))


def test_a_teacher_with_gradients_is_an_error():
    for loss in LOSSES:
        call = make(loss)
        for x in call.teachers:
            x.requires_grad_()
        with pytest.raises(ValueError, match="requires grad"):
            getattr(ours, loss)(**call.arguments)


def test_install_registers_with_textbrewer(tmp_path, monkeypatch):
    """A distiller of theirs computes the same objective before and after, after it with our functions."""
    for table in (presets.KD_LOSS_MAP, presets.MATCH_LOSS_MAP):
        for name, loss in table.items():
            monkeypatch.setitem(table, name, loss)

    def compute():
        matches = [
            {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1, "proj": None},
            {"layer_T": [0, 0], "layer_S": [0, 0], "feature": "hidden", "loss": "nst", "weight": 1},
            {"layer_T": 0, "layer_S": 0, "feature": "attention", "loss": "attention_ce", "weight": 1},
        ]
        distiller = textbrewer.GeneralDistiller(
            textbrewer.TrainingConfig(output_dir=str(tmp_path), log_dir=str(tmp_path), device="cpu"),
            textbrewer.DistillationConfig(temperature=8, kd_loss_type="ce", intermediate_matches=matches),
            *(torch.nn.Identity(), torch.nn.Identity(), lambda *_: {}, lambda *_: {}),
        )
        calls = [make(loss) for loss in ("kd_ce_loss", "hid_mse_loss", "att_ce_loss")]
        results = []
        for side in ("student", "teacher"):
            logits, hidden, attention = ([*getattr(call, side).values()] for call in calls)
            results.append({"logits": logits, "hidden": hidden, "attention": attention})
        results[0]["inputs_mask"] = MASKS["lengths"]
        return distiller.kd_loss, distiller.compute_loss(*results)[1]

    before = compute()
    ours.install()
    after = compute()
    assert before[0] is theirs.kd_ce_loss and after[0] is ours.kd_ce_loss
    assert presets.MATCH_LOSS_MAP == ours.MATCH_LOSS_MAP and presets.KD_LOSS_MAP == ours.KD_LOSS_MAP
    assert len(before[1]) == 4
    torch.testing.assert_close(after[1], before[1])


class TestDefects:
    """What TextBrewer gets wrong, and what stands here instead."""

    @pytest.mark.parametrize("loss", [loss for loss in LOSSES if not loss.startswith(("kd", "pkd"))])
    def test_no_real_token(self, loss):
        call = make(loss, mask=torch.zeros(BATCH, LENGTH))
        assert getattr(theirs, loss)(**call.arguments).isnan()
        value, gradients = evaluate(getattr(ours, loss), call)
        assert value == 0 and all((g == 0).all() for g in gradients)

    @pytest.mark.parametrize("loss", ["kd_mse_loss", "kd_ce_loss"])
    def test_no_row(self, loss):
        call = make(loss, shape=(0, CLASSES))
        assert getattr(theirs, loss)(**call.arguments).isnan()
        assert evaluate(getattr(ours, loss), call)[0] == 0

    def test_one_sequence_without_a_real_token(self):
        mask = LENGTHS & torch.tensor([True, True, False])[:, None]
        call = make("fsp_loss", mask=mask)
        assert theirs.fsp_loss(**call.arguments).isnan()
        others = Call(*({k: [x[:2] for x in v] for k, v in side.items()} for side in (call.student, call.teacher)), {})
        others = others.with_options(mask=mask[:2]).map(torch.clone)
        torch.testing.assert_close(ours.fsp_loss(**call.arguments), theirs.fsp_loss(**others.arguments))

    @pytest.mark.parametrize("loss", ["att_mse_loss", "att_mse_sum_loss", "att_ce_loss", "att_ce_mean_loss"])
    @pytest.mark.parametrize("padding", [-torch.inf, torch.finfo(torch.float32).min])
    def test_padded_scores_of_minus_infinity(self, loss, padding):
        """transformers masks with the lowest float, which its heads' sum takes to -inf."""
        keys, mask = LENGTHS[:, None, None, :], MASKS["lengths"]
        call = make(loss, mask=mask, change=lambda x: x.masked_fill(~keys, padding))
        finite = make(loss, mask=mask, change=lambda x: x.masked_fill(~keys, -1e4))
        if padding == -torch.inf:
            assert getattr(theirs, loss)(**call.arguments).isnan()
        value, gradients = evaluate(getattr(ours, loss), call)
        expected = evaluate(getattr(theirs, loss), finite)
        torch.testing.assert_close((value, gradients), expected)

    @pytest.mark.parametrize(
        "loss", ["hid_mse_loss", "fsp_loss", "mmd_loss", "att_mse_loss", "att_ce_loss", "att_ce_mean_loss"]
    )
    def test_padding_that_holds_nan(self, loss):
        """Padded tokens, and padded queries of maps."""
        mask = MASKS["lengths"]
        padded = ~LENGTHS[:, None, :, None] if loss.startswith("att") else ~LENGTHS[:, :, None]
        call = make(loss, mask=mask, change=lambda x: x.masked_fill(padded, torch.nan))
        assert getattr(theirs, loss)(**call.arguments).isnan()
        clean = make(loss, mask=mask, change=lambda x: x.masked_fill(padded, 0))
        torch.testing.assert_close(evaluate(getattr(ours, loss), call), evaluate(getattr(theirs, loss), clean))

    @pytest.mark.parametrize(
        "loss, shape",
        [
            ("att_mse_loss", (1, 2, 256, 256)),
            ("att_mse_sum_loss", (1, 2, 256, 256)),
            ("mmd_loss", (1, 256, 8)),
            ("hid_mse_loss", (1, 256, 768)),
        ],
    )
    def test_counts_in_float16(self, loss, shape):
        """256 tokens squared, or times 768, are past float16's 65504."""
        mask = torch.ones(1, 256)
        call = make(loss, dtype=torch.float16, shape=shape, mask=mask, change=lambda x: 0.1 * x)
        assert getattr(theirs, loss)(**call.arguments) == 0
        truth = evaluate(getattr(theirs, loss), call.to(torch.float64))
        assert truth[0] > 0
        value, gradients = evaluate(getattr(ours, loss), call)
        torch.testing.assert_close(value.double(), truth[0])
        for got, expected in zip(gradients, truth[1], strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=2**-25)  # half of float16's least step

    def test_a_state_of_zeros(self):
        call = make("pkd_loss", shape=(2, HIDDEN), change=lambda x: x * torch.tensor([[1.0], [0.0]]))
        assert theirs.pkd_loss(**call.arguments).isnan()
        first = [next(iter(side.values()))[:1] for side in (call.student, call.teacher)]
        torch.testing.assert_close(ours.pkd_loss(**call.arguments), theirs.pkd_loss(*first) / 2)

    def test_logits_of_minus_infinity(self):
        """A class that both sides rule out, such as the padding of a vocabulary."""
        ruled_out = torch.arange(CLASSES) >= 9
        call = make("kd_ce_loss", change=lambda x: x.masked_fill(ruled_out, -torch.inf))
        assert theirs.kd_ce_loss(**call.arguments).isnan()
        rest = [next(iter(side.values()))[..., :9] for side in (call.student, call.teacher)]
        torch.testing.assert_close(ours.kd_ce_loss(**call.arguments), theirs.kd_ce_loss(*rest))

    def test_negative_scores_without_a_mask_are_padding(self):
        """Kept, since it is TextBrewer's number for whoever gives no mask: all scores negative means loss 0."""
        call = make("att_mse_loss", change=lambda x: -0.01 - x.abs())
        assert theirs.att_mse_loss(**call.arguments) == ours.att_mse_loss(**call.arguments) == 0
        scores = tuple(call.arguments.values())
        expected = torch.nn.functional.mse_loss(*scores)
        torch.testing.assert_close(ours.att_mse_loss(*scores, torch.ones(BATCH, LENGTH)), expected)
        torch.testing.assert_close(attention_map_mse(*scores), expected)

    def test_masked_mmd_divides_by_the_padded_length(self):
        """Kept: (hidden / length)^2 times the corrected loss, and other padding gives another number."""
        call = make("mmd_loss", mask=MASKS["lengths"])
        corrected = gram_mse(*call.arguments["state_S"], *call.arguments["state_T"], MASKS["lengths"], over="token")
        expected = corrected * (HIDDEN / LENGTH) ** 2
        torch.testing.assert_close(theirs.mmd_loss(**call.arguments), expected)
        torch.testing.assert_close(ours.mmd_loss(**call.arguments), expected)
