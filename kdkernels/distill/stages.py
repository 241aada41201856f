"""Stages and recipes: a stage is what one training run optimises, a recipe is surgery and then stages. Both are
data.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback

from .errors import DistillError
from .matches import OPS, Match
from .sources import Source


@dataclass(frozen=True)
class Group:
    """Optimiser settings of the parameters whose name matches `pattern` (a regular expression, searched; first group
    wins).

    Names start with "student.", "projections." or "companions.". lr and weight_decay replace the trainer's; freeze
    excludes.
    """

    pattern: str
    lr: float | None = None
    weight_decay: float | None = None
    freeze: bool = False

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise DistillError(f"group pattern {self.pattern!r} is not a regular expression: {error}") from error


@dataclass(frozen=True)
class Stage:
    """One training run: data, source, matches, optimiser groups, hooks.

    data: a data set of encoded examples, source: where the teacher's tensors come from; the runner fills both.
    matches: the loss.
    groups: optimiser groups. hooks: transformers callbacks. training: settings of transformers.TrainingArguments that
    belong to the recipe (a config may override them), and `epochs`.
    """

    name: str
    matches: Sequence[Match]
    source: Source | None = None
    data: Sequence | None = None
    groups: Sequence[Group] = ()
    hooks: Sequence[TrainerCallback] = ()
    training: dict = field(default_factory=dict)

    def __post_init__(self):
        if not self.matches:
            raise DistillError(f"stage {self.name!r} has no matches, so nothing to optimise")

    @property
    def student_taps(self) -> list[str]:
        return sorted({tap for match in self.matches for tap in match.student_taps})

    @property
    def teacher_taps(self) -> list[str]:
        return sorted({tap for match in self.matches for tap in match.teacher_taps})

    @property
    def needs_labels(self) -> bool:
        return any(match.options.get("labels") or match.mask == "labels" for match in self.matches)

    def projections(self, student: PreTrainedConfig) -> nn.ModuleDict:
        """The Linears that the matches name, newly initialised."""
        names = sorted({match.projection for match in self.matches if match.projection})
        teacher = self.source.config or student
        return nn.ModuleDict({name: nn.Linear(student.hidden_size, teacher.hidden_size) for name in names})

    def objective(self) -> str:
        """The loss as text: one line a match, then the formula of each op."""
        lines = [f"  loss = {self.matches[0]}", *(f"       + {match}" for match in self.matches[1:])]
        return "\n".join(
            lines + [f"  {op}: {OPS[op].formula}" for op in dict.fromkeys(match.op for match in self.matches)]
        )


@dataclass(frozen=True)
class Recipe:
    """surgery: functions model -> model, applied to a copy of the teacher to make the student. head: the student has a
    task head.
    """

    name: str
    stages: Sequence[Stage]
    surgery: Sequence[Callable[[PreTrainedModel], PreTrainedModel]] = ()
    head: bool = False

    def student(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """Applies the surgery."""
        model = teacher
        for operation in self.surgery:
            model = operation(model)
        return model.requires_grad_(True)

    def objective(self) -> str:
        """What this recipe minimises, as text."""
        lines = [f"{self.name}: {len(self.stages)} stage{'s' if len(self.stages) > 1 else ''}"]
        for number, stage in enumerate(self.stages, 1):
            lines += [f" stage {number} {stage.name}", stage.objective()]
        return "\n".join(lines)


def options_of(recipe: Callable[..., Recipe]) -> dict[str, inspect.Parameter]:
    """The options that a recipe function takes: its keyword-only parameters."""
    parameters = inspect.signature(recipe).parameters.items()
    return {name: p for name, p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
