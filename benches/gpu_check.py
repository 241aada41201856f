"""`python -m benches.gpu_check --out DIR`: every GPU test and every GPU benchmark in one go, under ten minutes, with
no network.

Each part runs in a process of its own with a limit of its own, so that a crash, a hang or a failing build of one part
loses nothing of the others: the tests side by side, since they mostly compile, then the benchmarks one by one, what the
project has goals for first: encoders and products (`benches.gpu_rows`), losses (`benches.run`), then the rest. Where a
case takes its process down, or hangs, a new one goes on behind it. When the time is up nothing more is started. DIR
gets gpu_check.json (machine, versions, commit, one entry a part with the cases that it has no row of, all rows), whole
at any moment and written anew after every part, gpu.csv (each row as soon as it is known), and a log of each part.
Exit status 1 where a part did not pass, 2 where there is no GPU.

--resume goes on with what an earlier run with the same DIR did not reach.
--dry-run needs no GPU: it names the parts, and runs those of `benches.gpu_rows` in small shapes.
"""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch

from kdkernels import _load
from python_tests import case
from python_tests.cases import BENCHES

from . import gpu_cases, gpu_rows, machine

# Of all parts; what imports before and the end of a killed part take beside it stays within ten minutes.
BUDGET_SECONDS, KILL_SECONDS = 560, 5
# Of each part of tests; of benchmarks from one case's row to the next, by op, to which START_SECONDS come, and until a
# peer is ready; torch.compile may look for its best mode for each loss at most so long.
TEST_SECONDS, START_SECONDS, PEER_SECONDS, LOSS_SECONDS, COMPILE_SECONDS = 170, 30, 45, 45, 15
ROW_SECONDS = {"encoder": 120, "quant_linear": 60, "varlen_attention": 45}
NOT_REACHED, PASSED, FAILED, CRASHED, TIMED_OUT = "not reached", "passed", "failed", "crashed", "timed out"
# Files, and which of their tests, as pytest's -k has it, each in a process: those that need a GPU. Most of their time
# is one compilation after another, so those of Triton's kernels have several.
FAMILIES = sorted(_load._TRITON_FAMILIES)
MAPS, STATES = "attention or relation", "hidden or moment or gram or linear_kd_loss or topk_kd_loss"
TESTS = [
    ("python_tests/test_cuda_gpu.py", MAPS),
    ("python_tests/test_cuda_gpu.py", STATES),
    ("python_tests/test_cuda_gpu.py", f"not ({MAPS} or {STATES})"),
    ("python_tests/test_cuda_quant_linear.py", "gpu"),
    ("python_tests/test_cuda_varlen_attention.py", "gpu"),
    *(("python_tests/test_triton.py", family) for family in FAMILIES),
    ("python_tests/test_triton.py", f"not ({' or '.join(FAMILIES)})"),
]


@dataclass(frozen=True)
class Part:
    """What one process does: tests, or the benchmarks of `cases`, whose names follow its command.

    `seconds` are for all tests, or until the next case's row.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    cases: tuple[case.Case | gpu_cases.Case, ...] = ()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_SECONDS, metavar="SECONDS", help="for all parts (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="only what an earlier run with DIR did not reach")
    parser.add_argument(
        "--dry-run", action="store_true", help="name the parts, run some in small shapes, without a GPU"
    )
    arguments = parser.parse_args(argv)
    end, dry, out = time.monotonic() + arguments.budget, arguments.dry_run, arguments.out.resolve()
    if not torch.cuda.is_available() and not dry:
        print(f"gpu_check: no GPU: torch {torch.__version__} sees no CUDA device on this machine", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    for log in () if arguments.resume else out.glob("*.log"):
        log.unlink()
    tests, benches = test_parts(), bench_parts(out / "gpu.csv", dry)
    if dry:
        not_run = [*tests, *(part for part in benches if not part.name.startswith("rows-"))]
        print("\n".join(f"part  {part.name} {' '.join(each.name for each in part.cases)}" for part in not_run))
        tests, benches = [], [part for part in benches if part not in not_run]
    report = Report(out, tests + benches, arguments.resume)
    for running in [Running(part, out) for part in tests if report.lacks(part)]:
        report.note(running.finish(end))
    for part in benches:
        left = report.rest_of(part) if report.lacks(part) else replace(part, cases=())
        while left.cases and time.monotonic() < end - 1:
            entry = Running(left, out).finish(end)
            report.note(entry)
            if entry["status"] in (PASSED, FAILED):  # each case had its turn
                break
            left = replace(left, cases=report.rest_of(left).cases[1:])  # the first without a row took the process down
    return report.close()


def test_parts() -> list[Part]:
    options = ("-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider")
    return [
        Part(_slug(f"{Path(path).stem} {only}"), (sys.executable, *options, "-k", only, path), TEST_SECONDS)
        for path, only in TESTS
    ]


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text)[:60].strip("-")


def bench_parts(table: Path, dry: bool) -> list[Part]:
    """In the order of their importance; a dry run's rows are one part, which imports once."""
    goals, rest = [], []
    for _, found in groupby(gpu_cases.cases(), lambda each: None if dry else (each.op, each.has_goals)):
        cases = tuple(found)
        ops, has_goals = [*dict.fromkeys(each.op for each in cases)], cases[-1].has_goals
        command = (sys.executable, "-m", "benches.gpu_rows", *ops, "--csv", str(table), *(["--dry-run"] if dry else []))
        command += ("--peer-seconds", str(PEER_SECONDS))
        seconds = START_SECONDS + max(ROW_SECONDS[each.op] for each in cases)
        name = f"rows-{'-'.join(ops)}" if has_goals or dry else f"rows-{ops[0]}-without-goals"
        (goals if has_goals else rest).append(Part(name, command, seconds, cases))
    losses, more_losses = [], []
    on_gpu = (each for each in BENCHES if each.device == "cuda")
    for (op, has_goals), found in groupby(on_gpu, lambda each: (each.op, each.target != case.Target())):
        cases = tuple(found)
        options = ("--device", "cuda", "--csv", str(table), "--seconds", "4", "--compile-seconds", str(COMPILE_SECONDS))
        command = (sys.executable, "-m", "benches.run", op, *options)
        name = f"losses-{op}" if has_goals else f"losses-{op}-without-goals"
        part = Part(name, command, START_SECONDS + LOSS_SECONDS, cases)
        (losses if has_goals else more_losses).append(part)
    return goals + losses + more_losses + rest


class Running:
    """A part at work; what it prints goes to NAME.log as it comes."""

    def __init__(self, part: Part, out: Path):
        self.part, self.log, self.started = part, out / f"{part.name}.log", time.monotonic()
        self._table = out / "gpu.csv"
        names = ("--case", *(each.name for each in part.cases)) if part.cases else ()
        with self.log.open("a" if part.cases else "w") as file:
            self.process = subprocess.Popen(
                [*part.command, *names], cwd=machine.ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True
            )  # fmt: skip

    def finish(self, end: float) -> dict:
        """Its entry in the report, once it has ended, or is killed at its limit or at `end`."""
        limit, rows = self.started + self.part.seconds, self._bytes()
        while (code := self._wait(min(1, limit - time.monotonic(), end - time.monotonic()))) is None:
            if rows != self._bytes():
                limit, rows = time.monotonic() + self.part.seconds, self._bytes()
            if time.monotonic() >= min(limit, end):
                break
        if code is None:
            code, status = self._kill(), TIMED_OUT
        else:
            status = {0: PASSED, 1: FAILED}.get(code, CRASHED)
        spent = round(time.monotonic() - self.started, 1)
        entry = {"name": self.part.name, "status": status, "exit_code": code, "seconds": spent, "log": self.log.name}
        if not self.part.cases:
            # From the log and not from a report of pytest's, which a run that is killed never writes.
            words = re.findall(r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED)\b", self.log.read_text(), re.MULTILINE)
            entry["tests"] = {word.lower(): words.count(word) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
        return entry

    def _bytes(self) -> int:
        """Of the rows so far; tests write none."""
        return self._table.stat().st_size if self.part.cases and self._table.is_file() else 0

    def _wait(self, seconds: float) -> int | None:
        """The exit code; None where it has not ended."""
        try:
            return self.process.wait(max(0, seconds))
        except subprocess.TimeoutExpired:
            return None

    def _kill(self) -> int | None:
        """The exit code; None where the driver holds the process, which nobody waits for."""
        os.killpg(self.process.pid, signal.SIGKILL)
        return self._wait(KILL_SECONDS)


class Report:
    """gpu_check.json: complete from the first moment on, with parts that were not reached named as such."""

    def __init__(self, out: Path, parts: Iterable[Part], resume: bool):
        self._path, self._table = out / "gpu_check.json", out / "gpu.csv"
        self._parts = {part.name: part for part in parts}
        earlier = json.loads(self._path.read_text())["parts"] if resume and self._path.is_file() else []
        if not resume:
            self._table.unlink(missing_ok=True)
        empty = [{"name": name, "status": NOT_REACHED, "seconds": 0.0} for name in self._parts]
        self._entries = {entry["name"]: entry for entry in (*empty, *earlier)}
        facts = machine.facts("cuda" if torch.cuda.is_available() else "cpu")
        self._report = {"facts": facts, "driver": _driver(), "parts": [], "rows": []}
        self._write()

    def lacks(self, part: Part) -> bool:
        """Whether the part has not come to its end yet, and something of it is missing."""
        unfinished = self._entries[part.name]["status"] in (NOT_REACHED, CRASHED, TIMED_OUT)
        return unfinished and (not part.cases or bool(self._without_row(part)))

    def rest_of(self, part: Part) -> Part:
        """The part without the cases that have a row."""
        return replace(part, cases=tuple(each for each in part.cases if each.id in self._without_row(part)))

    def note(self, entry: dict) -> None:
        """Prints a part's entry and stores everything known so far. A part that went on behind a case that took it
        down has not passed."""
        earlier = self._entries[entry["name"]]
        self._entries[entry["name"]] = entry
        self._write()
        if entry["status"] == PASSED and entry["without_row"]:
            entry["status"] = earlier["status"]
            self._write()
        counts = f"  {entry['tests']}" if "tests" in entry else ""
        print(f"{entry['status']:11} {entry['seconds']:6.1f} s  {entry['name']}{counts}", flush=True)

    def close(self) -> int:
        """Prints all rows and what is missing; the exit status."""
        for row in self._report["rows"]:
            print(gpu_rows.line(row))
        for entry in self._report["parts"]:
            if entry["status"] != PASSED:
                missing = f": no row of {', '.join(entry['without_row'])}" if entry["without_row"] else ""
                print(f"{entry['status']}: {entry['name']}{missing}")
        count = Counter(entry["status"] for entry in self._report["parts"])
        print(f"gpu_check: {count[PASSED]} of {count.total()} parts passed; results in {self._path.parent}")
        return 0 if count[PASSED] == count.total() else 1

    def _write(self) -> None:
        """Whole or not at all: a run that is stopped leaves the last complete report."""
        if self._table.is_file():
            with self._table.open(newline="") as file:
                self._report["rows"] = list(csv.DictReader(file))
        for name, part in self._parts.items():
            self._entries[name]["without_row"] = self._without_row(part)
        self._report["parts"] = list(self._entries.values())
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self._report, indent=1))
        unfinished.replace(self._path)

    def _without_row(self, part: Part) -> list[str]:
        rows = self._report["rows"]
        found = {f"{row['op']}-{row['case']}" for row in rows if row["implementation"] == gpu_cases.OURS}
        return [each.id for each in part.cases if each.id not in found]


def _driver() -> dict[str, str]:
    """What nvidia-smi says of the card, as far as it is there."""
    query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"unavailable: {type(error).__name__}"}
    return dict(
        zip(query.split(","), (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=False)
    )


if __name__ == "__main__":
    sys.exit(main())
