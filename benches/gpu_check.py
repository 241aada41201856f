"""`python -m benches.gpu_check --out DIR`: every GPU test and every GPU benchmark in one go, under ten minutes, with
no network.

Each part runs in a process of its own with a limit of its own, so that a crash, a hang or a failing build of one part
loses nothing of the others; the tests side by side, since they mostly compile, then the benchmarks one by one: first
what runs forward alone (`benches.gpu_rows`), then the losses (`benches.run`). DIR gets gpu_check.json (machine,
versions, commit, one entry a part, all rows), gpu.csv (the rows as `benches.run` writes them), and a log of each part.
Exit status 1 where a part failed, 2 where there is no GPU.

--dry-run needs no GPU: it names the parts, and runs those of `benches.gpu_rows` in small shapes.
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import torch

from python_tests.case import Case
from python_tests.cases import BENCHES

from . import gpu_cases, gpu_rows, machine

BUDGET_SECONDS = 570
BENCH_SECONDS, ROWS_SECONDS, TEST_SECONDS = 90, 150, 200
# torch.compile may look for its best mode this long for each case.
COMPILE_SECONDS = 20
# Each with the tests that need a GPU.
TESTS = {
    "python_tests/test_cuda_gpu.py": "",
    "python_tests/test_cuda_quant_linear.py": "gpu",
    "python_tests/test_cuda_varlen_attention.py": "gpu",
    "python_tests/test_triton.py": "",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_SECONDS, metavar="SECONDS", help="for all parts (default: %(default)s)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="name the parts, run some in small shapes, without a GPU"
    )
    arguments = parser.parse_args(argv)
    dry = arguments.dry_run
    if not torch.cuda.is_available() and not dry:
        print(f"gpu_check: no GPU: torch {torch.__version__} sees no CUDA device on this machine", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.budget
    table = arguments.out / "gpu.csv"
    table.unlink(missing_ok=True)
    facts = machine.facts("cuda" if torch.cuda.is_available() else "cpu")
    report = {"facts": facts, "driver": _driver(), "parts": [], "rows": []}
    benches = [(ROWS_SECONDS, _forward(op, table, dry)) for op in sorted({case.op for case in gpu_cases.cases()})]
    losses = [_bench(case, table) for case in BENCHES if case.device == "cuda"]
    if dry:
        print("\n".join(f"tests     {path} {only}" for path, only in TESTS.items()))
        print("\n".join(f"bench     {name}" for name, _ in losses))
    else:
        benches += [(BENCH_SECONDS, part) for part in losses]
        for running in [_start(*_test(path, only, arguments.out), arguments.out) for path, only in TESTS.items()]:
            _note(report, running.finish(min(TEST_SECONDS, end - time.monotonic())), table, arguments.out)
    for limit, (name, command) in benches:
        left = end - time.monotonic()
        if left < 1:
            _note(report, {"name": name, "status": "no time", "seconds": 0.0}, table, arguments.out)
            continue
        _note(report, _start(name, command, arguments.out).finish(min(limit, left)), table, arguments.out)
    for row in report["rows"]:
        print(gpu_rows.line(row))
    passed, parts = sum(part["status"] == "passed" for part in report["parts"]), len(report["parts"])
    print(f"gpu_check: {passed} of {parts} parts passed; results in {arguments.out}")
    return 0 if passed == parts else 1


@dataclass
class Running:
    """A part at work; what it prints goes to NAME.log as it comes."""

    name: str
    process: subprocess.Popen
    log: Path
    started: float

    def finish(self, seconds: float) -> dict:
        """Its status, exit code and time, once it has ended or run for `seconds` since it started."""
        try:
            code = self.process.wait(max(0, seconds - (time.monotonic() - self.started)))
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            code, status = self.process.wait(), "timed out"
        spent = round(time.monotonic() - self.started, 1)
        part = {"name": self.name, "status": status, "exit_code": code, "seconds": spent, "log": self.log.name}
        results = self.log.with_suffix(".xml")
        if results.is_file():
            suite = ElementTree.parse(results).getroot().find("testsuite")
            part["tests"] = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        return part


def _start(name: str, command: list[str], out: Path) -> Running:
    log, environment = out / f"{name}.log", {**os.environ, "PYTHONUNBUFFERED": "1"}
    log.with_suffix(".xml").unlink(missing_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=machine.ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Running(name, process, log, time.monotonic())


def _test(path: str, only: str, out: Path) -> tuple[str, list[str]]:
    results = out.resolve() / f"{Path(path).stem}.xml"
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={results}", "-k", only]
    return Path(path).stem, [sys.executable, "-m", "pytest", *options, path]


def _forward(op: str, table: Path, dry_run: bool) -> tuple[str, list[str]]:
    command = [sys.executable, "-m", "benches.gpu_rows", op, "--csv", str(table.resolve())]
    return f"rows-{op}", [*command, *(["--dry-run"] if dry_run else [])]


def _bench(case: Case, table: Path) -> tuple[str, list[str]]:
    options = ["--device", "cuda", "--seconds", "5", "--compile-seconds", str(COMPILE_SECONDS)]
    command = [sys.executable, "-m", "benches.run", case.op, "--case", case.name, *options]
    return case.id, [*command, "--csv", str(table.resolve())]


def _note(report: dict, part: dict, table: Path, out: Path) -> None:
    """Prints the part and stores everything known so far."""
    counts = f"  {part['tests']}" if "tests" in part else ""
    print(f"{part['status']:9} {part['seconds']:6.1f} s  {part['name']}{counts}", flush=True)
    report["parts"].append(part)
    report["rows"] = _rows(table)
    _write(out / "gpu_check.json", report)


def _rows(table: Path) -> list[dict[str, str]]:
    if not table.is_file():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, report: dict) -> None:
    """Whole or not at all: a run that is stopped leaves the last complete report."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(report, indent=1))
    unfinished.replace(path)


def _driver() -> dict[str, str]:
    """What nvidia-smi says of the card, as far as it is there."""
    query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"unavailable: {type(error).__name__}"}
    return dict(
        zip(query.split(","), (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=False)
    )


if __name__ == "__main__":
    sys.exit(main())
