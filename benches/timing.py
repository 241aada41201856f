"""Forward and backward of several implementations, timed in turns so that noise of the machine hits all of them alike.

A sample is one loss and one `backward` with an upstream gradient other than 1; `.grad` is cleared between samples,
outside of the clock, so that every implementation allocates and writes the gradient anew, as after
`optimizer.zero_grad()`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from python_tests.case import Call, upstream

# Samples of a round add up to about this, so that small cases are not lost in the clock's jitter.
ROUND_SECONDS = 0.02
L2_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Runner:
    """One implementation on its inputs."""

    name: str
    function: Callable
    call: Call


def sampler(runner: Runner) -> Callable[[], float]:
    """A function that runs forward and backward once and returns the seconds that it took."""
    leaves, arguments = runner.call.leaves, runner.call.arguments
    with torch.no_grad():
        gradient = upstream(runner.function(**arguments))
    device = leaves[0].device
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    def on_cpu() -> float:
        clear()
        start = time.perf_counter()
        runner.function(**arguments).backward(gradient)
        return time.perf_counter() - start

    def on_cuda() -> float:
        clear()
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        runner.function(**arguments).backward(gradient)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return on_cuda if flush is not None else on_cpu


def quick(runner: Runner, samples: int = 3) -> float:
    """A rough time after warming up, to choose between variants of a peer."""
    sample = sampler(runner)
    sample()
    return median(sample() for _ in range(samples))


def interleaved(runners: list[Runner], seconds: float, least: int = 5, most: int = 40) -> dict[str, list[float]]:
    """Seconds per round of each runner, as `in_turns` has them."""
    return in_turns({runner.name: sampler(runner) for runner in runners}, seconds, least, most)


def in_turns(
    samplers: dict[str, Callable[[], float]], seconds: float, least: int = 5, most: int = 40
) -> dict[str, list[float]]:
    """{name: [one value a round]}: as many rounds as fit into `seconds`, within limits.

    Within a round each sampler gives the median of several samples.
    """
    rough = {}
    for name, sample in samplers.items():
        sample()
        rough[name] = min(sample() for _ in range(2))
    repeats = {name: max(1, min(200, round(ROUND_SECONDS / t))) for name, t in rough.items()}
    round_seconds = sum(repeats[name] * t for name, t in rough.items())
    rounds = max(least, min(most, int(seconds / round_seconds)))
    times = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sample in samplers.items():
            times[name].append(median(sample() for _ in range(repeats[name])))
    return times


def spread(samples: list[float]) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile."""
    fifths = quantiles(samples, n=5, method="inclusive")
    return fifths[0], median(samples), fifths[3]
