"""Schedules: functions step -> float, accepted wherever a match or an option takes a number.

Each is a frozen dataclass, so that a recipe stays data and prints itself. `step` is the optimiser step of the running
stage.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from .errors import DistillError, unknown

Number = float | Callable[[int], float]


@dataclass(frozen=True)
class Linear:
    """`start` until step `begin`, then a straight line that reaches `end` after `steps` more, then `end`."""

    start: float
    end: float
    steps: int
    begin: int = 0

    def __call__(self, step: int) -> float:
        done = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class Cosine:
    """As Linear, along half a cosine wave."""

    start: float
    end: float
    steps: int
    begin: int = 0

    def __call__(self, step: int) -> float:
        done = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Piecewise:
    """values[i] from step boundaries[i - 1] on; one value more than boundaries. As a gate it picks phases of a
    training.
    """

    boundaries: tuple[int, ...]
    values: tuple[float, ...]

    def __call__(self, step: int) -> float:
        return float(self.values[sum(step >= boundary for boundary in self.boundaries)])


SCHEDULES = {"linear": Linear, "cosine": Cosine, "piecewise": Piecewise}


def at(number: Number, step: int) -> float:
    """The value of a number or a schedule at a step."""
    return number(step) if callable(number) else number


def from_config(value):
    """A YAML value with every `{linear: {start: 1, end: 0, steps: 100}}` in it replaced by its schedule."""
    if isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value.values())), dict):
        ((name, arguments),) = value.items()
        if name not in SCHEDULES:
            raise unknown("schedule", name, SCHEDULES)
        try:
            schedule = SCHEDULES[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()})
            schedule(0)
        except (TypeError, IndexError, ZeroDivisionError) as error:
            raise DistillError(f"schedule {name!r}: {error}") from error
        return schedule
    return value
