"""`python -m benches.plot_encoder CSV [--out PNG]`: what `benches.run encoder` measured, as one figure: latency over
lengths and batches, and real tokens per second on texts of mixed length."""

import argparse
import csv
import sys
from pathlib import Path

MIXED = "32 texts"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.plot_encoder", description=__doc__)
    parser.add_argument("csv", type=Path, help="rows that benches.run encoder wrote")
    parser.add_argument("--out", type=Path, help="PNG (default: beside the CSV)")
    arguments = parser.parse_args(argv)
    rows = latest(arguments.csv) if arguments.csv.is_file() else {}
    if not rows:
        print(f"benches.plot_encoder: {arguments.csv} is no file with rows", file=sys.stderr)
        return 2
    out = arguments.out or arguments.csv.with_suffix(".png")
    draw(rows, out)
    print(out)
    return 0


def latest(path: Path) -> dict[tuple[str, str], dict]:
    """{(case, implementation): row}, the last one of each."""
    with path.open(newline="") as file:
        return {(row["case"], row["implementation"]): row for row in csv.DictReader(file)}


def draw(rows: dict[tuple[str, str], dict], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for _, name in rows))
    cases = [case for case in dict.fromkeys(case for case, _ in rows) if case != MIXED]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    for name, colour in zip(names, colours, strict=False):
        at = [i for i, case in enumerate(cases) if (case, name) in rows]
        times = [float(rows[cases[i], name]["median_ms"]) for i in at]
        width = 2.5 if name.startswith("kdkernels") else 1.2
        left.plot(at, times, marker="o", label=name, color=colour, linewidth=width)
    left.set_xticks(range(len(cases)), cases)
    left.set(yscale="log", xlabel="texts x tokens", ylabel="ms (log)", title="time of a batch")
    mixed = sorted((float(rows[MIXED, name]["tokens_per_second"]), name) for name in names if (MIXED, name) in rows)
    bars = right.barh([name for _, name in mixed], [rate for rate, _ in mixed])
    for bar, (_, name) in zip(bars, mixed, strict=True):
        bar.set_color(colours[names.index(name) % len(colours)])
    right.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    right.set(xlabel="real tokens per second", title="32 texts of mixed length")
    left.legend(fontsize=8, frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    row = next(iter(rows.values()))
    figure.suptitle(f"BERT-base shape, {row['machine']}, {row['threads']} threads, commit {row['commit']}", fontsize=9)
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
