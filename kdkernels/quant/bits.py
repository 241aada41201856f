"""`allocate_bits`: which layers get how many bits, for the least total sensitivity within a budget of bytes.

A choice of one option per layer under one budget is the multiple-choice knapsack problem. Layers of an encoder come in
few shapes, so that in units of the greatest common divisor of all sizes the budget is small, and dynamic programming
over it is exact and quick: after each layer, the least sensitivity for every number of bytes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sensitivity:
    """What a layer costs at each number of bits.

    Args:
        loss: {bits: the rise of the loss that is expected}.
        nbytes: {bits: bytes of the packed weight}, of the same bits.
    """

    loss: Mapping[int, float]
    nbytes: Mapping[int, int]


def allocate_bits(sensitivity: Mapping[str, Sensitivity], *, budget: int) -> dict[str, int]:
    """The bits of each layer for which the sum of `loss` is least and the sum of `nbytes` at most `budget`, exactly.

    Args:
        sensitivity: {layer: Sensitivity}, as `hessian_sensitivity` gives it.
        budget: bytes for the weights of these layers together (embeddings and the rest of a model come on top).

    Returns: {layer: bits}, to be given to `kdkernels.quantize` or `prepare_qat` as bits_per_layer.
    Raises TypeError or ValueError naming the argument: a budget below what the layers take at their fewest bits, a loss
        that is not finite.
    """
    if not sensitivity:
        raise ValueError("sensitivity must name at least one layer")
    for name, layer in sensitivity.items():
        if not layer.loss or layer.loss.keys() != layer.nbytes.keys():
            raise ValueError(f"sensitivity of {name} must give loss and nbytes for the same numbers of bits")
        if not all(math.isfinite(loss) for loss in layer.loss.values()):
            raise ValueError(f"sensitivity of {name} must have finite losses, got {dict(layer.loss)}")
    if not isinstance(budget, (int, float)):
        raise TypeError(f"budget must be a number of bytes, got {type(budget).__name__}")
    least, most = (sum(pick(layer.nbytes.values()) for layer in sensitivity.values()) for pick in (min, max))
    if not budget >= least:
        raise ValueError(f"budget must be at least {least} bytes, the layers at their fewest bits; got {budget}")
    unit = math.gcd(*(size for layer in sensitivity.values() for size in layer.nbytes.values()))
    best = np.full(int(min(budget, most)) // unit + 1, np.inf)
    best[0] = 0.0
    chosen = []
    for layer in sensitivity.values():
        options = sorted(layer.loss)
        totals = np.full((len(options), len(best)), np.inf)
        for total, bits in zip(totals, options, strict=True):
            size = layer.nbytes[bits] // unit
            total[size:] = best[: len(best) - size] + layer.loss[bits]
        chosen.append(totals.argmin(0).astype(np.uint8))
        best = totals.min(0)
    return _trace_back(sensitivity, chosen, int(best.argmin()), unit)


def _trace_back(sensitivity: Mapping[str, Sensitivity], chosen: list, at: int, unit: int) -> dict[str, int]:
    found = {}
    for (name, layer), choice in zip(reversed(sensitivity.items()), reversed(chosen), strict=True):
        found[name] = sorted(layer.loss)[choice[at]]
        at -= layer.nbytes[found[name]] // unit
    return {name: found[name] for name in sensitivity}
