"""The one error type that users of the trainer see: a single line that names what is wrong and what is accepted."""

import difflib
from collections.abc import Iterable


class DistillError(ValueError):
    """Bad input to a distillation: a config, a file, a checkpoint, a tap or a pair of models that do not fit."""


def unknown(what: str, given: str, accepted: Iterable[str]) -> DistillError:
    """The error for a name outside a closed list, with the nearest accepted name as a hint."""
    accepted = sorted(accepted)
    near = difflib.get_close_matches(str(given), accepted, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return DistillError(f"unknown {what} {given!r}{hint}; accepted: {', '.join(accepted)}")
