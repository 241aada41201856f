"""A thin trainer: taps, matches, sources, schedules, surgery and stages around transformers.Trainer."""

from .errors import DistillError
from .matches import Match
from .schedules import Cosine, Linear, Piecewise
from .sources import Cached, Frozen, Mean, Peers, SelfBranch, Snapshot, Source
from .stages import Group, Recipe, Stage
from .surgery import fresh, set_dropout, take_layers
from .trainer import DistillTrainer

__all__ = [
    "Cached",
    "Cosine",
    "DistillError",
    "DistillTrainer",
    "Frozen",
    "Group",
    "Linear",
    "Match",
    "Mean",
    "Peers",
    "Piecewise",
    "Recipe",
    "SelfBranch",
    "Snapshot",
    "Source",
    "Stage",
    "fresh",
    "set_dropout",
    "take_layers",
]
