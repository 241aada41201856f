"""`python -m benches.run quant_linear`: products with quantised weights, as shares of the machine's int8 ceiling.

Three kinds of rows. "quantised input": the product and its float32 epilogue alone, one kernel on one thread
(`_native`). "dynamic": the op on all threads, which first quantises each row of x. "memory": the op on layers that
take turns, too many for any cache, at few rows: there time is bytes, so fewer bits must be faster than 8.

Every entry is first compared with the reference in float64, and what does not match is not timed. Those of a group run
in turns, round by round, and each round measures the VNNI ceiling too, on as many threads: clocks drift, and shares are
medians over the rounds. Tiles (AMX) can exceed it; `percent_of_ceiling` is of the own instruction set.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles

import torch

from kdkernels import _native, reference
from kdkernels.ops.quant_linear import ACTIVATION
from kdkernels.quant import PackedWeight, linear, pack

from . import machine
from .rows import append

INPUT, DYNAMIC, MEMORY = "quantised input", "dynamic", "memory"
# Largest deviation from float64, relative to the largest magnitude.
MATCH = 1e-4
# More than a thread's share of any last-level cache that it could have for itself.
MEMORY_BYTES = 256 << 20
ROUND_SECONDS = 0.02
# OpenMP's threads spin for some milliseconds after an op, which costs a ceiling on as many threads a quarter of itself.
SPIN_SECONDS = 0.02
COLUMNS = (
    "case", "kind", "scheme", "activation", "rows", "in_features", "out_features", "median_us", "p20_us", "p80_us",
    "rounds", "gops", "percent_of_ceiling", "percent_of_vnni", "target", "reached", "times_8_bit", "error", "isa",
    "kernel_threads", "machine", "threads", "load", "kdkernels", "torch", "python", "commit", "when",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """x [rows, in features] times a weight in each of `schemes`; `target`: the share of the VNNI ceiling, in %."""

    kind: str
    shape: tuple[int, int, int]
    schemes: tuple[str, ...] = ("int8",)
    activation: str | None = None
    target: float | None = None

    @property
    def name(self) -> str:
        return f"{self.kind} {' x '.join(map(str, self.shape))}" + (f" {self.activation}" if self.activation else "")


ALL = ("int8", "int4", "int3", "int2")
# Issue "quantised encoder inference": 95 % with an input that is quantised already, 88 % with one that is not and GELU;
# weights of fewer than 8 bits out of memory faster than 8, so a target of 1 in times_8_bit.
CASES = (
    *(Case(INPUT, shape, target=95) for shape in ((128, 768, 3072), (1024, 768, 768))),
    *(Case(DYNAMIC, shape, activation="gelu", target=88) for shape in ((128, 768, 3072), (1024, 768, 768))),
    *(Case(DYNAMIC, (rows, 768, 3072), ALL) for rows in (1, 4, 16)),
    *(Case(MEMORY, (rows, 768, 3072), ALL) for rows in (1, 4, 16)),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.run quant_linear", description=__doc__.splitlines()[0])
    parser.add_argument("--case", metavar="TEXT", default="", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=2.0, help="for one case (default: %(default)s)")
    parser.add_argument("--csv", metavar="PATH", type=Path, help="append the rows to this file")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    arguments = parser.parse_args(argv)
    cases = [case for case in CASES if arguments.case in case.name]
    if not cases:
        print("benches.run quant_linear: no case fits; --list shows all", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return 0
    if _native.isa() == "generic":
        print("benches.run quant_linear: the generic kernels have no int8 ceiling to compare with", file=sys.stderr)
        return 2
    facts, failed = machine.facts("cpu"), False
    print(", ".join(f"{name} {value}" for name, value in facts.items()) + f", isa {_native.isa()}", flush=True)
    for case in cases:
        try:
            rows = measure(case, arguments.seconds, facts)
        except ArithmeticError as error:
            failed = True
            print(f"{case.name}: {error}", file=sys.stderr)
            continue
        for row in rows:
            _print(row)
        if arguments.csv is not None:
            append(arguments.csv, COLUMNS, [{key: row.get(key) for key in COLUMNS} for row in rows])
    return 1 if failed else 0


def measure(case: Case, seconds: float, facts: dict) -> list[dict]:
    """The rows of one case, one per scheme. Raises ArithmeticError where a result is not the reference's."""
    rows, columns, features = case.shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator)
    weight = torch.randn(64, columns, generator=generator).repeat(features // 64, 1)
    entries, errors = {}, {}
    for scheme in case.schemes:
        packed = pack(weight, scheme)
        entries[scheme], result = _entry(case, x, packed)
        truth = reference.quant_linear(x.double(), packed, activation=case.activation)
        errors[scheme] = ((result.double() - truth).abs().max() / truth.abs().max()).item()
        if not errors[scheme] <= MATCH:
            raise ArithmeticError(
                f"{scheme} does not match the reference and is not timed: error {errors[scheme]:.1e}, "
                f"allowed {MATCH:.0e}"
            )
    threads = 1 if case.kind == INPUT else torch.get_num_threads()
    own = _native.measure("int8", threads=threads) / _vnni(threads, 0.1)
    times, ceilings = _in_turns(entries, seconds, threads)
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    out = []
    for scheme, samples in times.items():
        fifths, middle = quantiles(samples, n=5, method="inclusive"), median(samples)
        gops = 2e-9 * rows * columns * features
        share = median(100 * gops / (t * vnni) for t, vnni in zip(samples, ceilings, strict=True))
        low_bits = scheme != "int8"
        ratio = median(a / b for a, b in zip(times["int8"], samples, strict=True))
        goal, got = (1.0 if case.kind == MEMORY else None, ratio) if low_bits else (case.target, share)
        out.append(
            {
                "case": case.name, "kind": case.kind, "scheme": scheme, "activation": case.activation, "rows": rows,
                "in_features": columns, "out_features": features, "median_us": middle * 1e6, "p20_us": fifths[0] * 1e6,
                "p80_us": fifths[3] * 1e6, "rounds": len(samples), "gops": gops / middle,
                "percent_of_ceiling": share / own, "percent_of_vnni": share,
                "target": goal, "reached": None if goal is None else got >= goal,
                "times_8_bit": ratio if low_bits else None, "error": errors[scheme], "isa": _native.isa(),
                "kernel_threads": threads, "when": when, **facts,
            }
        )  # fmt: skip
    return out


def _vnni(threads: int, seconds: float = 0.005) -> float:
    """What targets are shares of, in GOPS: the ceiling of avx512 for amx, of what runs for all others."""
    isa = "avx512" if _native.isa() == "amx" else _native.isa()
    if threads > 1:
        time.sleep(SPIN_SECONDS)
    return _native.measure("int8", threads=threads, seconds=seconds, repeats=1, isa=isa)


def _entry(case: Case, x: torch.Tensor, packed: PackedWeight) -> tuple[Callable[[], None], torch.Tensor]:
    """What is timed, and its result."""
    if case.kind == INPUT:
        activation = ACTIVATION[case.activation]
        call = _native.QuantLinearCall(_native.isa(), x.numpy(), packed.blob.numpy(), activation=activation)
        return call.run, torch.from_numpy(call.run())
    result = linear(x, packed, activation=case.activation)
    copies = [packed.prepared]
    if case.kind == MEMORY:
        copies += [packed.prepared.clone() for _ in range(MEMORY_BYTES // packed.prepared.numel())]
    op, code, at = torch.ops.kdkernels.quant_linear.default, ACTIVATION[case.activation], -1

    def run() -> None:
        nonlocal at
        at = (at + 1) % len(copies)
        op(x, copies[at], None, None, packed.shape[0], code, True, 0.0)

    return run, result


def _in_turns(
    entries: dict[str, Callable[[], None]], seconds: float, threads: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each entry in each round, the mean of as many runs as make up ROUND_SECONDS, and each round's
    ceiling."""
    repeats = {}
    for name, run in entries.items():
        run()
        repeats[name] = max(3, round(ROUND_SECONDS / _seconds(run, 3)))
    times, ceilings = {name: [] for name in entries}, []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(ceilings) < 5:
        ceilings.append(_vnni(threads))
        for name, run in entries.items():
            times[name].append(_seconds(run, repeats[name]))
    return times, ceilings


def _seconds(run: Callable[[], None], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _print(row: dict) -> None:
    said = f"{row['case']:40} {row['scheme']:5} {row['median_us']:9.1f} us {row['percent_of_vnni']:6.1f} % of VNNI"
    if row["isa"] == "amx":
        said += f" {row['percent_of_ceiling']:5.1f} % of AMX"
    if row["times_8_bit"] is not None:
        said += f" {row['times_8_bit']:5.2f} x int8"
    if row["target"] is not None:
        said += f"   target {row['target']:g} {'reached' if row['reached'] else 'missed'}"
    print(said, flush=True)
