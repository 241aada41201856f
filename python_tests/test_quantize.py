"""kdkernels.quantize: every architecture on packed tokens gives what its padded forward gives on the same weights."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
import transformers

import kdkernels
from kdkernels.quant import Scheme, architectures
from kdkernels.quant.encoder import PaddingFree, why_not_fused
from kdkernels.quant.modules import QuantEmbedding, QuantLinear
from kdkernels.quant.quantize import lay_out, plan
from kdkernels.quant.scheme import as_scheme

from . import tiny as tiny_bert

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = dict(vocab_size=120, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=160)
CONFIGS = {
    "bert": transformers.BertConfig(**SIZES),
    "bert_tanh": transformers.BertConfig(**SIZES, hidden_act="gelu_new"),
    "bert_relu": transformers.BertConfig(**SIZES, hidden_act="relu"),
    "roberta": transformers.RobertaConfig(**SIZES, pad_token_id=1),
    "xlm-roberta": transformers.XLMRobertaConfig(**SIZES, pad_token_id=1),
    "camembert": transformers.CamembertConfig(**SIZES, pad_token_id=1),
    "electra": transformers.ElectraConfig(**SIZES, embedding_size=32),
    "distilbert": transformers.DistilBertConfig(vocab_size=120, dim=64, n_layers=2, n_heads=4, hidden_dim=160),
    "albert": transformers.AlbertConfig(**SIZES, embedding_size=32),
    "albert_groups": transformers.AlbertConfig(**SIZES, embedding_size=32, num_hidden_groups=2),
}
OTHERS = {  # which run layer by layer
    "modernbert": transformers.ModernBertConfig(
        **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
    "mobilebert": transformers.MobileBertConfig(**{**SIZES, "embedding_size": 32, "intra_bottleneck_size": 32}),
}
LENGTHS = (9, 1, 17, 4)


def tiny(name, auto=transformers.AutoModel, seed=0, **changes):
    torch.manual_seed(seed)
    config = copy.deepcopy((CONFIGS | OTHERS)[name])
    for key, value in changes.items():
        setattr(config, key, value)
    model = auto.from_config(config).eval()
    for parameter in model.parameters():  # away from the initial 0.02, so that every part of a block matters
        torch.nn.init.normal_(parameter, std=0.25) if parameter.dim() > 1 else parameter.data.add_(
            0.1 * torch.randn_like(parameter)
        )
    return model


def batch(config, lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(5, config.vocab_size, shape, generator=generator)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, config.pad_token_id), "attention_mask": mask}


def round_between(base) -> list:
    """Hooks that round what travels within a block as the fused one does: queries, keys, values, context and inner."""
    hooks, blocks = [], architectures.blocks(base)
    if why_not_fused(torch.zeros(0), blocks, base.config):
        return hooks
    for module in {part for block in blocks for part in (block.query, block.key, block.value)}:
        hooks.append(module.register_forward_hook(lambda _module, _given, out: out.bfloat16().float()))
    for module in {part for block in blocks for part in (block.output, block.down)}:
        hooks.append(module.register_forward_pre_hook(lambda _module, given: (given[0].bfloat16().float(),)))
    return hooks


def padded(model, inputs, **given):
    """The model's own forward, on padding and all, with the same quantised linears."""
    hooks = []
    for base in [module for module in model.modules() if isinstance(module, PaddingFree)]:
        base.__class__ = type(base).__mro__[2]
        hooks += round_between(base)
    result = model(**inputs, **given)
    for hook in hooks:
        hook.remove()
    kdkernels.quant.encoder.attach_all(model)
    return result


WEIGHT_ONLY = Scheme(activation_bits=None)


def assert_alike(got, expected, scheme):
    """To rounding, token by token. Of 8-bit activations one in some hundred thousand lies so near the middle between
    two codes that rounding sends it to either, which moves its token by a step: one token in a thousand on AVX2, none
    elsewhere. A mistake, be it of one percent in one factor, moves them all.
    """
    error = (got - expected).abs().amax(-1)
    assert error.max() < (1e-4 if scheme == WEIGHT_ONLY else 0.1)
    assert (error < 1e-4).float().mean() >= 0.75


@pytest.mark.parametrize("scheme", ["int8", "int4", WEIGHT_ONLY], ids=["int8", "int4", "weight-only"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_packed_tokens_give_what_padded_ones_do(name, scheme):
    model = kdkernels.quantize(tiny(name, num_hidden_layers=2 if scheme == WEIGHT_ONLY else 1), scheme)
    assert isinstance(model, PaddingFree)
    inputs = batch(model.config)
    got, expected = model(**inputs), padded(model, inputs)
    real = inputs["attention_mask"].bool()
    assert_alike(got.last_hidden_state[real], expected.last_hidden_state[real], scheme)
    assert (got.last_hidden_state[~real] == 0).all()
    if "pooler_output" in expected:
        assert_alike(got.pooler_output, expected.pooler_output, scheme)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(bits, group, size, symmetric)
        for bits, symmetric in ((8, False), (4, True))
        for group, size in (("channel", None), ("out", 6), ("in", 8), ("block", 64))
    ],
    ids=str,
)
@torch.no_grad()
def test_every_kind_of_groups(scheme):
    """A model's layers are the weights that they stand for; how well 4 bits of a channel do is not asked here."""
    model = kdkernels.quantize(tiny("bert"), scheme)
    plain = tiny("bert")
    for name, module in model.named_modules():
        if isinstance(module, (QuantLinear, QuantEmbedding)):
            plain.get_submodule(name).weight.data = module.weight.dequantize()
    inputs = batch(model.config)
    real = inputs["attention_mask"].bool()
    got, expected = model(**inputs).last_hidden_state[real], plain(**inputs).last_hidden_state[real]
    assert torch.nn.functional.cosine_similarity(got, expected).mean() > 0.998


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision(dtype, tmp_path):
    """Quantised from it, moved to it, and loaded in it."""
    model = tiny("bert")
    inputs = batch(model.config)
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).last_hidden_state[real]
    moved = kdkernels.quantize(tiny("bert"))
    moved.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, dtype=dtype)
    for made in (kdkernels.quantize(model.to(dtype)), moved.to(dtype), loaded):
        got = made(**inputs).last_hidden_state
        assert got.dtype == dtype
        assert torch.nn.functional.cosine_similarity(got[real].float(), expected).mean() > 0.99


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_eight_bits_are_close_to_the_original(name):
    model = tiny(name)
    inputs = batch(model.config)
    real = inputs["attention_mask"].bool()
    before = model(**inputs, output_hidden_states=True)
    after = kdkernels.quantize(model)(**inputs, output_hidden_states=True)
    assert type(after) is type(before) and after.keys() == before.keys()
    cosine = torch.nn.functional.cosine_similarity(before.last_hidden_state[real], after.last_hidden_state[real])
    assert cosine.mean() > 0.996  # the bar for 8 bits on a real model too


@torch.no_grad()
def test_a_text_does_not_depend_on_its_batch():
    model = kdkernels.quantize(tiny("bert"))
    inputs = batch(model.config)
    together = model(**inputs).last_hidden_state
    for row, length in enumerate(LENGTHS):
        alone = model(input_ids=inputs["input_ids"][row : row + 1, :length]).last_hidden_state
        assert torch.equal(together[row, :length], alone[0])


@torch.no_grad()
def test_left_padding_and_holes():
    model = kdkernels.quantize(tiny("bert"), WEIGHT_ONLY)
    inputs = batch(model.config, (6, 6))
    inputs["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1]])
    real = inputs["attention_mask"].bool()
    got, expected = model(**inputs).last_hidden_state, padded(model, inputs).last_hidden_state
    assert_alike(got[real], expected[real], WEIGHT_ONLY)


@torch.no_grad()
def test_a_text_of_padding_alone_is_zeros():
    model = kdkernels.quantize(tiny("bert"))
    inputs = batch(model.config, (5, 0))
    states = model(**inputs).last_hidden_state
    assert (states[1] == 0).all() and states[0].abs().sum() > 0


HEADS = {
    "AutoModelForSequenceClassification": "logits",
    "AutoModelForTokenClassification": "logits",
    "AutoModelForQuestionAnswering": "start_logits",
    "AutoModelForMaskedLM": "logits",
}


@pytest.mark.parametrize("auto", HEADS)
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "albert"])
@torch.no_grad()
def test_heads_work_on_it(name, auto):
    model = tiny(name, getattr(transformers, auto))
    inputs = batch(model.config)
    field = HEADS[auto]
    before = model(**inputs)[field]
    model = kdkernels.quantize(model)
    assert isinstance(model.base_model, PaddingFree)
    after = model(**inputs)[field]
    real = slice(None) if before.dim() == 2 and field == "logits" else inputs["attention_mask"].bool()
    cosine = torch.nn.functional.cosine_similarity(before[real].flatten(), after[real].flatten(), dim=0)
    assert cosine > 0.99


@pytest.fixture(scope="module")
def model():
    return kdkernels.quantize(tiny("bert"), WEIGHT_ONLY)


@pytest.fixture(scope="module")
def inputs(model):
    return batch(model.config)


class TestForward:
    """The arguments that transformers' own forward takes."""

    @torch.no_grad()
    def test_hidden_states(self, model, inputs):
        got = model(**inputs, output_hidden_states=True).hidden_states
        expected = padded(model, inputs, output_hidden_states=True).hidden_states
        real = inputs["attention_mask"].bool()
        assert len(got) == len(expected) == 3
        for ours, theirs in zip(got, expected, strict=True):
            assert_alike(ours[real], theirs[real], WEIGHT_ONLY)

    @torch.no_grad()
    def test_attention_maps_come_from_the_models_own_forward(self, model, inputs):
        model.set_attn_implementation("eager")
        maps = model(**inputs, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        assert len(maps) == 2 and maps[0].shape == (4, 4, 17, 17)

    @torch.no_grad()
    def test_tuples(self, model, inputs):
        last, pooled = model(**inputs, return_dict=False)
        output = model(**inputs)
        assert torch.equal(last, output[0]) and torch.equal(pooled, output[1])

    @torch.no_grad()
    def test_token_types_positions_and_embeddings(self, model, inputs):
        types = (torch.arange(17) > 5).long().expand(4, -1)
        positions = torch.arange(17).flip(0)[None]
        embeds = torch.randn(4, 17, 64, generator=torch.Generator().manual_seed(1))
        real = inputs["attention_mask"].bool()
        for given in (
            {"token_type_ids": types},
            {"position_ids": positions},
            {"input_ids": None, "inputs_embeds": embeds},
        ):
            given = {**inputs, **given}
            got, expected = model(**given).last_hidden_state, padded(model, given).last_hidden_state
            assert_alike(got[real], expected[real], WEIGHT_ONLY)

    @torch.no_grad()
    def test_arguments_by_position(self, model, inputs):
        types = (torch.arange(17) > 5).long().expand(4, -1)
        named = model(**inputs, token_type_ids=types)
        by_position = model(inputs["input_ids"], inputs["attention_mask"], types)
        assert torch.equal(by_position.last_hidden_state, named.last_hidden_state)
        own = inspect.signature(transformers.BertModel.forward).parameters
        assert list(inspect.signature(model.forward).parameters) == [name for name in own if name != "self"]
        with pytest.raises(TypeError, match="multiple values for argument 'attention_mask'"):
            model(inputs["input_ids"], inputs["attention_mask"], attention_mask=None)

    @torch.no_grad()
    def test_a_mask_for_all_texts(self, model, inputs):
        mask = inputs["attention_mask"][:1]
        got = model(inputs["input_ids"], mask).last_hidden_state
        expected = model(inputs["input_ids"], mask.expand(4, -1)).last_hidden_state
        assert torch.equal(got, expected)

    @pytest.mark.parametrize("shape", [(4, 16), (3, 17)])
    @torch.no_grad()
    def test_a_mask_of_another_shape_is_an_error(self, model, inputs, shape):
        mask = torch.ones(shape, dtype=torch.int64)
        mask[0, -1] = 0
        with pytest.raises((RuntimeError, IndexError), match="size"):
            model(inputs["input_ids"], mask)

    @pytest.mark.parametrize("wrong", [-1, 120])
    @torch.no_grad()
    def test_an_id_that_is_no_word_is_an_error(self, model, inputs, wrong):
        ids = inputs["input_ids"].clone()
        ids[0, 3] = wrong
        with pytest.raises(IndexError, match="out of range"):
            model(ids)

    def test_explain_says_which_calls_are_not_packed(self, model):
        said = kdkernels.explain(model)[""]
        assert "call by call, since activations are not quantised" in said
        assert "for an attention_mask that is not [batch, tokens], output_attentions" in said
        assert "blocks all in one call" in kdkernels.explain(kdkernels.quantize(tiny("bert")))[""]

    def test_both_inputs_are_an_error(self, model, inputs):
        with pytest.raises(ValueError, match="input_ids"), torch.no_grad():
            model(**inputs, inputs_embeds=torch.zeros(4, 17, 64))


class TestPlan:
    def test_what_is_quantised(self):
        model = kdkernels.quantize(tiny("bert", transformers.AutoModelForSequenceClassification), "int4")
        schemes = {name: m.scheme for name, m in model.named_modules() if isinstance(m, (QuantLinear, QuantEmbedding))}
        assert schemes["bert.embeddings.word_embeddings"].bits == 8
        assert {schemes[name].bits for name in schemes if "encoder" in name} == {4}
        assert type(model.classifier) is torch.nn.Linear

    @pytest.mark.parametrize(("scheme", "limit"), [("int8", 109.93), ("int4", 69.84), ("int3", 48.17), ("int2", 37.48)])
    def test_size_of_bert_base(self, scheme, limit):
        """MB, of 10^6 bytes, of the tensors in its checkpoint, which are laid out without being filled."""
        with torch.device("meta"):
            model = transformers.BertModel(transformers.BertConfig())
        lay_out(model, plan(model, as_scheme(scheme), {}, []))
        tensors = [*model.parameters(), *model.buffers()]
        size = sum(t.numel() * t.element_size() for t in tensors) / 1e6
        assert 0.999 * limit < size <= limit

    def test_classes_made_from_linear_and_embedding_stay(self):
        """BART scales what it looks up; MultiheadAttention reads the weight of its out_proj itself."""
        config = transformers.BartConfig(
            vocab_size=120, d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, scale_embedding=True
        )
        planned = plan(transformers.BartModel(config), Scheme(), {}, [])
        assert planned and not any("embed" in name for name in planned)
        assert plan(torch.nn.MultiheadAttention(8, 2), Scheme(), {}, []) == {}

    def test_bits_per_layer_by_name(self):
        model = kdkernels.quantize(tiny("bert"), "int4", bits_per_layer={"layer.0": 8, "layer.0.output.dense": "int2"})
        bits = {name: m.scheme.bits for name, m in model.named_modules() if isinstance(m, QuantLinear)}
        assert bits["encoder.layer.0.attention.self.query"] == 8
        assert bits["encoder.layer.0.output.dense"] == 2
        assert bits["encoder.layer.0.attention.output.dense"] == 8
        assert bits["encoder.layer.1.output.dense"] == 4

    def test_bits_per_layer_of_embeddings(self):
        model = kdkernels.quantize(
            tiny("bert"), "int2", bits_per_layer={"word_embeddings": 8, "position_embeddings": 3}
        )
        assert model.embeddings.word_embeddings.scheme.bits == 8
        assert model.embeddings.position_embeddings.scheme.bits == 3
        assert type(model.embeddings.token_type_embeddings) is torch.nn.Embedding

    def test_bits_per_layer_by_block(self):
        model = kdkernels.quantize(tiny("distilbert"), bits_per_layer=[3, Scheme(bits=4)])
        bits = {name: m.scheme.bits for name, m in model.named_modules() if isinstance(m, QuantLinear)}
        assert bits["transformer.layer.0.ffn.lin1"] == 3 and bits["transformer.layer.1.ffn.lin1"] == 4

    def test_skipped_modules_stay_and_the_encoder_says_why(self):
        model = kdkernels.quantize(tiny("bert"), skip=["layer.1.output", "word_embeddings"])
        assert type(model.encoder.layer[1].output.dense) is torch.nn.Linear
        assert type(model.embeddings.word_embeddings) is torch.nn.Embedding
        assert "layer by layer" in kdkernels.explain(model)[""]

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"scheme": "int5"}, "scheme"),
            ({"bits_per_layer": {"layer.7": 8}}, "bits_per_layer.*layer.7"),
            ({"bits_per_layer": {"layer.0": 5}}, "bits"),
            ({"bits_per_layer": [8]}, "bits_per_layer.*2"),
            ({"bits_per_layer": {"LayerNorm": 8}}, "bits_per_layer.*LayerNorm"),
            ({"bits_per_layer": {"word_embeddings": Scheme(group="out")}}, "bits_per_layer.*word_embeddings.*group"),
            ({"bits_per_layer": {"layer.0": None}}, "bits_per_layer must be a Scheme or one of .*got None"),
            ({"bits_per_layer": 8}, "bits_per_layer must be a mapping from names, or a sequence.*got 8"),
            ({"skip": ["nothing"]}, "skip.*nothing"),
            ({"skip": "encoder"}, "skip must be a sequence"),
            ({"skip": None}, "skip must be a sequence of parts of module names, got None"),
            ({"skip": [""]}, "skip must be a sequence"),
        ],
    )
    def test_bad_input(self, given, named):
        with pytest.raises((ValueError, TypeError), match=named):
            kdkernels.quantize(tiny("bert"), **given)

    def test_twice(self):
        model = kdkernels.quantize(tiny("bert"))
        with pytest.raises(ValueError, match="quantised already"):
            kdkernels.quantize(model)

    def test_no_module(self):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
            kdkernels.quantize("bert-base-uncased")

    def test_nothing_to_quantise(self):
        with pytest.raises(ValueError, match="no linear layer"):
            kdkernels.quantize(torch.nn.LayerNorm(4))
        with pytest.raises(ValueError, match="model must hold the linears to quantise, got a Linear itself"):
            kdkernels.quantize(torch.nn.Linear(4, 4))

    def test_explain_no_module(self):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
            kdkernels.explain("bert-base-uncased")


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
@torch.no_grad()
def test_other_architectures_run_layer_by_layer(config):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    inputs = batch(config)
    real = inputs["attention_mask"].bool()
    before = model(**inputs).last_hidden_state[real]
    model = kdkernels.quantize(model)
    after = model(**inputs).last_hidden_state[real]
    assert torch.nn.functional.cosine_similarity(before, after).mean() > 0.99
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    assert type(model).__name__ in kdkernels.explain(model)[""]


class TestReliability:
    @torch.no_grad()
    def test_nan_and_infinities_stay_in_their_text(self):
        model = tiny("bert")
        inputs = batch(model.config)
        quantised = kdkernels.quantize(copy.deepcopy(model))
        clean = quantised(**inputs).last_hidden_state
        for bad in (torch.nan, torch.inf):
            embeds = model.embeddings.word_embeddings(inputs["input_ids"])
            embeds[0, 3, 5] = bad
            given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
            assert model(**given).last_hidden_state[0, :9].isnan().all()
            got = quantised(**given).last_hidden_state
            assert got[0, :9].isnan().all()
            assert torch.isfinite(got[1:]).all()
        assert torch.isfinite(clean).all()

    def test_calls_need_no_no_grad_and_a_head_can_be_trained(self, tmp_path):
        model = kdkernels.quantize(tiny("bert", transformers.AutoModelForSequenceClassification))
        model.save_pretrained(tmp_path)
        for made in (model, transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)):
            inputs = batch(made.config)
            assert not made(**inputs).logits.requires_grad
            made.classifier.requires_grad_(True)
            made(**inputs, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
            assert made.classifier.weight.grad.abs().sum() > 0
            with pytest.raises(RuntimeError, match="no gradient"):
                made(inputs_embeds=torch.randn(1, 3, 64, requires_grad=True))

    @pytest.mark.parametrize("name", ["encoder.layer.1.output.dense", "embeddings.word_embeddings"])
    def test_a_weight_that_is_not_finite_is_named(self, name):
        """And nothing is changed, so that the model can be mended and quantised."""
        model = tiny("bert")
        model.get_submodule(name).weight.data[3, 2] = torch.nan
        with pytest.raises(ValueError, match=f"{name} can't be quantised: weight must be finite"):
            kdkernels.quantize(model)
        model.get_submodule(name).weight.data[3, 2] = 0.1
        kdkernels.quantize(model)

    def test_threads_share_a_model(self):
        model = kdkernels.quantize(tiny("bert"))
        inputs = [batch(model.config, seed=seed) for seed in range(4)]
        with torch.no_grad():
            expected = [model(**given).last_hidden_state for given in inputs]
        fresh = pickle.loads(pickle.dumps(model))  # whose kernels' weights are not laid out yet
        wrong = []

        def work(index):
            with torch.no_grad():
                for _ in range(10):
                    if not torch.equal(fresh(**inputs[index]).last_hidden_state, expected[index]):
                        wrong.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    @torch.no_grad()
    def test_copies(self):
        model = kdkernels.quantize(tiny("bert"))
        inputs = batch(model.config)
        expected = model(**inputs).last_hidden_state
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(**inputs).last_hidden_state[:, 0], expected[:, 0], rtol=0, atol=2e-2)
        assert torch.equal(copy.deepcopy(model)(**inputs).last_hidden_state, expected)

    @torch.no_grad()
    def test_compiled(self):
        """Before any other call, as a model is compiled that was just made, and for all shapes at once."""
        model = kdkernels.quantize(tiny("bert"))
        compiled = torch.compile(copy.deepcopy(model), dynamic=True)
        for lengths in ((5, 3), LENGTHS):
            inputs = batch(model.config, lengths)
            torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=0, atol=2e-2)


class TestEcosystem:
    @torch.no_grad()
    def test_pipeline(self, tmp_path):
        model = kdkernels.quantize(tiny_bert.bert(head=True))
        model.save_pretrained(tmp_path)
        tiny_bert.tokenizer().save_pretrained(tmp_path)
        texts = tiny_bert.texts(5)
        classify = transformers.pipeline("text-classification", model=str(tmp_path))
        found = classify(texts, batch_size=3)
        inputs = tiny_bert.tokenizer()(texts, padding=True, return_tensors="pt")
        expected = model(**inputs).logits.softmax(-1).amax(-1)
        torch.testing.assert_close(torch.tensor([row["score"] for row in found]), expected)

    def test_sentence_transformers(self, tmp_path):
        sentence_transformers = pytest.importorskip("sentence_transformers")
        tiny_bert.save_teacher(tmp_path, head=False)
        model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
        texts = tiny_bert.texts(9)
        before = torch.tensor(model.encode(texts))
        kdkernels.quantize(model)
        assert any(isinstance(module, PaddingFree) for module in model.modules())
        after = torch.tensor(model.encode(texts))
        assert torch.nn.functional.cosine_similarity(before, after).mean() > 0.99
        model.save(str(tmp_path / "saved"))
        loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
        assert torch.equal(torch.tensor(loaded.encode(texts)), after)
