"""CTranslate2, int8, given the real tokens alone. Its converter reads a folder of transformers with a tokenizer, which
it needs for the size of the vocabulary only."""

import shutil
import tempfile
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


def int8(model, folder: Path):
    import ctranslate2

    path = folder / "ctranslate2_int8"
    if not path.is_dir():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            model.save_pretrained(made)
            words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
            PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(made)
            partial = Path(made) / "converted"
            ctranslate2.converters.TransformersConverter(made).convert(str(partial), quantization="int8")
            shutil.move(partial, path)
    encoder = ctranslate2.Encoder(str(path), device="cpu", intra_threads=torch.get_num_threads(), compute_type="int8")

    def encode(input_ids, attention_mask):
        ids = input_ids.numpy().astype(numpy.int32)
        lengths = attention_mask.sum(1).numpy().astype(numpy.int32)
        given = (ctranslate2.StorageView.from_array(values) for values in (ids, lengths))
        return torch.from_numpy(numpy.array(encoder.forward_batch(*given).last_hidden_state))

    return encode
