"""`python -m benches.gpu_table [REPORT]`: the tables of README.md's section on GPUs, from what GPUs have measured.

REPORT, a gpu_check.json, is kept as results/gpu-DEVICE.json, in place of an earlier one of that device; without it the
tables are made anew from those that are kept. What no kept report has a row of was executed on the CPU and not yet on a
GPU, and the first table says so. --check writes nothing and fails where README.md differs.
"""

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .gpu_cases import OURS
from .machine import ROOT

README, RESULTS = ROOT / "README.md", ROOT / "benches" / "results"
BEGIN, END = "<!-- benches.gpu_table -->\n", "<!-- end of benches.gpu_table -->\n"
NOT_YET = "executed on the CPU, not yet on a GPU"


@dataclass(frozen=True)
class Route:
    """A way through GPU code: the ops whose rows show that it ran there, and how it runs without a GPU."""

    what: str
    ops: tuple[str, ...]
    built_for: str
    on_the_cpu: str


CUDA, TRITON = "sm_75, sm_80, sm_90a", "sm_80, sm_90, sm_100"
SHIM, INTERPRETER = "the `.cu` source under a host shim", "Triton's interpreter"
ROUTES = (
    Route("`kd_loss`, CUDA C++", ("kd_loss",), CUDA, SHIM),
    Route("`quant_linear`, CUDA C++", ("quant_linear",), CUDA, SHIM),
    Route("`varlen_attention`, CUDA C++", ("varlen_attention", "encoder"), CUDA, SHIM),
    Route("`encoder`, CUDA C++", ("encoder",), CUDA, SHIM),
    Route("`attention_kl`, `relation_kl`, Triton", ("attention_kl", "relation_kl"), TRITON, INTERPRETER),
    Route("`attention_mse`, Triton", ("attention_mse",), TRITON, INTERPRETER),
    Route(
        "`attention_map_kl`, `attention_map_mse`, Triton",
        ("attention_map_kl", "attention_map_mse"),
        TRITON,
        INTERPRETER,
    ),
    Route(
        "`linear_kd_loss` and `topk_kd_loss`, Triton (products of the former: torch's)",
        ("linear_kd_loss", "topk_kd_loss"),
        TRITON,
        INTERPRETER,
    ),
    Route(
        "`hidden_mse`, `hidden_cosine`, `moment_mse`, Triton",
        ("hidden_mse", "hidden_cosine", "moment_mse"),
        TRITON,
        INTERPRETER,
    ),
    Route("`gram_mse`, torch's products, a strip of rows at a time", ("gram_mse",), "torch's own", "torch"),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu_table", description=__doc__.splitlines()[0])
    parser.add_argument("report", nargs="?", type=Path, metavar="REPORT", help="a gpu_check.json, to be kept")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where README.md differs")
    arguments = parser.parse_args(argv)
    if arguments.report is not None:
        try:
            keep(arguments.report)
        except (OSError, ValueError) as error:
            print(f"gpu_table: {arguments.report}: {error}", file=sys.stderr)
            return 2
    text = README.read_text()
    made = filled(text, tables(reports()))
    if made == text:
        return 0
    if arguments.check:
        print("gpu_table: README.md differs from the results; python -m benches.gpu_table writes it", file=sys.stderr)
        return 1
    README.write_text(made)
    return 0


def keep(path: Path) -> Path:
    """Stores a report as its device's. ValueError where it is none, or a dry run's."""
    report = json.loads(path.read_text())
    if not isinstance(report, dict) or not report.get("rows") or "machine" not in report.get("facts", {}):
        raise ValueError("it has no rows of gpu_check")
    if any(row["variant"] == "dry run" for row in report["rows"]):
        raise ValueError("it is a dry run's, whose times mean nothing")
    slug = re.sub(r"[^a-z0-9]+", "-", report["facts"]["machine"].lower()).strip("-")
    kept = RESULTS / f"gpu-{slug}.json"
    kept.write_text(json.dumps(report, indent=1) + "\n")
    return kept


def reports() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu-*.json"))]


def filled(text: str, inside: str) -> str:
    """README.md's text with the part between the marks replaced."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + inside + END + rest.split(END)[1]


def tables(found: list[dict]) -> str:
    """Which paths ran where; then of each device its rows."""
    lines = ["| path | compiled for | executed on the CPU by | on a GPU |", "|---|---|---|---|"]
    for route in ROUTES:
        ran = [report["facts"]["machine"] for report in found if {row["op"] for row in report["rows"]} & {*route.ops}]
        lines.append(f"| {route.what} | {route.built_for} | {route.on_the_cpu} | {', '.join(ran) or NOT_YET} |")
    for report in found:
        lines += ["", *_of_device(report)]
    return "\n".join(lines) + "\n"


def _of_device(report: dict) -> Iterator[str]:
    facts = report["facts"]
    count = sum((Counter(part.get("tests", {})) for part in report["parts"]), Counter())
    described = ", ".join(sorted({row["ceilings"] for row in report["rows"]}))
    yield (
        f"{facts['machine']}, torch {facts['torch']}, Triton {facts['triton']}, commit {facts['commit']}; {described}. "
        f"{count['passed']} tests passed, {count['failed'] + count['error']} failed, {count['skipped']} were skipped."
    )
    if missing := [name for part in report["parts"] for name in part["without_row"]]:
        yield f"Not measured: {', '.join(missing)}."
    yield ""
    yield "| op | case | kdkernels, ms | ceiling | peers, as times ours |"
    yield "|---|---|---|---|---|"
    cases = defaultdict(dict)
    for row in report["rows"]:
        cases[row["op"], row["case"]][row["implementation"]] = row
    for (op, case), rows in cases.items():
        if OURS not in rows:
            continue
        ours = rows.pop(OURS)
        goal = {unit: f" (goal {ours['target']})" if ours["target"].endswith(unit) else "" for unit in ("ms", "%")}
        share = f"{float(ours['percent_of_ceiling']):.0f} %{goal['%']} of {ours['bound']}"
        peers = (f"{name} {float(row['ratio']):.2f}x{_goal(row)}" for name, row in rows.items())
        yield f"| `{op}` | {case} | {float(ours['median_ms']):.3g}{goal['ms']} | {share} | {', '.join(peers)} |"


def _goal(peer: dict) -> str:
    return f" (goal {float(peer['target']):g}x)" if peer["target"] else ""


if __name__ == "__main__":
    sys.exit(main())
