"""DistillTrainer: transformers.Trainer with taps, a source and matches in place of a task loss.

The Trainer trains one module, `Distillation`: the student, the stage's projections and, for some sources, their
companions (peers, a snapshot). Its forward returns the loss itself. So DDP and FSDP see every trained parameter and
find the unused ones from the loss; mixed precision covers teacher and losses; and what is exported is the student
alone.

Overridden, and why: compute_loss and _get_num_items_in_batch (losses are means over the *global* batch, see
matches.py), create_optimizer (groups), log (the terms of the loss), _save / _load_from_checkpoint / _load_best_model
(the student as a plain transformers folder, the rest beside it) and _save_checkpoint (a checkpoint appears whole or
not at all).
"""

import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from .checkpoints import STAGE_FILE, check
from .errors import DistillError
from .matches import UNITS, count
from .stages import Stage
from .taps import collect


class Distillation(nn.Module):
    """What is trained: student + projections + companions. forward(batch) -> {"loss", "parts"}."""

    def __init__(self, student: PreTrainedModel, stage: Stage):
        super().__init__()
        stage.source.bind(student)
        self.student, self.stage = student, stage
        self.projections = stage.projections(student.config)
        self.companions = nn.ModuleList() if stage.source.module is None else stage.source.module

    def forward(self, return_loss=True, step=0, totals=None, processes=1, **batch):
        """totals: units of the global batch, as `count` gives them; None = this batch is the whole. parts: each
        match's share.
        """
        stage = self.stage
        matches = [match for match in stage.matches if match.open(step)]
        student_names = {tap for match in matches for tap in match.student_taps}
        teacher_names = sorted({tap for match in matches for tap in match.teacher_taps})
        wanted = student_names.union(teacher_names if stage.source.from_student else ())
        students = [collect(model, batch, wanted) for model in (self.student, *stage.source.peers)]
        # Gradients of processes are averaged, hence x processes.
        share = count(batch) / totals.clamp(min=1) * processes if totals is not None else None
        parts = torch.zeros(len(stage.matches), device=batch["input_ids"].device)
        total = parts.sum()
        for index, student in enumerate(students):
            teacher = stage.source.taps(teacher_names, batch, students, index, step)
            for match in matches:
                value, unit = match.loss(student, teacher, batch, self.projections, step)
                value = value if share is None else value * share[UNITS.index(unit)]
                parts[stage.matches.index(match)] += value.detach()
                total = total + value
        return {"loss": total, "parts": parts}


class DistillTrainer(Trainer):
    """Trains `student` on `stage`. Everything else is the Trainer's: args, callbacks, evaluation, resume, torchrun,
    accelerate.

    train_dataset defaults to stage.data. Raises DistillError when student and teacher do not share a vocabulary.

    FSDP of single layers works where each layer's output reaches a loss: that is when torch gathers it for backward.
    MiniLM's last layer gives its q, k and v alone; there the module has to be sharded whole.
    """

    def __init__(self, student: PreTrainedModel, stage: Stage, args: TrainingArguments | None = None, **kwargs):
        if stage.source is None:
            raise DistillError(f"stage {stage.name!r} has no source of teacher tensors")
        teacher = stage.source.config
        if teacher is not None and teacher.vocab_size != student.config.vocab_size:
            raise DistillError(
                "one tokenizer serves both models, but the vocabularies differ: "
                f"student [{student.config.vocab_size}], teacher [{teacher.vocab_size}]"
            )
        args = args or TrainingArguments()
        args.remove_unused_columns = False  # the module takes the whole batch
        kwargs.setdefault("train_dataset", stage.data)
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or ()), *stage.hooks]
        super().__init__(Distillation(student, stage), args, **kwargs)
        if args.n_gpu > 1:
            raise DistillError("DataParallel loses taps: start one process a GPU with torchrun")
        stage.source.to(args.device)
        self.stage = stage
        self.loss_is_scaled_for_ga = True
        self._parts, self._parts_since, self._unfinished = None, 0, None

    @property
    def student(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model).student

    def student_state(self) -> dict[str, torch.Tensor]:
        """The student's weights, gathered where they are sharded: every process calls this."""
        return _student_part(self.accelerator.get_state_dict(self.model))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        training = model.training
        outputs = model(
            step=self.state.global_step,
            totals=num_items_in_batch if training else None,
            processes=self.accelerator.num_processes,
            **inputs,
        )
        if training:
            parts = outputs["parts"].detach()
            if self._parts is None:
                self._parts, self._parts_since = torch.zeros_like(parts), self.state.global_step
            self._parts += parts
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _get_num_items_in_batch(self, batch_samples, device):
        if not batch_samples:
            return None
        return self.accelerator.reduce(sum(count(batch) for batch in batch_samples).to(device), "sum")

    def create_optimizer(self, model=None):
        module = self.model if model is None else model
        groups = [(re.compile(group.pattern), group) for group in self.stage.groups]

        def group_of(name):
            return next((group for pattern, group in groups if pattern.search(name)), None)

        chosen = {name: group_of(name) for name, _ in module.named_parameters()}
        for name, parameter in module.named_parameters():
            if chosen[name] is not None and chosen[name].freeze:
                parameter.requires_grad_(False)
        optimizer = super().create_optimizer(model)
        by_parameter = {id(parameter): chosen[name] for name, parameter in module.named_parameters()}
        split = []
        for group in optimizer.param_groups:
            for setting in (None, *self.stage.groups):
                own = [p for p in group["params"] if by_parameter.get(id(p)) is setting]
                changes = {} if setting is None else {"lr": setting.lr, "weight_decay": setting.weight_decay}
                if own:
                    split.append(group | {"params": own} | {k: v for k, v in changes.items() if v is not None})
        optimizer.param_groups[:] = split
        return optimizer

    def log(self, logs, start_time=None):
        if "loss" in logs and self._parts is not None and len(self.stage.matches) > 1:
            steps = max(self.state.global_step - self._parts_since, 1)
            parts = self.accelerator.reduce(self._parts, "mean") / steps
            logs |= {
                f"loss_{i}_{match.op}": part
                for i, (match, part) in enumerate(zip(self.stage.matches, parts.tolist(), strict=True))
            }
            self._parts = None
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        """The student as a plain transformers folder, everything else that is trained in one file beside it."""
        if not self.args.should_save:
            return
        output_dir = Path(output_dir or self.args.output_dir)
        module = self.accelerator.unwrap_model(self.model)
        state = module.state_dict() if state_dict is None else state_dict
        module.student.save_pretrained(output_dir, state_dict=_student_part(state))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        rest = {name: value.contiguous() for name, value in state.items() if not name.startswith("student.")}
        save_file(rest, output_dir / STAGE_FILE)

    def _save_checkpoint(self, model, trial):
        """The Trainer's checkpoint, written to a folder beside and renamed: a kill at any moment leaves no half of
        one.
        """
        folder = Path(super()._get_output_dir(trial))
        self._unfinished = folder / "unfinished"
        if self.args.should_save:
            shutil.rmtree(self._unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            written, self._unfinished = self._unfinished / f"checkpoint-{self.state.global_step}", None
        self.accelerator.wait_for_everyone()
        final = folder / written.name
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == written:
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(written / "trainer_state.json"))
        if self.args.should_save:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(written, final)
            written.parent.rmdir()
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        check(resume_from_checkpoint)
        module = self.accelerator.unwrap_model(self.model)
        saved = type(module.student).from_pretrained(resume_from_checkpoint, dtype=module.student.dtype)
        module.student.load_state_dict(saved.state_dict())
        rest = load_file(Path(resume_from_checkpoint) / STAGE_FILE)
        own = {name for name in module.state_dict() if not name.startswith("student.")}
        if rest.keys() != own:
            raise DistillError(
                f"checkpoint {resume_from_checkpoint}: {STAGE_FILE} is of another stage: it holds "
                f"{sorted(rest) or 'nothing'}, this stage needs {sorted(own) or 'nothing'}"
            )
        module.load_state_dict(rest, strict=False)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _student_part(state: dict) -> dict:
    return {name.removeprefix("student."): value for name, value in state.items() if name.startswith("student.")}
