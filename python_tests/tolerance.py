"""How accurate is accurate enough: never a guessed constant, always what eager PyTorch loses on the same inputs.

Truth is the reference in float64 on the very inputs that the op got. For float32 inputs the error may be twice that
of natural eager code in float32, for bfloat16 and float16 inputs no more than eager's in that dtype. Both errors are
the worst over a few seeds, so that a lucky exact result of eager on one number does not fail us, and a lucky one of
ours does not save us. What any result may lose is the rounding of the output itself and a few units in the last place
of float32.
"""

import math
from dataclasses import dataclass

import torch

import kdkernels.functional
import kdkernels.reference
from benches.peers import eager

from .case import Call, Case, evaluate
from .steps import loss_of

# Where student and teacher are near one another the result is mostly rounding: chance needs more draws to even out.
SEEDS, SEEDS_NEAR = range(4), range(12)
ULPS = 4
# Below this a gradient is noise of the arithmetic: terms are of order 1, and float32 resolves 1e-7 of them.
TINY = 1e-14


@dataclass
class Error:
    """Of one output: the largest and the root-mean-square deviation from truth, and the largest magnitude of truth."""

    largest: float = 0.0
    rms: float = 0.0
    scale: float = 0.0


def error(got: torch.Tensor, truth: torch.Tensor) -> Error:
    if got.shape != truth.shape:
        raise AssertionError(f"shape {list(got.shape)}, expected {list(truth.shape)}")
    if truth.numel() == 0:
        return Error()
    # Equal infinities are no error.
    difference = torch.where(got.double() == truth, 0, got.double() - truth)
    return Error(difference.abs().max().item(), difference.square().mean().sqrt().item(), truth.abs().max().item())


def errors(function, call: Call, truth) -> list[Error]:
    """Of the loss and of each gradient."""
    loss, gradients = evaluate(function, call)
    return [error(got, true) for got, true in zip([loss, *gradients], [truth[0], *truth[1]], strict=True)]


def truth_of(op: str, call: Call):
    """The loss and gradients in float64."""
    return evaluate(loss_of(kdkernels.reference, op), call.to(torch.float64))


def violations(case: Case, dtypes: tuple | None = None, device: str = "cpu", seeds=None, function=None) -> list[str]:
    """One line per output that is less accurate than allowed; empty if all is well."""
    function = function or getattr(kdkernels.functional, case.op)
    ours, peers = [], []
    for seed in seeds or (SEEDS if case.near is None else SEEDS_NEAR):
        call = case.make(seed, dtypes, device)
        truth = truth_of(case.op, call)
        ours.append(errors(function, call, truth))
        peers.append(_yardstick(case.op, call, truth))
    return _excess(call, ours, peers)


def beside(peer, function, make) -> list[str]:
    """As `violations`, of `function` beside plain code with the same arguments, whose float64 run is the truth.

    `make(seed)` gives the call. A truth of 0, NaN or infinity would check little and is an error of the test.
    """
    ours, peers = [], []
    for seed in SEEDS:
        call = make(seed)
        truth = evaluate(peer, call.to(torch.float64))
        if not (truth[0].isfinite().all() and truth[0].any() and all(x.isfinite().all() for x in truth[1])):
            raise AssertionError(f"seed {seed}: the truth is {truth[0]}")
        ours.append(errors(function, call, truth))
        peers.append(errors(peer, call, truth))
    return _excess(call, ours, peers)


def _excess(call: Call, ours: list[list[Error]], peers: list[list[Error]]) -> list[str]:
    """One line per output whose worst error over the seeds is more than the peer's allows; `call` tells the dtypes."""
    single = torch.float32 in {x.dtype for x in call.leaves + call.teachers}
    outputs = [("loss", torch.float32), *((f"gradient {i}", leaf.dtype) for i, leaf in enumerate(call.leaves))]
    found = []
    for (name, stored), mine, peer in zip(outputs, _worst(ours), _worst(peers), strict=True):
        floor = ULPS * torch.finfo(torch.float32).eps * mine.scale + TINY
        if stored != torch.float32:
            floor += torch.finfo(stored).eps / 2 * mine.scale
        for measure in ("largest", "rms"):
            got, allowed = getattr(mine, measure), (2 if single else 1) * getattr(peer, measure) + floor
            if not got <= allowed:
                found.append(
                    f"{name}: {measure} error {got:.2e} > allowed {allowed:.2e} (eager {getattr(peer, measure):.2e}, "
                    f"magnitude {mine.scale:.2e})"
                )
    return found


def _yardstick(op: str, call: Call, truth) -> list[Error]:
    """The errors of eager code; where that overflows to NaN, of the careful reference in float32."""
    peer = errors(eager.VARIANTS[op][0], call, truth)
    return (
        peer if all(math.isfinite(e.largest) for e in peer) else errors(getattr(kdkernels.reference, op), call, truth)
    )


def _worst(seeds: list[list[Error]]) -> list[Error]:
    """Of several seeds, per output; a NaN stays."""
    values = torch.tensor([[(e.largest, e.rms, e.scale) for e in outputs] for outputs in seeds], dtype=torch.float64)
    return [Error(*output) for output in values.amax(0).tolist()]
