"""A distillation killed at any moment and started again ends bit for bit where an unbroken one ends; two processes
agree with one.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from kdkernels.cli import main
from kdkernels.distill.checkpoints import STAGE_FILE, latest

from . import tiny

HERE = Path(__file__).parent

# Kills itself at a chosen moment: "step" N: at the start of optimiser step N; "write" N: with the N-th torch.save half
# done; "rename" N: just after the N-th checkpoint got its name, before an old one is deleted.
SABOTAGE = """
import os, signal, sys, torch, transformers
torch.set_num_threads(1)
where, when, config = sys.argv[1], int(sys.argv[2]), sys.argv[3]
calls = 0
def sabotaged(function, half=False):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == when:
            if half:
                open(args[1], "wb").write(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
if where == "step":
    transformers.Trainer.training_step = sabotaged(transformers.Trainer.training_step)
elif where == "write":
    torch.save = sabotaged(torch.save, half=True)
else:
    import kdkernels.distill.trainer as trainer
    trainer.rotate_checkpoints = sabotaged(trainer.rotate_checkpoints)
from kdkernels.cli import main
sys.exit(main(["distill", config]))
"""


def write_config(folder: Path, output: str, **changes) -> Path:
    config = {
        "recipe": "tinybert",
        "teacher": str(folder / "teacher"),
        "output": str(folder / output),
        "data": {"train": str(folder / "texts.txt"), "labels": "leading"},
        "batch_size": 8,
        "epochs": 2,
        "max_length": 24,
        "options": {"layers": 2, "hidden_size": 16, "intermediate_size": 32},
        "training": {"save_steps": 4, "logging_steps": 2, "use_cpu": True, "learning_rate": 1e-3},
    }
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    return path


@pytest.fixture(scope="module", autouse=True)
def single_threaded():
    """As the subprocesses: waiting for a second thread costs tiny models more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume")
    # With dropout, so that the random state matters.
    tiny.save_teacher(path / "teacher", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    (path / "texts.txt").write_text("\n".join(f"{i % 3} {text}" for i, text in enumerate(tiny.texts(43))))
    return path


@pytest.fixture(scope="module")
def unbroken(folder, single_threaded):
    assert main(["distill", str(write_config(folder, "unbroken"))]) == 0
    return load_file(folder / "unbroken" / "student" / "model.safetensors")


def losses(output: Path) -> dict[str, list]:
    return {
        log.parent.name: [
            {k: v for k, v in line.items() if "loss" in k} for line in json.loads(log.read_text()) if "loss" in line
        ]
        for log in output.glob("*/log.json")
    }


def environment() -> dict:
    paths = [os.environ.get("PYTHONPATH", ""), str(HERE.parent)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("where", "when"),
    [("write", 7), ("rename", 2), ("step", 17)],
    ids=["in a half-written checkpoint", "after a rename", "in stage 2"],
)
def test_killed_and_started_again_ends_with_the_same_numbers(folder, unbroken, where, when):
    output = f"killed-{where}-{when}"
    config = write_config(folder, output)
    killed = subprocess.run(
        [sys.executable, "-c", SABOTAGE, where, str(when), str(config)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert latest(folder / output / "stage-1-general") is not None
    assert not (folder / output / "student").exists()
    assert main(["distill", str(config)]) == 0
    resumed = load_file(folder / output / "student" / "model.safetensors")
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    assert losses(folder / output) == losses(folder / "unbroken")


def test_a_finished_run_is_left_alone(folder, unbroken):
    before = (folder / "unbroken" / "student" / "model.safetensors").stat().st_mtime_ns
    assert main(["distill", str(folder / "unbroken.yaml")]) == 0
    assert (folder / "unbroken" / "student" / "model.safetensors").stat().st_mtime_ns == before


def test_exported_student_is_plain(folder, unbroken):
    student = folder / "unbroken" / "student"
    assert sorted(p.name for p in student.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    assert not [
        name
        for name in unbroken
        if "projection" in name or "fit" in name or not name.startswith(("bert.", "classifier."))
    ]
    code = (
        "import sys, transformers as t; t.AutoModel.from_pretrained(sys.argv[1]); assert 'kdkernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(student)], check=True, cwd=student, capture_output=True)
    assert AutoModel.from_pretrained(student).config.num_hidden_layers == 2
    assert AutoModelForSequenceClassification.from_pretrained(student).config.num_labels == 3


def test_projections_are_trained_and_checkpointed_with_their_stage(folder, unbroken):
    stage = folder / "unbroken" / "stage-1-general"
    early, late = (load_file(stage / f"checkpoint-{step}" / STAGE_FILE) for step in (8, 10))
    assert {name: tuple(value.shape) for name, value in late.items()} == {
        "projections.fit.weight": (24, 16),
        "projections.fit.bias": (24,),
    }
    assert not torch.equal(early["projections.fit.weight"], late["projections.fit.weight"])


def test_two_processes_give_the_single_process_result(folder):
    """Texts of uneven length, two steps of accumulation: a mean of the parts' means would be another loss.

    Adam divides rounding noise by itself where a gradient is 0 in exact arithmetic (key biases under a softmax): a
    larger epsilon keeps that out of the comparison.
    """
    teacher = tiny.save_teacher(folder / "teacher-no-dropout")
    training = {"save_steps": 100, "logging_steps": 1, "use_cpu": True, "learning_rate": 1e-3, "adam_epsilon": 1e-4}
    shared = {"teacher": str(teacher), "epochs": 1}
    one = write_config(folder, "one", **shared, training=training)
    two = write_config(folder, "two", **shared, training=training | {"gradient_accumulation_steps": 2})
    assert main(["distill", str(one)]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29511"]
    ran = subprocess.run(
        [*torchrun, "-m", "kdkernels", "distill", str(two)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    expected, got = (load_file(folder / output / "student" / "model.safetensors") for output in ("one", "two"))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
    for stage, lines in losses(folder / "one").items():
        for before, after in zip(lines, losses(folder / "two")[stage], strict=True):
            assert after == pytest.approx(before, rel=1e-4), stage
