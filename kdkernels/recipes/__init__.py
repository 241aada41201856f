"""Published distillation systems as data: a function of the teacher's config that returns surgery and stages."""

from .hinton import hinton
from .minilm import minilm
from .tinybert import tinybert

RECIPES = {"hinton": hinton, "minilm": minilm, "tinybert": tinybert}

__all__ = ["RECIPES", "hinton", "minilm", "tinybert"]
