"""Quantised models on disk: what a checkpoint holds, that it gives the same model again, and that a file which is
damaged, foreign or of another version is an error whatever class and dtype it is loaded as."""

import copy
import functools
import json
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import kdkernels
from kdkernels.quant.encoder import PaddingFree

from .test_quantize import OTHERS, WEIGHT_ONLY, batch, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


class TestCheckpoints:
    @pytest.fixture
    def folder(self, tmp_path):
        model = kdkernels.quantize(tiny("bert", transformers.AutoModelForSequenceClassification), "int4")
        model.save_pretrained(tmp_path / "model")
        self.model = model
        return tmp_path / "model"

    @torch.no_grad()
    def test_round_trip(self, folder):
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        inputs = batch(loaded.config)
        assert torch.equal(loaded(**inputs).logits, self.model(**inputs).logits)
        assert isinstance(loaded.base_model, PaddingFree)
        assert [p.name for p in folder.glob("*.bin")] == [] and (folder / "model.safetensors").is_file()
        loaded.save_pretrained(folder.with_name("again"))
        again = transformers.AutoModelForSequenceClassification.from_pretrained(folder.with_name("again"))
        assert torch.equal(again(**inputs).logits, self.model(**inputs).logits)

    @torch.no_grad()
    def test_another_class_loads_it(self, folder):
        loaded = transformers.AutoModel.from_pretrained(folder)
        inputs = batch(loaded.config)
        expected = self.model.bert(**inputs).last_hidden_state
        assert torch.equal(loaded(**inputs).last_hidden_state, expected)

    @pytest.mark.parametrize(
        ("saved", "loaded"),
        [
            ("AutoModelForTokenClassification", "AutoModel"),
            ("AutoModelForMaskedLM", "AutoModelForSequenceClassification"),
            ("AutoModel", "AutoModelForMaskedLM"),
        ],
    )
    @torch.no_grad()
    def test_what_the_saved_class_lacks_is_fresh(self, saved, loaded, tmp_path):
        """A pooler or a head: made as transformers makes it, and never of what memory held before."""
        model = kdkernels.quantize(tiny("bert", getattr(transformers, saved)))
        model.save_pretrained(tmp_path / "saved")
        made = getattr(transformers, loaded).from_pretrained(tmp_path / "saved")
        inputs = batch(made.config)
        states = [m.base_model(**inputs).last_hidden_state for m in (model, made)]
        assert torch.equal(*states)
        if loaded == "AutoModelForMaskedLM":
            head = made.cls.predictions.decoder
            assert torch.equal(head.weight.blob, made.get_input_embeddings().weight.blob) and (head.bias == 0).all()
        else:
            pooler = made.base_model.pooler.dense
            assert (
                0.01 < pooler.weight.dequantize().std() < 0.03 and (pooler.bias == 0).all()
            )  # initializer_range is 0.02
        made.save_pretrained(tmp_path / "again")
        again = getattr(transformers, loaded).from_pretrained(tmp_path / "again")
        assert torch.equal(again(**inputs)[-1], made(**inputs)[-1])

    @torch.no_grad()
    def test_the_base_model_is_saved_by_itself(self, folder, tmp_path):
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        loaded.bert.save_pretrained(tmp_path / "base")
        base, inputs = transformers.AutoModel.from_pretrained(tmp_path / "base"), batch(loaded.config)
        assert torch.equal(base(**inputs).last_hidden_state, loaded.bert(**inputs).last_hidden_state)

    @pytest.mark.parametrize(
        "load",
        [
            transformers.AutoModelForSequenceClassification.from_pretrained,
            transformers.AutoModel.from_pretrained,
            functools.partial(transformers.AutoModel.from_pretrained, dtype=torch.bfloat16),
        ],
        ids=["as saved", "another class", "another dtype"],
    )
    def test_any_flipped_bit_is_an_error(self, folder, load):
        path = folder / "model.safetensors"
        whole = path.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        generator = torch.Generator().manual_seed(0)
        for at in torch.randint(header, len(whole), (12,), generator=generator).tolist():
            flip(path, at)
            with pytest.raises(ValueError, match="damaged"):
                load(folder)
            path.write_bytes(whole)

    @pytest.mark.parametrize("kind", ["packed", "LayerNorm.weight"])
    def test_tensors_that_changed_places_are_an_error(self, folder, kind):
        tensors = load_file(folder / "model.safetensors")
        layers = (f"bert.encoder.layer.{index}.output.{'dense.' * (kind == 'packed')}{kind}" for index in range(2))
        first, second = layers
        tensors[first], tensors[second] = tensors[second], tensors[first]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        for auto in (transformers.AutoModelForSequenceClassification, transformers.AutoModel):
            with pytest.raises(ValueError, match="damaged"):
                auto.from_pretrained(folder)

    def test_pickled_weights_are_an_error(self, folder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="safetensors only, got pytorch_model.bin"):
            transformers.AutoModelForSequenceClassification.from_pretrained(folder)

    @torch.no_grad()
    def test_shards(self, folder):
        self.model.save_pretrained(folder.with_name("shards"), max_shard_size="20KB")
        assert len(list(folder.with_name("shards").glob("*.safetensors"))) > 1
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder.with_name("shards"))
        inputs = batch(loaded.config)
        assert torch.equal(loaded(**inputs).logits, self.model(**inputs).logits)

    def test_a_truncated_file_is_an_error(self, folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match="safetensors file is cut off or damaged"):
            transformers.AutoModelForSequenceClassification.from_pretrained(folder)

    def test_another_format_is_an_error(self, folder):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["format"] = 99
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="format 99"):
            transformers.AutoModelForSequenceClassification.from_pretrained(folder)

    @pytest.mark.parametrize(
        "fields", [{"scheme": {"bits": 7}}, {"scheme": {"grain": 3}}, {"scheme": "int8"}, {"scheme": None}, {"skip": 3}]
    )
    def test_a_damaged_config_is_an_error(self, folder, fields):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"].update(fields)
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="quantization_config is damaged"):
            transformers.AutoModelForSequenceClassification.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("num_hidden_layers", 1), ("num_attention_heads", 1), ("layer_norm_eps", 1e-5), ("hidden_act", "relu")],
    )
    def test_a_config_of_another_model_is_an_error(self, folder, name, value):
        """Whose tensors would fit."""
        path = folder / "config.json"
        config = json.loads(path.read_text())
        assert config[name] != value
        path.write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=f"config.json is damaged or another model's: its {name} is {value!r}"):
            transformers.AutoModel.from_pretrained(folder)

    def test_a_block_that_the_files_lack_is_an_error(self, folder):
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]["decisive"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"the checkpoint has no encoder\.layer\.2\..*packed"):
            transformers.AutoModel.from_pretrained(folder, num_hidden_layers=3)

    def test_a_model_in_float_is_not_quantised_while_it_is_loaded(self, folder, tmp_path):
        tiny("bert").save_pretrained(tmp_path / "float")
        given = self.model.config.quantization_config
        with pytest.raises(ValueError, match=r"then call kdkernels\.quantize"):
            transformers.AutoModel.from_pretrained(tmp_path / "float", quantization_config=given)

    def test_weights_of_another_scheme_are_an_error(self, folder, tmp_path):
        other = kdkernels.quantize(tiny("bert", transformers.AutoModelForSequenceClassification), "int8")
        other.save_pretrained(tmp_path / "other")
        (folder / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
        with pytest.raises(ValueError, match="damaged"):
            transformers.AutoModelForSequenceClassification.from_pretrained(folder)


class TestVocabularyHeads:
    """Their weight is the word embedding's: in one tensor of the file, and the same again after everything."""

    @pytest.mark.parametrize("scheme", ["int8", "int3", WEIGHT_ONLY], ids=["int8", "int3", "weight-only"])
    @pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "albert", "electra", *OTHERS])
    @torch.no_grad()
    def test_round_trip(self, name, scheme, tmp_path):
        model = tiny(name, transformers.AutoModelForMaskedLM)
        model.tie_weights()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases are 0 as they are made, which bfloat16 holds
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        inputs = batch(model.config)
        real = inputs["attention_mask"].bool()
        before = model(**inputs).logits
        kdkernels.quantize(model, scheme)
        after = model(**inputs).logits
        cosine = torch.nn.functional.cosine_similarity(before[real], after[real], -1).mean()
        assert scheme != WEIGHT_ONLY or cosine > 0.98
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(**inputs).logits, after)
        assert {type(m) for m in loaded.modules()} == {type(m) for m in model.modules()}
        (head,) = (name for name, module in model.named_modules() if module is model.get_output_embeddings())
        stored = load_file(tmp_path / "model.safetensors")
        assert f"{head}.packed" not in stored
        assert (f"{head}.weight" in stored) == (name == "mobilebert")  # whose head is not called

    @torch.no_grad()
    def test_copies_and_state_dicts(self):
        model = kdkernels.quantize(tiny("bert", transformers.AutoModelForMaskedLM))
        inputs = batch(model.config)
        expected = model(**inputs).logits
        assert "cls.predictions.decoder.packed" not in model.state_dict()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            head, table = other.cls.predictions.decoder, other.bert.embeddings.word_embeddings
            assert torch.equal(other(**inputs).logits, expected)
            assert torch.equal(head.weight.blob, table.weight.blob)
        other = kdkernels.quantize(tiny("bert", transformers.AutoModelForMaskedLM, seed=1))
        other(**inputs)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(**inputs).logits, expected)
        moved = copy.deepcopy(model).to(torch.bfloat16).to(torch.float32)
        cosine = torch.nn.functional.cosine_similarity(moved(**inputs).logits, expected, -1)
        assert cosine.mean() > 0.99

    @pytest.mark.parametrize("kind", [transformers.AutoModel, transformers.AutoModelForMaskedLM], ids=["base", "head"])
    @pytest.mark.parametrize("name", ["bert", "distilbert"])
    @torch.no_grad()
    def test_tying_changes_nothing_and_resizing_is_an_error(self, name, kind, tmp_path):
        model = kdkernels.quantize(tiny(name, kind))
        model.save_pretrained(tmp_path)
        inputs = batch(model.config)
        expected = model(**inputs)[0]
        for other in (model, kind.from_pretrained(tmp_path), pickle.loads(pickle.dumps(model))):
            other.tie_weights()
            assert torch.equal(other(**inputs)[0], expected)
            for given in ({"new_num_tokens": 70}, {"pad_to_multiple_of": 64}):
                with pytest.raises(ValueError, match="resize_token_embeddings on the original model, then quantize"):
                    other.resize_token_embeddings(**given)

    @pytest.mark.parametrize(
        "given",
        [
            {"skip": ["word_embeddings"]},
            {"skip": ["decoder"]},
            {"bits_per_layer": {"decoder": 4}},
            {"bits_per_layer": {"word_embeddings": 4}},
        ],
        ids=str,
    )
    @torch.no_grad()
    def test_apart(self, given, tmp_path):
        """One of the two left alone, or in other bits: two tensors, each read again."""
        model = kdkernels.quantize(tiny("bert", transformers.AutoModelForMaskedLM), **given)
        inputs = batch(model.config)
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)

    @torch.no_grad()
    def test_a_second_word_embedding(self, tmp_path):
        """T5's encoder has its own, which is tied to the model's."""
        torch.manual_seed(0)
        config = transformers.T5Config(vocab_size=120, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
        model = transformers.T5EncoderModel(config).eval()
        inputs = batch(config)
        before = model(**inputs).last_hidden_state
        after = kdkernels.quantize(model)(**inputs).last_hidden_state
        assert torch.nn.functional.cosine_similarity(before, after, -1).mean() > 0.99
        model.save_pretrained(tmp_path)
        assert [name for name in load_file(tmp_path / "model.safetensors") if "embed" in name] == []
        loaded = transformers.T5EncoderModel.from_pretrained(tmp_path)
        assert torch.equal(loaded(**inputs).last_hidden_state, after)

    @torch.no_grad()
    def test_weights_that_are_not_tied(self, tmp_path):
        """Two parameters, though the config would have them tied: each is packed by itself."""
        model = tiny("bert", transformers.AutoModelForMaskedLM)
        weight = model.cls.predictions.decoder.weight
        model.cls.predictions.decoder.weight = torch.nn.Parameter(weight.flip(0))
        kdkernels.quantize(model)
        inputs = batch(model.config)
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        assert not torch.equal(loaded.cls.predictions.decoder.weight.blob, loaded.get_input_embeddings().weight.blob)


def test_a_weight_is_kept_once():
    """In buffers, as the kernels read it; a state dict has it as it is stored, and so has a module that was moved."""
    model = kdkernels.quantize(tiny("bert"))
    layer = model.encoder.layer[0].output.dense
    assert layer.packed is None and layer.prepared is layer.weight.prepared
    stored = model.state_dict()
    assert torch.equal(stored["encoder.layer.0.output.dense.packed"], layer.weight.blob)
    assert not any(name.endswith("prepared") for name in stored)
    layer.to(torch.float64)
    assert torch.equal(layer.packed, stored["encoder.layer.0.output.dense.packed"]) and layer.prepared is None
    assert layer.weight.prepared is layer.prepared and layer.packed is None
    other = kdkernels.quantize(tiny("bert"), skip=["layer.1"])
    with pytest.raises(RuntimeError, match="packed"):
        other.load_state_dict(stored)
    changed = kdkernels.quantize(tiny("bert"))
    for parameter in changed.parameters():
        parameter.data.zero_()
    changed.load_state_dict(stored)
    inputs = batch(model.config)
    with torch.no_grad():
        assert torch.equal(changed(**inputs)[0], kdkernels.quantize(tiny("bert"))(**inputs)[0])
