"""The one table of cases: tests check every row of `CASES`, benches time every row of `BENCHES`.

Small odd shapes on purpose: 1 token, 1 class, one more or less than a vector or a tile, head sizes 6, 8, 12, 26 and
80. The bench rows and their targets are the project's goals, stated once, beside the cases: each CPU row stands once
more with bfloat16 inputs, which must be no slower, and CUDA rows have bfloat16 inputs.
"""

from dataclasses import replace

from ..case import OPS, Case, Target
from ..steps import STEPS
from . import attention, attention_map, hidden, logits, steps
from ._common import BFLOAT16

CASES = [
    *logits.KD_LOSS,
    *logits.LINEAR_KD_LOSS,
    *logits.TOPK_KD_LOSS,
    *attention.ATTENTION_KL,
    *attention.ATTENTION_MSE,
    *attention.RELATION_KL,
    *attention_map.ATTENTION_MAP_MSE,
    *attention_map.ATTENTION_MAP_KL,
    *hidden.HIDDEN_MSE,
    *hidden.HIDDEN_COSINE,
    *hidden.MOMENT_MSE,
    *hidden.GRAM_MSE,
]

_CPU = [*logits.CPU, *attention.CPU, *attention_map.CPU, *hidden.CPU, *steps.CPU]
_CUDA = [*logits.CUDA, *attention.CUDA, *attention_map.CUDA, *hidden.CUDA, *steps.CUDA]

BENCHES = [
    *(replace(case, target=target) for case, target in _CPU),
    *(replace(case, name=f"{case.name}_bf16", dtypes=BFLOAT16, target=Target(float32=1)) for case, _ in _CPU),
    *(replace(case, dtypes=BFLOAT16, device="cuda", target=target) for case, target in _CUDA),
]


def of(*ops: str, table: list[Case] = CASES) -> list[Case]:
    """The rows of some ops or steps, in the table's order."""
    known = (*OPS, *STEPS)
    unknown = set(ops) - set(known)
    if unknown:
        raise ValueError(f"unknown op {', '.join(sorted(unknown))}; the table has {', '.join(known)}")
    return [case for case in table if case.op in (ops or known)]
