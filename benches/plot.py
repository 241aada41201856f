"""`python -m benches.plot CSV [--out PNG]`: the table of a run as one figure: times, share of the machine's ceiling,
extra memory."""

import argparse
import csv
import sys
from pathlib import Path

COLOURS = {
    "kdkernels": "#1b6ca8",
    "kdkernels fp32": "#8db9d8",
    "eager": "#c8553d",
    "torch.compile": "#e9a23b",
    "liger": "#7a6f9b",
}
HEIGHT = 0.22
PANELS = (
    ("median_ms", "forward + backward, ms (log), and times ours", 1.0),
    ("percent_of_ceiling", "% of the machine's measured ceiling", 1.0),
    ("extra_bytes", "memory beyond inputs and gradients, MB (log)", 1e-6),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.plot", description=__doc__)
    parser.add_argument("csv", type=Path, help="rows that benches.run wrote")
    parser.add_argument("--out", type=Path, help="PNG (default: beside the CSV)")
    arguments = parser.parse_args(argv)
    if not arguments.csv.is_file():
        print(f"benches.plot: there is no file {arguments.csv}", file=sys.stderr)
        return 2
    rows = latest(arguments.csv)
    if not rows:
        print(f"benches.plot: {arguments.csv} holds no rows", file=sys.stderr)
        return 2
    out = arguments.out or arguments.csv.with_suffix(".png")
    draw(rows, out)
    print(out)
    return 0


def latest(path: Path) -> dict[tuple[str, str], dict[str, dict]]:
    """{(op, case): {implementation: row}}, of the rows of a case that was measured twice the later ones."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            rows = found.setdefault((row["op"], row["case"]), {})
            if any(other["when"] != row["when"] for other in rows.values()):
                rows.clear()
            rows[row["implementation"]] = row
    return found


def draw(cases: dict[tuple[str, str], dict[str, dict]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(17, 1.2 + 0.62 * len(cases)), sharey=True, layout="constrained")
    for axis, (column, title, unit) in zip(axes, PANELS, strict=True):
        for name in COLOURS:
            at = [(place, list(rows).index(name), rows) for place, rows in enumerate(cases.values()) if name in rows]
            if not at:
                continue
            bars = axis.barh(
                [place + (index - (len(rows) - 1) / 2) * HEIGHT for place, index, rows in at],
                [float(rows[name][column]) * unit for _, _, rows in at],
                HEIGHT,
                color=COLOURS[name],
                label=name,
            )
            axis.bar_label(bars, [_label(column, rows[name]) for _, _, rows in at], padding=3, fontsize=7)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        if column == "percent_of_ceiling":
            axis.set_xlim(0, 100)
        else:
            axis.set_xscale("log")
            low, high = axis.get_xlim()
            axis.set_xlim(low, high * 4)  # room for the labels
    axes[0].set_yticks(range(len(cases)), [f"{op}\n{case}" for op, case in cases], fontsize=8)
    axes[0].invert_yaxis()
    axes[-1].legend(fontsize=8, frameon=False)
    row = next(iter(next(iter(cases.values())).values()))
    figure.suptitle(
        f"{row['machine']}, {row['threads']} threads, torch {row['torch']}, commit {row['commit']}", fontsize=9
    )
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def _label(column: str, row: dict) -> str:
    if column == "median_ms":
        ratio = f"  ({float(row['ratio']):.1f}x)" if row["ratio"] else ""
        return f"{float(row['median_ms']):.3g}{ratio}"
    return f"{float(row[column]) * (1e-6 if column == 'extra_bytes' else 1):.3g}"


if __name__ == "__main__":
    sys.exit(main())
