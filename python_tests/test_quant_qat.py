"""Quantisation-aware training computes what the kernels will, learns what rounding alone loses, and ends in them."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import TrainingArguments

import kdkernels
from kdkernels.distill import DistillTrainer, Frozen, Match, Stage
from kdkernels.distill.data import collator, encode
from kdkernels.quant import Scheme, convert, encoder, pack, prepare_qat
from kdkernels.quant.modules import QuantEmbedding, QuantLinear
from kdkernels.quant.packed import PackedWeight
from kdkernels.quant.qat import FakeQuantLinear

from . import tiny
from .test_quant_linear import SCHEMES, name

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_it_computes_what_the_kernels_will(scheme):
    """The same weight to the bit, the same output to rounding; right after prepare_qat it is pack's own weight."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(70, 33))
    packed = pack(linear[0].weight, scheme)
    prepared = prepare_qat(linear, scheme)[0]
    assert isinstance(prepared, FakeQuantLinear) and torch.equal(PackedWeight(prepared._packed()).blob, packed.blob)
    with torch.no_grad():
        prepared.weight.add_(0.05 * torch.randn(33, 70))
        prepared.factor.mul_(1 + 0.1 * torch.randn(prepared.factor.shape))
    eye, x = torch.eye(70), torch.randn(9, 70)
    before, weight = prepared(x), prepared(eye).T
    made = convert(linear)[0]
    with torch.no_grad():
        torch.testing.assert_close(before, made(x), rtol=1e-4, atol=1e-5)
        weight = weight - made.bias[:, None]
        torch.testing.assert_close(weight, made.weight.dequantize(), rtol=1e-5, atol=1e-6)


def test_weights_are_identical_to_the_bit():
    """On the encoder's linears and on the word embedding, after training."""
    model = prepare_qat(tiny.bert(), "int3")
    _train(model.train(), lambda: model(**tiny.batch()).last_hidden_state.square().mean(), steps=3)
    used = {}
    for path, part in model.named_modules():
        if isinstance(part, FakeQuantLinear):
            part.register_forward_hook(functools.partial(_keep_weight, used, path))
    with torch.no_grad():
        model(**tiny.batch())
        rows = model.embeddings.word_embeddings(torch.arange(65))
    convert(model)
    assert len(used) == 25
    for path, weight in used.items():
        assert torch.equal(weight, model.get_submodule(path).weight.dequantize()), path
    assert torch.equal(rows, model.embeddings.word_embeddings(torch.arange(65)))


def _keep_weight(used, path, module, _inputs, _output):
    """The weight of a layer without activations' quantisation: rows of the identity go through it unchanged."""
    whole = copy.copy(module)
    whole.scheme = Scheme(**{**vars(module.scheme), "activation_bits": None})
    whole.bias, whole._forward_hooks = None, {}
    used[path] = whole(torch.eye(module.in_features)).T


def _train(model, loss, steps, rate=1e-2):
    optimiser = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()


def _accuracy(model, ids, labels) -> float:
    with torch.no_grad():
        return (model.eval()(ids).logits.argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("scheme", ["int2", Scheme(bits=2, group="out", group_size=6)], ids=["int2", "q-bert"])
def test_training_recovers_what_rounding_loses(scheme):
    """A classifier that has learnt to add two words modulo 3 is quantised as it is, and while it learns from itself."""
    ids = torch.cartesian_prod(torch.arange(5, 17), torch.arange(5, 17))
    labels = ((ids - 5) // 4).sum(1) % 3
    model = tiny.bert(head=True, num_hidden_layers=3, initializer_range=0.2, seed=3)
    _train(model.train(), lambda: cross_entropy(model(ids).logits, labels), steps=80, rate=3e-3)
    assert _accuracy(model, ids, labels) == 1.0
    with torch.no_grad():
        soft = model(ids).logits.log_softmax(1)

    student = prepare_qat(copy.deepcopy(model), scheme)

    def loss():
        return kl_div(log_softmax(student(ids).logits, 1), soft, log_target=True, reduction="batchmean")

    _train(student, loss, steps=40, rate=2e-3)
    trained = _accuracy(convert(student), ids, labels)
    rounded = _accuracy(kdkernels.quantize(model, scheme), ids, labels)
    print(f"rounded {rounded:.3f}, trained {trained:.3f}")
    assert rounded < 0.9 and trained > 0.97


def test_distil_trainer(tmp_path, monkeypatch):
    """Distillation of a quantised student ends in a checkpoint that the kernels run, with the outputs that it had: to
    rounding call by call, where nothing between is in bfloat16."""
    words = tiny.tokenizer()
    data = encode([{"text": text} for text in tiny.texts(24)], words, 24)
    teacher, student = tiny.bert(head=True), prepare_qat(tiny.bert(head=True, seed=1), "int4")
    stage = Stage("s", [Match("kd_loss", "logits"), Match("hidden_mse", "hidden.2")], source=Frozen(teacher), data=data)
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    DistillTrainer(student, stage, arguments, data_collator=collator(words)).train()
    batch = tiny.batch()
    with torch.no_grad():
        expected = student.eval()(**batch).logits
        made = convert(student)
        with monkeypatch.context() as patch:
            patch.setattr(encoder, "why_not_fused", lambda *_: "the test asks for it")
            torch.testing.assert_close(made(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(made.bert.encoder.layer[0].output.dense, QuantLinear)
    assert isinstance(made.bert.embeddings.word_embeddings, QuantEmbedding)
    made.save_pretrained(tmp_path / "made")
    again = type(made).from_pretrained(tmp_path / "made")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, made(**batch).logits)


def test_gradients_pass_straight_through():
    """Identity within the range, none beyond it; the factor's gradient is LSQ's: code minus ratio, or the end."""
    linear = nn.Sequential(nn.Linear(4, 1, bias=False))
    linear[0].weight.data = torch.tensor([[-1.0, 0.3, 0.5, 1.0]])
    prepared = prepare_qat(linear, Scheme(bits=4, activation_bits=None))[0]
    scale = prepared.scales.item()
    prepared.weight.data[0, 3] = 100.0
    prepared(torch.eye(4)).sum().backward()
    assert torch.equal(prepared.weight.grad, torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    ratio = torch.tensor([-1.0, 0.3, 0.5]) / scale
    expected = ((ratio.round().clamp(-8, 7) - ratio).sum() + 7) * scale
    torch.testing.assert_close(prepared.factor.grad, expected[None])


def test_errors():
    model = prepare_qat(tiny.bert(), "int4")
    for call in (kdkernels.quantize, prepare_qat):
        with pytest.raises(ValueError, match="model is prepared for training already"):
            call(model, "int4")
    with pytest.raises(ValueError, match="model was not prepared"):
        convert(tiny.bert())
    with pytest.raises(ValueError, match="scheme must be a Scheme or one of"):
        prepare_qat(tiny.bert(), "int5")
