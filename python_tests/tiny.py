"""Tiny models, tokenizer and texts that the trainer's tests share: random weights, nothing downloaded, a step takes
milliseconds.
"""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def config(**changes) -> BertConfig:
    """A BERT of 4 layers, width 24, 4 heads, without dropout."""
    settings = {
        "vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "num_labels": 3, "initializer_range": 0.3,
    }  # fmt: skip
    return BertConfig(**(settings | changes))


def bert(seed: int = 0, head: bool = False, **changes):
    torch.manual_seed(seed)
    return (BertForSequenceClassification if head else BertModel)(config(**changes)).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def save_teacher(folder: Path, **changes) -> Path:
    bert(**({"head": True} | changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def texts(count: int = 40, seed: int = 0, longest: int = 20) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, longest))) for _ in range(count)]


def batch(rows: int = 3, seed: int = 0, labels: bool = False) -> dict:
    """A padded batch of uneven lengths."""
    encoded = dict(tokenizer()(texts(rows, seed), padding=True, return_tensors="pt"))
    return encoded | ({"labels": torch.arange(rows) % 3} if labels else {})
