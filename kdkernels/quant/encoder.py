"""The padding-free encoder: the real tokens of a batch run end to end, nothing is computed for padding.

A supported base model (architectures.py) gets the class `PaddingFree` in front of its own. Its forward packs the real
tokens [T, D], runs the blocks on them, and lays the result back into [B, N, D] with zeros at padding, so that every
head of transformers works on it as before. What it can't do (NOT_PACKED) goes through the model's own forward, on the
same quantised linears.
"""

import functools
import inspect

import torch
import torch.nn.functional as F
from torch import nn

from .. import reference
from .._load import serves
from ..ops.quant_linear import ACTIVATION
from ..ops.varlen_attention import CUDA_HEAD_SIZE
from . import architectures
from .linear import linear, refuse_gradient
from .modules import QuantLinear

# What the packed forward understands; anything else that is given and not None or False asks for the model's own.
_PLAIN = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
    "return_dict",
    "output_hidden_states",
}
NOT_PACKED = (
    "an attention_mask that is not [batch, tokens], output_attentions, any argument but "
    f"{', '.join(sorted(_PLAIN))}, and training mode"
)


def why_not(base: nn.Module) -> str:
    """Why this base model can't run on packed tokens; empty if it can."""
    if reason := architectures.unsupported(base):
        return reason
    quantised = all(isinstance(linear, QuantLinear) for block in architectures.blocks(base) for linear in block.linears)
    return "" if quantised else "some linears of its blocks are not quantised"


def attach(base: nn.Module) -> None:
    """Puts `PaddingFree` in front of the class of a base model that can run on packed tokens."""
    if not isinstance(base, PaddingFree) and not why_not(base):
        base.__class__ = _padding_free(type(base))


@functools.cache
def _padding_free(own: type) -> type:
    """`PaddingFree` in front of a class, under its name: save_pretrained writes that into config.json.

    Its forward has the signature of the class's own, from which sentence-transformers, for one, learns what to give.
    """
    names = tuple(inspect.signature(own.forward).parameters)[1:]

    @functools.wraps(own.forward)
    def forward(self, *values, **given):
        if twice := given.keys() & set(names[: len(values)]):
            raise TypeError(f"{own.__name__}.forward() got multiple values for argument {min(twice)!r}")
        return self.encode(**dict(zip(names, values, strict=False)), **given)

    return type(own.__name__, (PaddingFree, own), {"__module__": own.__module__, "forward": forward})


def _restore(own: type) -> nn.Module:
    """An empty module of the class with `PaddingFree` in front: what a copy or a pickle is filled into."""
    made = _padding_free(own)
    return made.__new__(made)


def attach_all(model: nn.Module) -> None:
    """`attach` for every base model inside."""
    for module in list(model.modules()):
        if architectures.is_base(module):
            attach(module)


def keeps_room(device: torch.device) -> bool:
    """Whether packed tokens keep room for as many as there are with padding: where the host would have to wait to learn
    their number, and a CUDA graph replays on batches with other lengths."""
    return device.type != "cpu"


class PackedTokens:
    """Which tokens of [batch, length] are real, and the way there and back.

    `lengths` are cumulated as varlen attention takes them: sequence b is tokens [cumulative[b], cumulative[b + 1]).
    Where room is kept, pack returns batch * length rows; what those from cumulative[-1] on hold does not matter.
    """

    def __init__(self, like: torch.Tensor, mask: torch.Tensor | None):
        self.shape = tuple(like.shape[:2])
        self.index = self.place = self.padding = None
        batch, length = self.shape
        if mask is None:
            bounds = {"dtype": torch.int32, "device": like.device}
            self.cumulative = torch.arange(0, batch * length + 1, max(length, 1), **bounds)
            return
        real = mask.bool().expand(self.shape)
        self.cumulative = F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        real = real.flatten()
        if keeps_room(like.device):
            count = batch * length
            self.padding, place = ~real, real.cumsum(0) - 1
            index = place.new_zeros(count + 1)  # one more, which padding is sent to
            every = torch.arange(count, device=real.device)
            self.index = index.scatter_(0, place.masked_fill(self.padding, count), every)[:count]
            self.place = place.clamp(min=0)
        else:
            self.index = real.nonzero().squeeze(1)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, ...] -> [T, ...]"""
        x = x.expand(*self.shape, *x.shape[2:]).flatten(0, 1)
        return x if self.index is None else x.index_select(0, self.index)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [B, N, D], 0 at padding"""
        if self.place is not None:
            x = x.index_select(0, self.place).masked_fill_(self.padding[:, None], 0)
        elif self.index is not None:
            x = x.new_zeros(self.shape[0] * self.shape[1], x.shape[1]).index_copy_(0, self.index, x)
        return x.view(*self.shape, x.shape[1])


class PaddingFree:
    """In front of a base model's own class: its forward on packed tokens."""

    def encode(self, input_ids=None, attention_mask=None, **given):
        """What the class's own forward gives for these arguments."""
        if not self._runs_packed(input_ids, attention_mask, given):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **given)
        embeds = given.get("inputs_embeds")
        tokens = PackedTokens(input_ids if embeds is None else embeds, attention_mask)
        x = self._embed(tokens, input_ids, embeds, given.get("token_type_ids"), given.get("position_ids"))
        keep_all = self._option("output_hidden_states", given)
        states = run_blocks(x, tokens.cumulative, architectures.blocks(self), self.config, keep_all)
        hidden = tuple(tokens.unpack(state) for state in (x, *states)) if keep_all else None
        last = tokens.unpack([x, *states][-1]) if hidden is None else hidden[-1]
        output = architectures.output(self, last, hidden)
        return output if self._option("return_dict", given) else output.to_tuple()

    def __reduce__(self):
        return _restore, (type(self).__mro__[2],), self.__dict__

    def _option(self, name: str, given: dict) -> bool:
        value = given.get(name)
        return getattr(self.config, name) if value is None else value

    def _runs_packed(self, input_ids, attention_mask, given: dict) -> bool:
        extra = any(value is not None and value is not False for name, value in given.items() if name not in _PLAIN)
        embeds = given.get("inputs_embeds")
        if extra or self.training or self.config.output_attentions or (input_ids is None) == (embeds is None):
            return False
        batch, length = (input_ids if embeds is None else embeds).shape[:2]
        return attention_mask is None or tuple(attention_mask.shape) in ((batch, length), (1, length))

    def _embed(self, tokens: PackedTokens, ids, embeds, token_types, positions) -> torch.Tensor:
        """[T, D]: the model's own embeddings, on the real tokens as one sequence."""
        if positions is None:
            positions = architectures.positions(self, ids, tokens.shape, tokens.cumulative.device)
        given = {"position_ids": tokens.pack(positions)[None]}
        if embeds is not None:
            given["inputs_embeds"] = tokens.pack(embeds)[None]
        if token_types is not None:
            given["token_type_ids"] = tokens.pack(token_types)[None]
        x = self.embeddings(input_ids=None if ids is None else tokens.pack(ids)[None], **given)
        return architectures.widen(self, x).squeeze(0)


def run_blocks(x: torch.Tensor, cumulative: torch.Tensor, blocks: list, config, keep_all: bool) -> list[torch.Tensor]:
    """The blocks on packed tokens [T, D]: the state behind each of them, or behind the last."""
    if why_not_fused(x, blocks, config):
        states = []
        for block in blocks:
            x = run_block(x, cumulative, block, config)
            states = [*states, x] if keep_all else [x]
        return states
    refuse_gradient(x)
    norms = [norm for block in blocks for norm in (block.attention_norm, block.output_norm)]
    states = torch.ops.kdkernels.encoder(
        x.contiguous(),
        cumulative,
        [part.weight.prepared for block in blocks for part in block.linears],
        [part.bias for block in blocks for part in block.linears],
        [parameter for norm in norms for parameter in (norm.weight, norm.bias)],
        config.num_attention_heads,
        ACTIVATION[architectures.activation(config)],
        norms[0].eps,
        keep_all,
        [part.weight.layout for block in blocks for part in block.linears],
    )
    return list(states.unbind(0))


_FUSED_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


def why_not_fused(x: torch.Tensor, blocks: list[architectures.Block], config) -> str:
    """Why one call of the kernels can't run the blocks on x, and they run call by call; empty if it can."""
    dtypes, device = _FUSED_DTYPES.get(x.device.type, ()), x.device.type
    if not blocks:
        return "there are none"
    if not serves("encoder", x.device):
        return f"no kernel serves {device} here"
    if x.dtype not in dtypes:
        return f"activations are {x.dtype}, not {' or '.join(map(str, dtypes))}"
    if device == "cuda" and blocks[0].query.out_features > config.num_attention_heads * CUDA_HEAD_SIZE:
        return f"heads have more than {CUDA_HEAD_SIZE} features"
    eps = blocks[0].output_norm.eps
    for block in blocks:
        scheme = block.query.scheme
        if block.key.scheme != scheme or block.value.scheme != scheme:
            return "queries, keys and values have several schemes"
        for part in block.linears:
            if part.scheme.activation_bits != 8 or part.scheme.group == "in":
                return "activations are not quantised" if part.scheme.activation_bits != 8 else "groups are columns"
            if part.bias is None:
                return "a linear has no bias"
            if part.weight.prepared is None:
                return "products are torch's, of unpacked weights"
        for norm in (block.attention_norm, block.output_norm):
            if norm.eps != eps or norm.bias is None or norm.weight.dtype not in dtypes:
                return "its norms differ in eps, have no bias or another dtype"
    return ""


def run_block(
    x: torch.Tensor, cumulative: torch.Tensor, block: architectures.Block, config, between: torch.dtype | None = None
) -> torch.Tensor:
    """One block on packed tokens [T, D] -> [T, D], call by call: the truth that the fused encoder is held against.

    `between`: what queries, keys, values, their context and the inner activations are rounded to, bfloat16 in the fused
    encoder on the CPU; None: x's own.
    """
    between = between or x.dtype
    q, k, v = (linear(x, part.weight, part.bias).to(between) for part in (block.query, block.key, block.value))
    heads = config.num_attention_heads
    size = q.shape[1] // heads
    ours = x.dtype != torch.float64 and serves("varlen_attention", x.device)
    ours = ours and (x.device.type == "cpu" or size <= CUDA_HEAD_SIZE)
    attention = torch.ops.kdkernels.varlen_attention if ours else reference.varlen_attention
    context = attention(q, k, v, cumulative, heads, size**-0.5)
    a = block.attention_norm(linear(context.to(x.dtype), block.output.weight, block.output.bias, residual=x))
    inner = linear(a, block.up.weight, block.up.bias, activation=architectures.activation(config)).to(between)
    return block.output_norm(linear(inner.to(x.dtype), block.down.weight, block.down.bias, residual=a))
