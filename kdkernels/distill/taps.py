"""Taps: strings that name tensors inside a transformers encoder, collected during one ordinary forward pass.

    "hidden.i"           [B, N, D]     hidden state i: 0 = embeddings, i = output of layer i; negative from the end
    "cls.i"              [B, D]        its first token
    "embedding"          [B, D]        sentence embedding: last hidden state, mean over real tokens, L2-normalised
    "logits"             [B, C] or [B, N, V]   output of the model's head
    "q.i", "k.i", "v.i"  [B, H, N, d]  queries, keys, values of attention layer i (0 = first, -1 = last)
    "qk.i", "qkv.i"      tuples of those

q, k and v come from a function registered with transformers' AttentionInterface that keeps its arguments and calls
sdpa. So no attention map is ever asked for, sdpa stays on, and every architecture that dispatches through the
interface works unchanged. Layers are counted by call, not by module, because ALBERT runs one module many times.
Nothing is kept that was not asked for.
"""

import inspect
from collections.abc import Iterable
from contextvars import ContextVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .errors import DistillError, unknown

Tapped = torch.Tensor | tuple[torch.Tensor, ...]

_ATTENTION = "kdkernels_taps"
_PARTS = {"q": (0,), "k": (1,), "v": (2,), "qk": (0, 1), "qkv": (0, 1, 2)}
_LAYERED = ("hidden", "cls", *_PARTS)
_WHOLE = ("logits", "embedding")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


class _Recorder:
    """q, k, v of the wanted attention layers of one forward pass."""

    def __init__(self, layers: set[int]):
        self.layers, self.kept, self.calls = layers, {}, 0

    def __call__(self, query, key, value):
        if self.calls in self.layers:
            self.kept[self.calls] = (query, key, value)
        self.calls += 1


_active: ContextVar[_Recorder | None] = ContextVar("kdkernels_taps", default=None)


def _tapped_attention(module, query, key, value, attention_mask, **kwargs):
    recorder = _active.get()
    if recorder is not None:
        recorder(query, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_ATTENTION, _tapped_attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def parse(name: str) -> tuple[str, int | None]:
    """ "hidden.3" -> ("hidden", 3); "logits" -> ("logits", None). Raises DistillError on anything that is not a tap."""
    kind, _, layer = str(name).partition(".")
    if name in _WHOLE:
        return name, None
    if kind not in _LAYERED:
        raise unknown("tap", name, [*_WHOLE, *(f"{kind}.LAYER" for kind in _LAYERED)])
    try:
        return kind, int(layer)
    except ValueError:
        raise DistillError(f"tap {name!r} needs a layer number, as in '{kind}.-1'") from None


def collect(model: PreTrainedModel, batch: dict, names: Iterable[str]) -> dict[str, Tapped]:
    """One forward pass of `model` over `batch`; returns exactly the tensors that `names` name.

    Keys of the batch that the model does not take (labels, and token types for DistilBERT) are left out. Raises
    DistillError for a layer that the model does not have, a model without a head ("logits") or one that bypasses
    AttentionInterface.
    """
    wanted = {name: parse(name) for name in names}
    layers = model.config.num_hidden_layers
    hidden = {_layer(n, i, layers + 1, model) for n, (kind, i) in wanted.items() if kind in ("hidden", "cls")}
    if any(kind == "embedding" for kind, _ in wanted.values()):
        hidden.add(layers)
    attention = {_layer(n, i, layers, model) for n, (kind, i) in wanted.items() if kind in _PARTS}

    inputs = {key: batch[key] for key in _INPUTS if key in batch and key in inspect.signature(model.forward).parameters}
    recorder = _Recorder(attention)
    outputs = _forward(model, inputs, sorted(hidden), recorder)
    missing = attention - recorder.kept.keys()
    if missing or (attention and recorder.calls != layers):
        raise DistillError(
            f"{type(model).__name__} made {recorder.calls} calls to transformers' AttentionInterface, not {layers}; "
            "taps of q, k and v need one call a layer (BERT, RoBERTa, DistilBERT, ALBERT, MobileBERT and the like)"
        )
    return {n: _pick(n, kind, i, layers, outputs, recorder, batch) for n, (kind, i) in wanted.items()}


def _forward(model, inputs, hidden, recorder):
    config, before = model.config, model.config._attn_implementation
    token = _active.set(recorder)
    try:
        if recorder.layers:
            config._attn_implementation = _ATTENTION
        return model(**inputs, output_hidden_states=hidden or False, return_dict=True)
    finally:
        config._attn_implementation = before
        _active.reset(token)


def _pick(name, kind, i, layers, outputs, recorder, batch) -> Tapped:
    if kind == "logits":
        if "logits" not in outputs:
            raise DistillError(
                f"tap 'logits' needs a model with a head, but this one returns only {', '.join(outputs)}"
            )
        return outputs["logits"]
    if kind == "embedding":
        return mean_pool(outputs["hidden_states"][-1], batch.get("attention_mask"))
    if kind in ("hidden", "cls"):
        state = outputs["hidden_states"][i]
        return state if kind == "hidden" else state[:, 0]
    kept = recorder.kept[i % layers]
    parts = tuple(kept[part] for part in _PARTS[kind])
    return parts if len(parts) > 1 else parts[0]


def _layer(name, i, count, model) -> int:
    if not -count <= i < count:
        raise DistillError(f"tap {name!r}: {type(model).__name__} has layers {-count} to {count - 1} there")
    return i % count


def mean_pool(hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Sentence embeddings of sentence-transformers' MiniLM models: mean over real tokens, then L2. [B, N, D] -> [B,
    D].
    """
    if mask is None:
        mean = hidden.mean(1)
    else:
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean, dim=-1)
