"""Vocabulary heads, and second word embeddings, whose weight is the word embedding's: packed once, stored once, and no
parameter to tie any more.

transformers names what is tied in `all_tied_weights_keys`, and ties it again wherever a model is loaded. A packed
weight is no parameter, and the bias beside it another than the float32 one, so their names are taken out of there, and
they borrow from the embedding (modules.py).
"""

from collections.abc import Collection, Iterator, Mapping

from torch import nn
from transformers import PreTrainedModel

from .modules import Packed
from .scheme import Scheme

_WEIGHT = ".weight"


def find(model: nn.Module, layers: Mapping[str, Scheme]) -> dict[str, str]:
    """{name of a head: name of the embedding} that hold one parameter, and get one scheme in `layers`."""
    return {
        head: table
        for head, table in declared(model)
        if head in layers
        and layers[head] == layers.get(table)
        and model.get_submodule(head).weight is model.get_submodule(table).weight
    }


def share(model: nn.Module, heads: Collection[str]) -> None:
    """In a model laid out to be loaded: those of `heads` that it has borrow from their embedding."""
    for head, table in declared(model):
        if any(f".{name}".endswith(f".{head}") for name in heads):
            model.get_submodule(head).borrow(model.get_submodule(table))


def forget(model: nn.Module) -> None:
    """Takes what is packed out of the names of tied parameters, so that tie_weights() ties the others alone, and makes
    resize_token_embeddings() an error where a table is packed.
    """
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        kept = {
            target: source
            for target, source in module.all_tied_weights_keys.items()
            if not any(isinstance(module.get_submodule(end.rpartition(".")[0]), Packed) for end in (target, source))
        }
        module.all_tied_weights_keys, module._tied_weights_keys = kept, dict(kept)
        words = getattr(module.config, "vocab_size", None)
        if any(isinstance(table, Packed) and table.shape[0] == words for table in module.modules()):
            module._resize_token_embeddings = _refuse_resizing


def _refuse_resizing(*_arguments, **_options):
    raise ValueError(
        "a quantised model's vocabulary is fixed: call resize_token_embeddings on the original model, then quantize it"
    )


def declared(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name of a head, name of the embedding) wherever a model of transformers says that they are tied."""
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            for target, source in module.all_tied_weights_keys.items():
                if target.endswith(_WEIGHT):
                    yield tuple(f"{prefix}.{end.removesuffix(_WEIGHT)}".removeprefix(".") for end in (target, source))
