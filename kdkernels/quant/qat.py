"""Quantisation-aware training: `prepare_qat(model)`, train it with anything, `convert(model)` to the kernels.

Forward, a weight is what it will be packed as, to the bit, and the activations are quantised by token, as the kernels
do; backward, rounding counts as the identity (the straight-through estimator) and clipping as clipping. The grid of
zeros and steps is the one that `pack` finds at the start; each scale is that times a trained factor near 1, whose
gradient is then LSQ's (arXiv 1902.08153), and which an optimiser like Adam moves by its learning rate whatever the
scale's magnitude. The parameters keep their names and stay the model's own (tied ones stay tied), so that every trainer
works, DistillTrainer too.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..reference.quant_linear import quantize_rows
from .grid import Grid, grid
from .importance import mean_squares
from .modules import BIAS, QuantEmbedding, QuantLinear
from .pack import encode, find_ranges
from .packed import spread, storable
from .quantize import finish, settle
from .scheme import Scheme


def prepare_qat(
    model: nn.Module,
    scheme: Scheme | str = "int4",
    *,
    bits_per_layer: Mapping[str, int | str | Scheme] | Sequence[int | str | Scheme] | None = None,
    skip: Sequence[str] = (),
) -> nn.Module:
    """Makes a model train with the weights and activations that it will have once quantised. In place.

    Arguments and errors are those of `kdkernels.quantize`; the same layers get the same schemes. Train the result as
    you would the model, then call `convert`.

    Returns: the model, in the mode (train or eval) that it was in. Its state dict has three entries more a layer:
        `factor` (trained), and the buffers `scales` and `steps` or `zeros`.
    """
    settings = settle(model, scheme, bits_per_layer, skip)
    modules = {name: model.get_submodule(name) for name in settings.layers}
    training = model.training
    importance = mean_squares(model.eval(), [name for name, module in modules.items() if isinstance(module, nn.Linear)])
    for name, module in modules.items():
        kind = FakeQuantLinear if isinstance(module, nn.Linear) else FakeQuantEmbedding
        model.set_submodule(name, kind.of(module, settings.layers[name], importance.get(name)))
    model._kdkernels_qat = settings
    return model.train(training)


def convert(model: nn.Module) -> nn.Module:
    """What `prepare_qat` prepared and some training changed becomes a quantised model, as `kdkernels.quantize` returns.

    Its weights are bit for bit those that the last forward used. In place; in eval mode.
    Raises ValueError if the model was not prepared.
    """
    settings = getattr(model, "_kdkernels_qat", None)
    if settings is None:
        raise ValueError("model was not prepared: convert takes what prepare_qat returned")
    for name in settings.layers:
        model.set_submodule(name, model.get_submodule(name).quantised())
    del model._kdkernels_qat
    return finish(model.eval(), settings)


class _FakeQuantized:
    """A module whose `weight` is used as if it were packed."""

    def _set_up(self, module: nn.Module, scheme: Scheme, importance: torch.Tensor | None) -> None:
        self.scheme, self.weight = scheme, module.weight
        scales, zeros, steps = find_ranges(module.weight, scheme, importance)
        self.factor = nn.Parameter(torch.ones_like(scales))
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("steps", steps)
        self.train(module.training)

    def _ranges(self) -> torch.Tensor:
        """The trained scales. A factor that training drove to 0 or beyond leaves a grid so narrow that it is 0."""
        scales = self.scales * self.factor.float().clamp_min(1e-6)
        return _StraightThrough.apply(scales, storable(scales.detach()))

    def _grid(self) -> Grid:
        return grid(self.scheme, self.zeros, self.steps, self.weight.shape)

    def _packed(self) -> torch.Tensor:
        with torch.no_grad():
            return encode(self.weight, self.scheme, self._ranges(), self.zeros, self.steps, prepare=False).blob


class FakeQuantLinear(_FakeQuantized, nn.Linear):
    """A linear layer that computes what QuantLinear will, differentiably."""

    @classmethod
    def of(cls, module: nn.Linear, scheme: Scheme, importance: torch.Tensor | None) -> "FakeQuantLinear":
        self = cls(module.in_features, module.out_features, bias=False, device="meta")
        self._set_up(module, scheme, importance)
        self.bias = module.bias
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scales = spread(self._ranges(), self.scheme, *self.weight.shape)
        values = _values(self.weight.float(), scales, self._grid())
        if self.scheme.activation_bits is None:
            weight = values * scales
        elif self.scheme.group == "in":  # the kernels multiply the scales of columns into the activations
            x, weight = _fake_quantize_rows(x * scales), values
        else:
            x, weight = _fake_quantize_rows(x), values * scales
        return F.linear(x, weight.to(x.dtype), self._rounded_bias())

    def _rounded_bias(self) -> torch.Tensor | None:
        if self.bias is None:
            return None
        return _StraightThrough.apply(self.bias, self.bias.detach().to(BIAS).to(self.bias.dtype))

    def quantised(self) -> QuantLinear:
        made = QuantLinear.like(self, self.scheme)
        made.packed = self._packed()
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().to(BIAS, copy=True), requires_grad=False)
        return made


class FakeQuantEmbedding(_FakeQuantized, nn.Embedding):
    """An embedding that gives the rows that QuantEmbedding will, differentiably."""

    @classmethod
    def of(cls, module: nn.Embedding, scheme: Scheme, importance: None) -> "FakeQuantEmbedding":
        self = cls(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx, device="meta")
        self._set_up(module, scheme, importance)
        return self

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows are looked up first, and only those are quantised, each with its own scales and grid."""
        flat = ids.flatten()
        rows = super().forward(flat)

        def looked_up(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.view(self.num_embeddings, -1)[flat]

        zeros, steps = looked_up(self.zeros), looked_up(self.steps)
        scales = spread(looked_up(self._ranges()).flatten(), self.scheme, *rows.shape)
        levels = grid(self.scheme, None if zeros is None else zeros.flatten(), steps, rows.shape)
        return (_values(rows.float(), scales, levels) * scales).to(rows.dtype).view(*ids.shape, -1)

    def quantised(self) -> QuantEmbedding:
        made = QuantEmbedding.like(self, self.scheme)
        made.packed = self._packed()
        return made


def _values(weight: torch.Tensor, scales: torch.Tensor, levels: Grid) -> torch.Tensor:
    """unit * code - offset: integers forward; backward the identity of weight / scales where that is within range."""
    ratio = weight / scales
    ends = (levels.unit * code - levels.offset for code in (levels.least, levels.most))
    return _StraightThrough.apply(ratio.clamp(*ends), levels.unit * levels.codes(ratio.detach()) - levels.offset)


def _fake_quantize_rows(x: torch.Tensor) -> torch.Tensor:
    """What is left of x when each row is quantised as `kdkernels.quant.linear` does; backward the identity."""
    with torch.no_grad():
        codes, scale = quantize_rows(x)
    return _StraightThrough.apply(x, (codes * scale).to(x.dtype))


class _StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(_ctx, _given, rounded):
        return rounded.clone()

    @staticmethod
    def backward(_ctx, gradient):
        return gradient, None
