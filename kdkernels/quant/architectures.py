"""Where each encoder family of transformers keeps the parts of a block: the only place that knows their names.

A post-norm encoder block is, for every family here,

    a = LayerNorm(x + W_o attention(W_q x, W_k x, W_v x)),   y = LayerNorm(a + W_down f(W_up a))

and `blocks` gives its parts in that order. ALBERT repeats one block; DistilBERT and MiniLM are BERT in other names.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
    ModelOutput,
)

# config.hidden_act in transformers -> the activation of kdkernels.quant.linear.
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


@dataclass(frozen=True)
class Block:
    """One encoder block: six linears, two norms."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    attention_norm: nn.LayerNorm
    up: nn.Module
    down: nn.Module
    output_norm: nn.LayerNorm

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        return self.query, self.key, self.value, self.output, self.up, self.down


def _bert(base) -> Iterator[Block]:
    for layer in base.encoder.layer:
        own, out = layer.attention.self, layer.attention.output
        yield Block(
            own.query, own.key, own.value, out.dense, out.LayerNorm,
            layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm,
        )  # fmt: skip


def _distilbert(base) -> Iterator[Block]:
    for layer in base.transformer.layer:
        own, ffn = layer.attention, layer.ffn
        yield Block(
            own.q_lin, own.k_lin, own.v_lin, own.out_lin, layer.sa_layer_norm,
            ffn.lin1, ffn.lin2, layer.output_layer_norm,
        )  # fmt: skip


def _albert(base) -> Iterator[Block]:
    layers, groups = base.config.num_hidden_layers, base.config.num_hidden_groups
    for index in range(layers):
        for layer in base.encoder.albert_layer_groups[index * groups // layers].albert_layers:
            own = layer.attention
            yield Block(
                own.query, own.key, own.value, own.dense, own.LayerNorm,
                layer.ffn, layer.ffn_output, layer.full_layer_layer_norm,
            )  # fmt: skip


# Of each base model: its blocks, and the class of what its forward returns.
_FAMILIES = {
    "BertModel": (_bert, BaseModelOutputWithPoolingAndCrossAttentions),
    "RobertaModel": (_bert, BaseModelOutputWithPoolingAndCrossAttentions),
    "XLMRobertaModel": (_bert, BaseModelOutputWithPoolingAndCrossAttentions),
    "CamembertModel": (_bert, BaseModelOutputWithPoolingAndCrossAttentions),
    "ElectraModel": (_bert, BaseModelOutputWithPastAndCrossAttentions),
    "DistilBertModel": (_distilbert, BaseModelOutput),
    "AlbertModel": (_albert, BaseModelOutputWithPooling),
}
ARCHITECTURES = tuple(_FAMILIES)


def is_base(module: nn.Module) -> bool:
    """Whether the module is a model of transformers without a head."""
    return isinstance(module, PreTrainedModel) and module.base_model is module


def blocks(base: nn.Module) -> list[Block]:
    """The blocks of a supported base model, in the order in which they run."""
    return list(_FAMILIES[type(base).__name__][0](base))


def activation(config) -> str | None:
    """The name that the kernels have for the model's activation, or None."""
    return ACTIVATIONS.get(getattr(config, "activation", None) or config.hidden_act)


def unsupported(base: nn.Module) -> str:
    """Why the padding-free encoder can't run this base model; empty if it can."""
    name, config = type(base).__name__, base.config
    if name not in _FAMILIES:
        return f"{name} is not one of {', '.join(ARCHITECTURES)}"
    if getattr(config, "is_decoder", False):
        return "a decoder attends causally"
    if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
        return f"position_embedding_type {config.position_embedding_type!r}"
    if activation(config) is None:
        return f"activation {config.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}"
    return ""


def position_tables(base: nn.Module) -> list[str]:
    """Names of the position embeddings of a base model, where they are known to be looked up as embeddings are."""
    return ["embeddings.position_embeddings"] if type(base).__name__ in _FAMILIES else []


def read_as_matrices(model: nn.Module) -> set[str]:
    """Names of linears that are never called: a head of MobileBERT multiplies with their weights itself."""
    return {
        f"{name}.decoder"
        for name, module in model.named_modules()
        if type(module).__name__ == "MobileBertLMPredictionHead"
    }


def positions(base: nn.Module, ids: torch.Tensor | None, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The position ids [B or 1, N] that the model gives its tokens when it is given none."""
    embeddings, first = base.embeddings, 0
    if hasattr(embeddings, "create_position_ids_from_input_ids"):  # RoBERTa counts from behind the padding id
        if ids is not None:
            return embeddings.create_position_ids_from_input_ids(ids, embeddings.padding_idx)
        first = embeddings.padding_idx + 1
    return torch.arange(first, first + shape[1], device=device)[None]


def widen(base: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """From the width of the embeddings to that of the blocks, where they differ (ALBERT, ELECTRA)."""
    if type(base).__name__ == "AlbertModel":
        return base.encoder.embedding_hidden_mapping_in(x)
    return base.embeddings_project(x) if hasattr(base, "embeddings_project") else x


def output(base: nn.Module, last: torch.Tensor, hidden: tuple[torch.Tensor, ...] | None) -> ModelOutput:
    """What the model's forward returns, from the last hidden state [B, N, D] and all of them."""
    made = _FAMILIES[type(base).__name__][1]
    if not hasattr(base, "pooler"):
        return made(last_hidden_state=last, hidden_states=hidden)
    return made(last_hidden_state=last, pooler_output=_pool(base, last), hidden_states=hidden)


def _pool(base: nn.Module, last: torch.Tensor) -> torch.Tensor | None:
    if base.pooler is None:
        return None
    if type(base).__name__ == "AlbertModel":
        return base.pooler_activation(base.pooler(last[:, 0]))
    return base.pooler(last)
