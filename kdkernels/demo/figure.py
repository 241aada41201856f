"""The demo's picture: loss curve, embedding quality before and after, cost of both models, time of a training step."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend comes first: a demo has no display
from matplotlib.ticker import FuncFormatter  # noqa: E402

_TEACHER, _STUDENT, _BEFORE, _EAGER = "#4c566a", "#2a9d8f", "#c9d1d9", "#e76f51"
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 10,
}


def draw(report: dict, path: Path) -> None:
    """Writes the PNG from the report that `demo` makes."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(11, 7.2), layout="constrained")
        _loss(axes[0, 0], report)
        _quality(axes[0, 1], report)
        _cost(axes[1, 0], report)
        _steps(axes[1, 1], report)
        figure.suptitle(
            f"{report['teacher_layers']} layers distilled into {report['student_layers']} "
            f"on {report['train_texts']:,} texts, CPU threads: {report['threads']}",
            fontsize=13, x=0.01, ha="left",
        )  # fmt: skip
        unfinished = path.with_name(f"unfinished-{path.name}")
        figure.savefig(unfinished, dpi=150)
        unfinished.replace(path)
        plt.close(figure)


def _loss(axis, report):
    curve = report["curve"]
    names = {key: label for key, label in report["terms"].items() if key in curve[0]}
    for (key, label), color in zip(names.items(), (_STUDENT, _EAGER), strict=False):
        axis.plot([p["step"] for p in curve], [p[key] for p in curve], color=color, lw=1.8, label=label)
    axis.set_yscale("log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:.1e}"[0] in "1235" else ""))
    axis.set_title("Training loss")
    axis.set_xlabel("step")
    axis.grid(axis="y", which="both", color="#eeeeee")
    axis.legend(frameon=False)


def _quality(axis, report):
    rows = [("similarity", "cosine to the\nteacher's embedding"), ("overlap", "shared\n10 nearest neighbours")]
    for offset, when, color in ((-0.19, "before", _BEFORE), (0.19, "after", _STUDENT)):
        values = [report[when][key] for key, _ in rows]
        bars = axis.bar([i + offset for i in range(len(rows))], values, 0.36, color=color, label=f"student {when}")
        axis.bar_label(bars, [f"{value:.3f}" for value in values], label_type="center")
    axis.axhline(1.0, color=_TEACHER, lw=1, ls="--")
    axis.text(len(rows) - 0.5, 1.01, "teacher", color=_TEACHER, ha="right", va="bottom")
    axis.set_xticks(range(len(rows)), [label for _, label in rows])
    axis.set_ylim(0, 1.22)
    axis.set_title(f"Embeddings of {report['held_out_texts']:,} held-out texts")
    axis.legend(frameon=False, loc="upper left", ncols=2)


def _cost(axis, report):
    rows = [
        ("parameters", "parameters", 1e-6, " M"),
        ("bytes", "size", 1e-6, " MB"),
        ("latency_ms", "latency, one text", 1, " ms"),
    ]
    for offset, who, color in ((-0.19, "teacher", _TEACHER), (0.19, "student", _STUDENT)):
        shares = [report[who][key] / report["teacher"][key] for key, *_ in rows]
        bars = axis.barh([i + offset for i in range(len(rows))], shares, 0.36, color=color, label=who)
        axis.bar_label(bars, [f"{report[who][key] * scale:.1f}{unit}" for key, _, scale, unit in rows], padding=4)
    axis.set_yticks(range(len(rows)), [label for _, label, *_ in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25)
    axis.xaxis.set_visible(False)
    axis.spines["bottom"].set_visible(False)
    axis.set_title("Cost, teacher = 1")
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)


def _steps(axis, report):
    ways = [("eager", "eager losses", _EAGER), ("fused", "fused losses", _STUDENT)]
    for i, (way, _, color) in enumerate(ways):
        times = report["step"][way]
        rest = times["step_ms"] - times["losses_ms"]
        axis.barh(i, rest, 0.55, color=_BEFORE, label="models and optimiser" if i == 0 else None)
        bar = axis.barh(i, times["losses_ms"], 0.55, left=rest, color=color)
        axis.bar_label(bar, [f"{times['step_ms']:.0f} ms, losses {times['losses_ms']:.1f}"], padding=4)
    axis.set_yticks(range(len(ways)), [label for _, label, _ in ways])
    axis.set_xlim(0, max(report["step"][way]["step_ms"] for way, *_ in ways) * 1.5)
    axis.set_xlabel("milliseconds")
    axis.set_title("One training step")
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0))
