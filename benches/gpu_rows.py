"""`python -m benches.gpu_rows [OP ...]`: what runs forward alone on a GPU, beside its peers; the cases of gpu_cases/.

Ours is first compared with the reference in float64, and what does not match is not timed; a peer that can't run here,
or that computes something else, is named and left out. A sample is a CUDA graph of the case's calls, each on weights of
its own, after the L2 cache was flushed: launches cost next to nothing, as in a server that captures its model, and
weights come out of memory. All run in turns, round by round. A row has the columns of `benches.run`: `loss_error` is
the output's error, and `target` says of ours the milliseconds that it may take or its share of the ceiling, of a peer
how many times ours it shall take. What has goals is measured first.

A peer that is not ready after --peer-seconds, as where torch.compile looks for its best products, is left out; a case
of ours that fails loses its own rows alone, unless CUDA then refuses everything to the process: exit status 3.
--dry-run does all of it in small shapes, on the CPU where there is no GPU: what it says of time means nothing.
"""

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch

import kdkernels

from . import machine, roofline
from .gpu_cases import OURS, Built, Case, cases
from .rows import append
from .run import COLUMNS, SAME_FORMULA, share_of_ceiling
from .timing import L2_FLUSH_BYTES, in_turns, spread

WARM_UPS = 3
PEER_SECONDS = 60.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu_rows", description=__doc__.splitlines()[0])
    ops = sorted({case.op for case in cases()})
    parser.add_argument("ops", metavar="OP", nargs="*", help=f"of {', '.join(ops)} (default: all)")
    parser.add_argument("--case", metavar="TEXT", nargs="*", help="only cases whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=1.5, help="for the rounds of one case (default: %(default)s)")
    parser.add_argument(
        "--peer-seconds",
        type=float,
        default=PEER_SECONDS,
        help="until a peer of a case is ready (default: %(default)s)",
    )
    parser.add_argument("--csv", metavar="PATH", type=Path, help="append the rows to this file")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--dry-run", action="store_true", help="small shapes; on the CPU where there is no GPU")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.ops) - {*ops}:
        parser.error(f"OP must be one of {', '.join(ops)}, got {', '.join(sorted(unknown))}")
    wanted = arguments.case or [""]
    chosen = [
        case for case in cases() if case.op in (arguments.ops or ops) and any(text in case.name for text in wanted)
    ]
    if arguments.list:
        print("\n".join(f"{case.op:16} {case.name:28} {case.why}" for case in chosen))
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.dry_run:
        print("benches.gpu_rows: torch sees no GPU; --dry-run needs none", file=sys.stderr)
        return 2
    facts, ceilings, failed = machine.facts(device), {}, False
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    for case in chosen:
        try:
            if case.arithmetic not in ceilings:
                ceilings[case.arithmetic] = roofline.measure_products(device, case.arithmetic, arguments.dry_run)
                print(f"ceilings: {ceilings[case.arithmetic].described}", flush=True)
            rows = measure(
                case, device, arguments.dry_run, arguments.seconds, ceilings[case.arithmetic], facts,
                arguments.peer_seconds
            )  # fmt: skip
        except Exception as error:  # of whatever kind, the other cases are still wanted
            failed = True
            print(f"{case.id}: {machine.in_a_line(error)}", file=sys.stderr, flush=True)
            if not isinstance(error, ArithmeticError):
                traceback.print_exc()
            if machine.is_lost(device):
                return machine.LOST
            continue
        for row in rows:
            print(line(row), flush=True)
        if arguments.csv is not None:
            append(arguments.csv, COLUMNS, rows)
    return 1 if failed else 0


@torch.no_grad()
def measure(
    case: Case,
    device: str,
    small: bool,
    seconds: float,
    ceilings: roofline.Ceilings,
    facts: dict,
    peer_seconds: float = PEER_SECONDS,
) -> list[dict]:
    """The rows of one case, ours first. Raises ArithmeticError where ours does not match."""
    built = case.build(device, small)
    found = _compare(case, built, peer_seconds)
    samplers, how = {}, {}
    for name in found:
        samplers[name], how[name] = _sampler(built.calls[name], built.count, device)
    times = {name: [run(), run()] for name, run in samplers.items()} if small else in_turns(samplers, seconds)
    floor, bound = ceilings.floor(built.work)
    ours = kdkernels.explain()[case.op][device]
    now, rows = datetime.now(timezone.utc).isoformat(timespec="seconds"), []
    for name, samples in times.items():
        low, middle, high = spread(samples)
        percent = 100 * floor / middle
        if name == OURS:
            judged = _judgement(case, middle * 1e3, percent)
        else:
            ratio = median(peer / own for peer, own in zip(samples, times[OURS], strict=True))
            goal = case.targets.get(name)
            judged = {"ratio": ratio, "target": goal, "reached": None if goal is None else ratio >= goal}
        rows.append(
            dict.fromkeys(COLUMNS)
            | facts
            | {
                "op": case.op, "case": case.name, "implementation": name, "variant": how[name],
                "dtype": str(found[name][1]).removeprefix("torch."),
                "median_ms": middle * 1e3, "p20_ms": low * 1e3, "p80_ms": high * 1e3, "rounds": len(samples),
                "bytes": built.work.bytes, "operations": built.work.operations, "floor_ms": floor * 1e3, "bound": bound,
                "percent_of_ceiling": percent, "loss_error": found[name][0], "ceilings": ceilings.described,
                "implementation_of_ours": ours, "when": now,
            }
            | judged
        )  # fmt: skip
    return rows


def _judgement(case: Case, milliseconds: float, percent: float) -> dict:
    """Our row's goal in its own unit, and whether it was reached."""
    if case.milliseconds is not None:
        return {"target": f"{case.milliseconds:g} ms", "reached": milliseconds <= case.milliseconds}
    return {} if case.share is None else share_of_ceiling(case.share, percent)


class OutOfTime(BaseException):
    """No Exception: torch.compile would take it for a failure of one of its tries."""


@contextmanager
def _at_most(seconds: float):
    """Raises OutOfTime inside when the time is up."""

    def stop(*_):
        raise OutOfTime(f"not ready after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _compare(case: Case, built: Built, peer_seconds: float) -> dict[str, tuple[float, torch.dtype]]:
    """{implementation: (error, dtype of the output)} of those that are to be timed."""
    scale, found = built.truth.abs().max().item(), {}
    for name, call in built.calls.items():
        limit = case.match if name == OURS else SAME_FORMULA
        try:
            if name == OURS:
                y = call(0)
            else:
                with _at_most(peer_seconds):
                    y = call(0)
        except (Exception, OutOfTime) as why:
            if name == OURS:
                raise
            print(f"{case.id}: {name} is left out: {machine.in_a_line(why)}", file=sys.stderr, flush=True)
            continue
        error = ((y.double() - built.truth.double()).abs().max() / scale).item()
        if error <= limit:
            found[name] = error, y.dtype
        elif name == OURS:
            raise ArithmeticError(f"does not match the reference and is not timed: error {error:.1e} of {limit:.0e}")
        else:
            print(f"{case.id}: {name} computes something else and is left out: error {error:.1e}", file=sys.stderr)
    return found


def _sampler(call: Callable, count: int, device: str) -> tuple[Callable[[], float], str]:
    """(a function that makes all calls and returns the seconds of one, how it runs them)"""

    def run() -> None:
        for i in range(count):
            call(i)

    def on_cpu() -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) / count

    if device == "cpu":
        return on_cpu, "dry run"
    replay, how = _captured(run)
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)

    def on_cuda() -> float:
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / count

    return on_cuda, how


def _captured(run: Callable[[], None]) -> tuple[Callable[[], None], str]:
    """`run` as a CUDA graph; itself where something in it can't be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run, "no graph"
    return graph.replay, "graph"


def line(row: dict) -> str:
    """A row for a terminal; its values may be the text of a CSV."""
    number = {key: float(row[key]) for key in ("median_ms", "percent_of_ceiling", "ratio") if row[key]}
    target = row["target"]
    said = (
        f"{row['op']:14} {row['case']:26} {row['implementation']:20} {number['median_ms']:9.4f} ms "
        f"{number['percent_of_ceiling']:6.1f} % of {row['bound']}"
    )
    if "ratio" in number:
        return f"{said}  {number['ratio']:.2f}x" + (f" (target {float(target):g}x)" if target else "")
    return f"{said}  (target {target})" if target else said


if __name__ == "__main__":
    sys.exit(main())
