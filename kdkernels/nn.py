"""The losses as modules: options at construction, tensors at the call."""

import inspect

from torch import nn

from . import functional


def _module(name: str, function) -> type[nn.Module]:
    """An nn.Module around `function`: its keyword-only arguments may be given at construction, at the call, or both."""
    options = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def __init__(self, **given):
        nn.Module.__init__(self)
        for option in given:
            if option not in options:
                raise TypeError(f"{name} got the unknown option {option!r}; accepted: {', '.join(options)}")
        self.options = given

    def forward(self, *tensors, **given):
        return function(*tensors, **{**self.options, **given})

    def extra_repr(self) -> str:
        return ", ".join(f"{option}={value!r}" for option, value in self.options.items())

    doc = f"`kdkernels.functional.{function.__name__}` as a module.\n\n{inspect.getdoc(function)}"
    members = {"__init__": __init__, "forward": forward, "extra_repr": extra_repr, "__doc__": doc}
    return type(name, (nn.Module,), {**members, "__module__": __name__})


KdLoss = _module("KdLoss", functional.kd_loss)
LinearKdLoss = _module("LinearKdLoss", functional.linear_kd_loss)
TopkKdLoss = _module("TopkKdLoss", functional.topk_kd_loss)
AttentionKl = _module("AttentionKl", functional.attention_kl)
AttentionMse = _module("AttentionMse", functional.attention_mse)
AttentionMapKl = _module("AttentionMapKl", functional.attention_map_kl)
AttentionMapMse = _module("AttentionMapMse", functional.attention_map_mse)
RelationKl = _module("RelationKl", functional.relation_kl)
HiddenMse = _module("HiddenMse", functional.hidden_mse)
HiddenCosine = _module("HiddenCosine", functional.hidden_cosine)
GramMse = _module("GramMse", functional.gram_mse)
MomentMse = _module("MomentMse", functional.moment_mse)

__all__ = [
    "AttentionKl",
    "AttentionMapKl",
    "AttentionMapMse",
    "AttentionMse",
    "GramMse",
    "HiddenCosine",
    "HiddenMse",
    "KdLoss",
    "LinearKdLoss",
    "MomentMse",
    "RelationKl",
    "TopkKdLoss",
]
