"""The command line: every bad input ends in one line that names it, a non-zero status and no traceback."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from kdkernels import recipes, reference
from kdkernels.cli import main
from kdkernels.distill import DistillError
from kdkernels.distill.checkpoints import check, latest
from kdkernels.distill.config import load_config

from . import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    tiny.save_teacher(path / "teacher")
    (path / "texts.txt").write_text("\n".join(f"{i % 3} {text}" for i, text in enumerate(tiny.texts(16))))
    return path


@pytest.fixture
def config(folder, tmp_path):
    def write(drop=(), **changes):
        settings = {
            "recipe": "hinton",
            "teacher": str(folder / "teacher"),
            "output": str(tmp_path / "out"),
            "data": {"train": str(folder / "texts.txt"), "labels": "leading"},
            "batch_size": 8,
            "epochs": 2,
            "max_length": 16,
            "training": {"save_steps": 2, "use_cpu": True},
        } | changes
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if key not in drop}))
        return str(path)

    return write


def fails(capsys, argv, *pieces, status=2):
    assert main(argv) == status
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    message = lines[-1]
    assert message.startswith(f"kdkernels {argv[0]}: ") and "Traceback" not in captured.err
    for piece in pieces:
        assert piece in message, message


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"recipee": 1}, ["unknown key 'recipee'", "did you mean 'recipe'", "accepted: ", "batch_size"]),
        ({"recipe": "hintn"}, ["unknown recipe 'hintn'", "hinton, minilm, tinybert"]),
        (
            {"options": {"temprature": 2}},
            ["unknown option of recipe hinton 'temprature'", "alpha, layers, temperature"],
        ),
        ({"options": {"alpha": {"linea": {"start": 1}}}}, ["unknown schedule 'linea'", "cosine, linear, piecewise"]),
        ({"options": {"alpha": {"linear": {"start": 1}}}}, ["schedule 'linear'", "end"]),
        ({"options": {"layers": 9}}, ["cannot take 9 layers from 4"]),
        ({"options": {"temperature": -1}}, ["temperature"]),
        ({"training": {"learning_rat": 1}}, ["unknown key in training 'learning_rat'", "'learning_rate'"]),
        ({"training": {"learning_rate": "fast"}}, ["learning_rate must be a number, got 'fast'"]),
        ({"training": {"lr_scheduler_type": "wavy"}}, ["wavy", "linear"]),
        ({"training": {"output_dir": "x"}}, ["output_dir is set by the runner"]),
        ({"training": [1]}, ["training must be a mapping"]),
        ({"batch_size": 0}, ["batch_size must be an integer > 0, got 0"]),
        ({"batch_size": 99}, ["batch_size 99 is larger than the 16 training texts"]),
        ({"batch_size": 7, "training": {"gradient_accumulation_steps": 2}}, ["batch_size 7", "multiple of"]),
        ({"max_length": 4096}, ["max_length 4096", "at most 40"]),
        ({"epochs": "many"}, ["epochs must be a number > 0, got 'many'"]),
        ({"seed": "x"}, ["seed must be an integer >= 0"]),
        ({"teacher": "/nowhere/teacher"}, ["teacher '/nowhere/teacher'"]),
        ({"teacher": 7}, ["teacher must be a folder"]),
        ({"data": {"train": "/nowhere/x.txt"}}, ["data file /nowhere/x.txt: no such file"]),
        ({"data": {"train": "x", "lables": "leading"}}, ["unknown key in data 'lables'"]),
        ({"stages": {"logit": {}}}, ["unknown stage 'logit'", "accepted: logits"]),
        ({"stages": {"logits": {"epoch": 1}}}, ["unknown key in stages.logits 'epoch'"]),
    ],
)
def test_bad_configs(capsys, config, changes, pieces):
    fails(capsys, ["distill", config(**changes)], *pieces)


@pytest.mark.parametrize("key", ["recipe", "teacher", "output", "data"])
def test_missing_keys(capsys, config, key):
    fails(capsys, ["distill", config(drop=[key])], f"{key} is missing")


def test_missing_and_broken_files(capsys, config, tmp_path, folder):
    fails(capsys, ["distill", "/nowhere.yaml"], "config /nowhere.yaml: no such file")
    (tmp_path / "bad.yaml").write_text("a: [1")
    fails(capsys, ["distill", str(tmp_path / "bad.yaml")], "not YAML")
    unlabelled = {"train": str(folder / "texts.txt")}
    fails(capsys, ["distill", config(data=unlabelled)], "needs a label for every text")
    broken = shutil.copytree(folder / "teacher", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    fails(capsys, ["distill", config(teacher=str(broken))], str(broken))


def test_labels_outside_the_teachers_classes(capsys, config, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(f"{i % 7} {text}" for i, text in enumerate(tiny.texts(16))))
    fails(
        capsys,
        ["distill", config(data={"train": str(path), "labels": "leading"})],
        "label 3: the student has 3 classes, 0 to 2",
    )


def test_damaged_checkpoints_and_other_runs(capsys, config, tmp_path):
    assert main(["distill", config()]) == 0
    out = tmp_path / "out"
    stage = out / "stage-1-logits"
    checkpoint = latest(stage)
    assert checkpoint.name == "checkpoint-4"
    check(checkpoint)
    shutil.rmtree(out / "student")

    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth", "stage.safetensors"):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[: len(whole) // 2])
        fails(capsys, ["distill", config()], str(checkpoint), name, "corrupt")
        flipped = bytearray(whole)
        (checkpoint / name).write_bytes(whole)
        if name == "optimizer.pt":
            flipped[len(flipped) // 2] ^= 255
            (checkpoint / name).write_bytes(flipped)
            fails(capsys, ["distill", config()], name, "corrupt")
            (checkpoint / name).write_bytes(whole)

    # A checkpoint that lacks a file was never finished: the one before is taken.
    (checkpoint / "optimizer.pt").unlink()
    assert latest(stage).name == "checkpoint-2"
    with pytest.raises(DistillError, match="optimizer. is missing"):
        check(checkpoint)

    fails(capsys, ["distill", config(epochs=3)], "another epochs", "--fresh")
    assert main(["distill", config(epochs=3), "--fresh"]) == 0
    assert latest(stage).name == "checkpoint-6"


def test_cached_and_several_teachers_run(config, folder, tmp_path):
    other = tiny.save_teacher(tmp_path / "other", seed=1)
    assert main(["distill", config(teacher=[str(folder / "teacher"), str(other)], cache_teacher=True)]) == 0
    assert (tmp_path / "out" / "stage-1-logits" / "teacher.safetensors").is_file()


def test_bf16_and_evaluation_settings_are_the_trainers(config, tmp_path):
    assert (
        main(["distill", config(training={"use_cpu": True, "bf16": True, "max_grad_norm": 0.5, "optim": "sgd"})]) == 0
    )
    from transformers import AutoModel

    assert AutoModel.from_pretrained(tmp_path / "out" / "student").dtype == torch.float32


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_example_configs_pass_the_checks(name, folder, tmp_path):
    path = Path(recipes.__file__).parent / "configs" / f"{name}.yaml"
    text = path.read_text()
    for file in ("train.txt", "corpus.txt", "texts.txt"):
        text = text.replace(f"train: {file}", f"train: {folder / 'texts.txt'}")
    for teacher in ("bert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2", "teacher"):
        text = text.replace(f"teacher: {teacher} ", f"teacher: {folder / 'teacher'} ").replace(
            f"teacher: {teacher}\n", f"teacher: {folder / 'teacher'}\n"
        )
    (tmp_path / path.name).write_text(text)
    job = load_config(str(tmp_path / path.name))
    assert job.recipe.name == name and len(job.stages) == len(job.recipe.stages)
    assert isinstance(job.stages[0].training.get("learning_rate", 0.0), float)


def test_other_commands(capsys, monkeypatch, tmp_path):
    fails(capsys, ["quantize", "no/such", str(tmp_path / "out")], "no/such", status=2)
    monkeypatch.chdir(tmp_path)
    fails(capsys, ["bench"], "checkout")
    for argv in (["--help"], ["demo", "--help"], ["distill", "--help"], ["quantize", "--help"], ["doctor", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(argv)
    with pytest.raises(SystemExit, match="2"):
        main(["distil"])


@pytest.mark.parametrize("op", ["topk_kd_loss", "quant_linear"])
def test_doctor_finds_a_wrong_op(op, monkeypatch, capsys):
    truth = getattr(reference, op)
    monkeypatch.setattr(reference, op, lambda *args, **options: truth(*args, **options) * 1.1)
    assert main(["doctor"]) == 1
    assert f"BROKEN: {op} on cpu disagrees with its reference" in capsys.readouterr().out
