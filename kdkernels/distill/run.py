"""Runs a recipe: stage after stage, each resumable, under one output folder.

    output/run.json                   what the run was started with; another config is refused
    output/stage-1-NAME/checkpoint-N  the Trainer's, complete or absent
    output/stage-1-NAME/student       a finished stage; the next one starts from it
    output/stage-1-NAME/log.json      losses by step
    output/student                    the result, a plain transformers folder

Started again with the same arguments, it goes on from the last checkpoint and ends with the same numbers: data order,
random state, optimiser, projections and stage are all restored or recomputed from the seed.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)

from .checkpoints import export, latest, write_text
from .data import Ordered, collator, encode
from .errors import DistillError, unknown
from .sources import Cached, Frozen, Mean, Source
from .stages import Recipe
from .trainer import DistillTrainer

# What the runner itself decides; a config cannot set these.
OWN_ARGUMENTS = ("output_dir", "seed", "data_seed", "per_device_train_batch_size", "num_train_epochs", "max_steps",
                 "train_sampling_strategy", "remove_unused_columns", "resume_from_checkpoint", "report_to")  # fmt: skip
TRAINING_ARGUMENTS = {f.name: f for f in fields(TrainingArguments) if f.init and f.name not in OWN_ARGUMENTS}
_DEFAULTS = {
    "disable_tqdm": False,
    "logging_steps": 10,
    "save_steps": 100,
    "save_total_limit": 2,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
}


@dataclass
class StageRun:
    """What a config adds to a recipe's stage: texts, teacher(s) by name, batch and epochs."""

    examples: list[dict]
    teachers: Sequence[str]
    batch_size: int = 32
    epochs: float | None = None
    max_length: int = 128
    cache_teacher: bool = False
    training: dict = field(default_factory=dict)


def load(name: str, head: bool = False, what: str = "teacher") -> PreTrainedModel:
    """A model by Hugging Face name or local path, in float32. DistillError in one line if it cannot be had."""
    auto = AutoModelForSequenceClassification if head else AutoModel
    try:
        return auto.from_pretrained(name, dtype="float32")
    except (OSError, ValueError, KeyError) as error:
        raise DistillError(
            f"{what} {name!r}: not a model folder or Hugging Face name that loads ({_first(error)})"
        ) from error
    except Exception as error:
        # safetensors and torch each raise their own class for a damaged file.
        raise DistillError(f"{what} {name!r}: corrupt or unreadable ({_first(error)})") from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise DistillError(f"tokenizer of {name!r}: cannot be loaded ({_first(error)})") from error


def run(
    recipe: Recipe,
    stages: Sequence[StageRun],
    output: str | Path,
    *,
    tokenizer: str,
    student: PreTrainedModel | Callable[[], PreTrainedModel] | None = None,
    seed: int = 0,
    identity: dict | None = None,
    callbacks: Sequence = (),
    fresh: bool = False,
) -> PreTrainedModel:
    """Runs every stage that is not finished yet and returns the student, also written to output/student.

    Under torchrun every process calls this. fresh: delete what an earlier run left in `output` first. student: a
    function that makes the untrained student; default: the recipe's surgery on the last stage's teacher. identity:
    what must not change between a run and its continuation.
    """
    output = Path(output)
    # Said once and for all stages: TrainingArguments and accelerate do not find gloo by themselves where there is no
    # accelerator.
    use_cpu = not torch.accelerator.is_available() or any(plan.training.get("use_cpu") for plan in stages)
    state = PartialState(cpu=use_cpu)
    if state.is_main_process:
        if fresh:
            _remove(output)
        print(recipe.objective(), flush=True)
    state.wait_for_everyone()
    record, text = output / "run.json", json.dumps(identity or {}, indent=1, sort_keys=True, default=str)
    _same_run(output, record, text)
    tokenizer = load_tokenizer(tokenizer)
    exports = [output / f"stage-{n}-{s.name}" / "student" for n, s in enumerate(recipe.stages[:-1], 1)] + [
        output / "student"
    ]
    done = max((n for n, folder in enumerate(exports, 1) if folder.is_dir()), default=0)
    for number, (stage, plan) in enumerate(zip(recipe.stages, stages, strict=True), 1):
        if number <= done:
            continue
        set_seed(seed)
        if number > 1:
            model = load(str(exports[number - 2]), recipe.head, "student of the stage before")
        else:
            # The last stage's teacher, because its head is the task's.
            model = student() if student else recipe.student(load(stages[-1].teachers[0], recipe.head))
        folder = output / f"stage-{number}-{stage.name}"
        trainer = _trainer(recipe, stage, plan, model, tokenizer, folder, seed, use_cpu, callbacks)
        _try_losses(trainer)
        checkpoint = latest(folder)
        if state.is_main_process:
            write_text(record, text)
            where = f"from {checkpoint.name}" if checkpoint else "from the start"
            print(f"stage {number} of {len(stages)}, {stage.name}: {trainer.args.max_steps} steps, {where}", flush=True)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        weights = trainer.student_state()
        if state.is_main_process:
            write_text(folder / "log.json", json.dumps(trainer.state.log_history, indent=1))
            export(trainer.student, weights, tokenizer, exports[number - 1])
        state.wait_for_everyone()
    if state.is_main_process:
        print(f"student: {exports[-1]}", flush=True)
    return load(str(exports[-1]), recipe.head, "student")


def _trainer(recipe, stage, plan, model, tokenizer, folder, seed, use_cpu, callbacks) -> DistillTrainer:
    settings = _DEFAULTS | stage.training | plan.training | {"use_cpu": use_cpu}
    epochs = settings.pop("epochs", 1.0)
    epochs = plan.epochs if plan.epochs is not None else epochs
    accumulation, processes = settings.get("gradient_accumulation_steps", 1), PartialState().num_processes
    if plan.batch_size % (accumulation * processes):
        raise DistillError(
            f"batch_size {plan.batch_size} is the batch of one optimiser step over all processes: "
            f"it must be a multiple of {processes} processes x {accumulation} gradient_accumulation_steps"
        )
    source = _source(recipe, stage, plan, tokenizer, folder)
    longest = min(
        m.max_position_embeddings for m in (model.config, source.config) if hasattr(m, "max_position_embeddings")
    )
    if plan.max_length > longest:
        raise DistillError(f"max_length {plan.max_length}: student and teacher take at most {longest} tokens")
    rows = encode(plan.examples, tokenizer, plan.max_length)
    if stage.needs_labels and not all("label" in row for row in rows):
        raise DistillError(
            f"stage {stage.name!r} needs a label for every text; the data has none (labels: leading, or .jsonl)"
        )
    classes = model.config.num_labels
    if stage.needs_labels and not all(row["label"] in (-100, *range(classes)) for row in rows):
        wrong = next(row["label"] for row in rows if row["label"] not in (-100, *range(classes)))
        raise DistillError(f"label {wrong}: the student has {classes} classes, 0 to {classes - 1} (-100 = no label)")
    data = Ordered(rows, plan.batch_size, epochs, seed)
    args = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        per_device_train_batch_size=plan.batch_size // (accumulation * processes),
        max_steps=len(data) // plan.batch_size,
        train_sampling_strategy="sequential",
        report_to="none",
        **settings,
    )
    trainer = DistillTrainer(
        model,
        replace(stage, source=source, data=data),
        args,
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Progress())
    return trainer


@torch.no_grad()
def _try_losses(trainer: DistillTrainer) -> None:
    """The loss of one text, twice: shapes or options that do not fit are found before anything is written."""
    batch = trainer.data_collator([trainer.train_dataset[0]] * 2).to(trainer.args.device)
    with torch.random.fork_rng():
        trainer.model.eval()(**batch)


def _source(recipe, stage, plan, tokenizer, folder) -> Source:
    head = recipe.head and "logits" in stage.teacher_taps
    source = stage.source
    if source is None:
        models = [load(name, head) for name in plan.teachers]
        source = Frozen(models[0]) if len(models) == 1 else Mean(models)
    if not plan.cache_teacher:
        return source
    cache, state = folder / "teacher.safetensors", PartialState()
    if state.is_main_process and not cache.is_file():
        rows, pad = encode(plan.examples, tokenizer, plan.max_length), collator(tokenizer)
        source.to(state.device)
        batches = (pad(rows[i : i + 64]).to(state.device) for i in range(0, len(rows), 64))
        Cached.write(cache, source, stage.teacher_taps, batches)
    state.wait_for_everyone()
    cached = Cached(cache)
    cached.config = source.config
    return cached


def _same_run(output: Path, record: Path, text: str) -> None:
    """Refuses to continue a run that was started with other arguments."""
    if record.is_file():
        before, now = json.loads(record.read_text(encoding="utf-8")), json.loads(text)
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        if changed:
            raise DistillError(
                f"output {output}: holds a run with another {', '.join(changed)}; give another output folder, "
                "or --fresh to start over"
            )


def _remove(output: Path) -> None:
    """Deletes what a run writes, and nothing else that may lie in the folder."""
    for path in [*output.glob("stage-*"), output / "student", output / "student.unfinished"]:
        shutil.rmtree(path, ignore_errors=True)
    (output / "run.json").unlink(missing_ok=True)


class Progress(ProgressCallback):
    """The Trainer's bar, with the loss in it instead of a printed line per log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}", lr=f"{logs['learning_rate']:.1e}")


def check_training(settings: dict, where: str) -> dict:
    """Names and types of TrainingArguments in a config. YAML reads 5e-4 as text, so numbers are converted."""
    checked = {}
    for name, value in settings.items():
        if name == "epochs":
            raise DistillError(f"{where}: epochs stands beside training, not in it")
        if name in OWN_ARGUMENTS:
            raise DistillError(f"{where}: {name} is set by the runner (use output, seed, batch_size, epochs)")
        if name not in TRAINING_ARGUMENTS:
            raise unknown(f"key in {where}", name, TRAINING_ARGUMENTS)
        kind = str(TRAINING_ARGUMENTS[name].type)
        if isinstance(value, str) and "float" in kind and "str" not in kind.replace("<class", ""):
            try:
                value = float(value)
            except ValueError:
                raise DistillError(f"{where}: {name} must be a number, got {value!r}") from None
        checked[name] = value
    return checked


def _first(error: Exception) -> str:
    """The first line of an error, which is where transformers puts what happened."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
