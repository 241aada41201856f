"""Texts for distillation: read, encode, and an order that is a pure function of (seed, epochs, global batch).

The order of the whole run is one list of indices, fixed before training. So a resumed run skips by counting, any
number of processes sees the same global batches, and texts of similar length share a batch, which leaves little
padding.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from .errors import DistillError

_POOL = 50  # batches that are sorted by length together


def read(path: str, labels: str = "none") -> list[dict]:
    """Examples {"text", "text_pair"?, "label"?} of a file: .jsonl with those keys, or one text a line.

    labels="leading": each line of a text file starts with an integer label and a space. Empty lines are skipped.
    """
    file = Path(path)
    if not file.is_file():
        raise DistillError(f"data file {path}: no such file")
    try:
        lines = [
            (n, line.strip()) for n, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1) if line.strip()
        ]
    except UnicodeDecodeError as error:
        raise DistillError(f"data file {path}: not UTF-8 text ({error})") from error
    if not lines:
        raise DistillError(f"data file {path}: it holds no text")
    parse = _json_line if file.suffix == ".jsonl" else _labelled_line if labels == "leading" else _plain_line
    examples = []
    for number, line in lines:
        example = parse(line)
        if example is None:
            accepted = "an object with 'text' and optionally 'text_pair' and an integer 'label'"
            raise DistillError(
                f"data file {path}, line {number}: {line[:40]!r} is not "
                f"{accepted if file.suffix == '.jsonl' else 'an integer label, a space and a text'}"
            )
        examples.append(example)
    return examples


def _plain_line(line):
    return {"text": line}


def _labelled_line(line):
    label, _, text = line.partition(" ")
    return {"text": text, "label": int(label)} if label.lstrip("-").isdigit() and text else None


def _json_line(line):
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        return None
    pair, label = value.get("text_pair"), value.get("label")
    if not isinstance(pair, str | None) or not isinstance(label, int | None):
        return None
    return {k: v for k, v in (("text", value["text"]), ("text_pair", pair), ("label", label)) if v is not None}


def encode(examples: Sequence[dict], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict]:
    """Token ids of each example, cut to max_length, with its number as `index`."""
    pairs = [example.get("text_pair") for example in examples]
    if any(pair is not None for pair in pairs) and None in pairs:
        raise DistillError(f"data: example {pairs.index(None) + 1} has no text_pair but others do")
    encoded = tokenizer(
        [example["text"] for example in examples],
        None if None in pairs else pairs,
        truncation=True,
        max_length=max_length,
    )
    rows = [{name: values[i] for name, values in encoded.items()} | {"index": i} for i in range(len(examples))]
    for row, example in zip(rows, examples, strict=True):
        if "label" in example:
            row["label"] = example["label"]
    return rows


def order(lengths: Sequence[int], batch: int, epochs: float, seed: int) -> list[int]:
    """Indices of all batches of a run, `batch` texts each. Every epoch shuffles anew and leaves out a remainder below
    one batch.
    """
    if batch > len(lengths):
        raise DistillError(f"batch_size {batch} is larger than the {len(lengths)} training texts")
    per_epoch = len(lengths) // batch
    wanted = max(round(per_epoch * epochs), 1)
    lengths, indices = torch.tensor(lengths), []
    for epoch in range(-(-wanted // per_epoch)):
        generator = torch.Generator().manual_seed(seed + epoch)
        shuffled = torch.randperm(len(lengths), generator=generator)[: per_epoch * batch]
        pools = [pool[lengths[pool].argsort(stable=True)] for pool in shuffled.split(_POOL * batch)]
        batches = torch.cat(pools).view(per_epoch, batch)
        indices.append(batches[torch.randperm(per_epoch, generator=generator)])
    return torch.cat(indices)[:wanted].flatten().tolist()


class Ordered(Dataset):
    """A data set whose item i is the i-th example of the run; to be read in sequence, once."""

    def __init__(self, rows: Sequence[dict], batch: int, epochs: float, seed: int):
        self.rows = rows
        self.order = order([len(row["input_ids"]) for row in rows], batch, epochs, seed)

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        return self.rows[self.order[i]]


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
    """Pads to the longest text of the batch; `label` becomes `labels`."""
    return DataCollatorWithPadding(tokenizer)
