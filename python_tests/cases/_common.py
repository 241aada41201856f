"""What the tables share."""

import torch

from ..case import Case

BFLOAT16 = (torch.bfloat16, torch.bfloat16)
KIB = 1024


def case_of(op, name, why, shape, given) -> Case:
    """`given`: fields of Case by name; whatever else it holds are options of the op."""
    of_case = {key: given.pop(key) for key in ("mask", "layout", "spread", "near") if key in given}
    return Case(op, name, why, shape, given, **of_case)
