"""Surgery: pure functions that make a student out of a model. The given model is never changed.

Layers are found by the model's own structure (the ModuleList as long as config.num_hidden_layers), so one function
serves BERT, RoBERTa, DistilBERT, MobileBERT and ModernBERT; ALBERT, whose layers are one shared module, only changes
its count.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import DistillError


def take_layers(model: PreTrainedModel, layers: Sequence[int] | int) -> PreTrainedModel:
    """A copy with only the given encoder layers, in the given order; an int k takes k layers evenly spaced, ending
    with the last.

    12 layers, k = 6: layers 1, 3, 5, 7, 9, 11 (0-based), the g(m) = m N / M map of TinyBERT and PKD. Embeddings and
    head stay.
    """
    total = model.config.num_hidden_layers
    chosen = evenly(layers, total) if isinstance(layers, int) else [int(i) for i in layers]
    if not chosen or not all(-total <= i < total for i in chosen):
        raise DistillError(f"take_layers: the model has layers 0 to {total - 1}, got {chosen}")
    student = copy.deepcopy(model)
    names = [name for name, module in student.named_modules() if _is_stack(module, total)]
    # A layer may hold lists of its own (MobileBERT's feed-forward networks): only the outermost list is the encoder.
    stacks = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    shared = getattr(student.config, "num_hidden_groups", None)
    if shared is not None and shared != 1:
        raise DistillError(f"take_layers: ALBERT with {shared} layer groups has no single layers to take")
    if shared is None:
        if len(stacks) != 1:
            raise DistillError(
                f"take_layers: {type(model).__name__} has {len(stacks)} stacks of {total} layers, one is needed"
            )
        owner, _, name = stacks[0].rpartition(".")
        stack = student.get_submodule(stacks[0])
        # Layers that are taken twice must not share parameters, hence the copies; the one config stays one object.
        kept = nn.ModuleList(copy.deepcopy(stack[i], {id(student.config): student.config}) for i in chosen)
        for index, layer in enumerate(kept):
            for module in layer.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = index
        setattr(student.get_submodule(owner), name, kept)
        if getattr(student.config, "layer_types", None):
            student.config.layer_types = [student.config.layer_types[i] for i in chosen]
    student.config.num_hidden_layers = len(chosen)
    return student


def evenly(count: int, total: int) -> list[int]:
    """`count` of `total` layers, evenly spaced, the last one included: [(m + 1) total / count - 1]."""
    if not 1 <= count <= total:
        raise DistillError(f"cannot take {count} layers from {total}; accepted: 1 to {total}")
    return [(m + 1) * total // count - 1 for m in range(count)]


def fresh(model: PreTrainedModel, **changes) -> PreTrainedModel:
    """A newly initialised model of the same class with the config changed, e.g. hidden_size=312, num_hidden_layers=4.

    The weights are drawn from torch's generator: seed it first for a reproducible student.
    """
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        if not hasattr(config, name):
            raise DistillError(f"fresh: {type(config).__name__} has no setting {name!r}")
        setattr(config, name, value)
    if config.hidden_size % config.num_attention_heads:
        raise DistillError(
            f"fresh: hidden_size {config.hidden_size} is not a multiple of {config.num_attention_heads} attention heads"
        )
    return type(model)(config).to(next(model.parameters()).dtype)


def set_dropout(model: PreTrainedModel, p: float) -> PreTrainedModel:
    """A copy whose dropout probabilities, in modules and config, are all `p`. 0 makes a training step a pure function
    of its batch.
    """
    student = copy.deepcopy(model)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    for name, value in student.config.to_dict().items():
        if "dropout" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(student.config, name, p)
    # ModernBERT and DistilBERT attention reads a plain number that was copied from the config at construction.
    for module in student.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = p
    return student


def _is_stack(module: nn.Module, length: int) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == length and len({type(m) for m in module}) == 1


def parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def size_bytes(model: nn.Module) -> int:
    """Bytes of the parameters, shared ones once."""
    return sum({id(p): p.numel() * torch.empty((), dtype=p.dtype).element_size() for p in model.parameters()}.values())
