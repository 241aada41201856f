"""`kdkernels quantize`: what it prints and writes, its quality gate, and one clear line for bad input."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from safetensors.torch import load_file, save_file

from kdkernels.cli import main

from . import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def teacher(tmp_path):
    return str(tiny.save_teacher(tmp_path / "teacher"))


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(tiny.texts(40)))
    return str(tmp_path / "texts.txt")


def test_it_reports_and_writes(teacher, texts, tmp_path, capsys):
    assert main(["quantize", teacher, str(tmp_path / "out"), "--bits", "4", "--text", texts]) == 0
    printed = capsys.readouterr().out
    assert "cosine, mean" in printed and "classes changed" in printed and "on 40 texts" in printed
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.bert.encoder.layer[0].output.dense.scheme.bits == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "teacher", "texts.txt"]


@pytest.mark.parametrize("gate", [["--min-cosine", "0.99999"], ["--max-drop", "0.0"]])
def test_the_gate_writes_nothing(teacher, texts, tmp_path, capsys, gate):
    assert main(["quantize", teacher, str(tmp_path / "out"), "--bits", "2", "--text", texts, *gate]) == 1
    assert "quality gate: " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def change_config(folder, **fields):
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "not/a/folder"}, "MODEL not/a/folder: no such folder"),
        ({"model": "full"}, "MODEL .*full is no folder that save_pretrained of transformers wrote"),
        ({"model": "bare"}, "MODEL .*bare has no tokenizer"),
        ({"model": "cut"}, "MODEL .*cut can't be loaded"),
        ({"model": "misfit"}, "MODEL .*misfit can't be loaded: its weights don't have the shapes of its config.json"),
        ({"model": "renamed"}, r"MODEL .*renamed can't be loaded: its files lack .* weights, bert\."),
        ({"model": "writer"}, "MODEL .*writer is a GPT2LMHeadModel, which is no encoder of texts"),
        ({"model": "images"}, "MODEL .*images is a ViTModel, which is no encoder of texts"),
        ({"out": "full"}, "OUT must be a folder that is new or empty, got .*full"),
        ({"out": "full/file/out"}, "OUT .*out can't be made: .*file is no folder"),
        ({"--text": "none.txt"}, "none.txt"),
        ({"--min-cosine": "98"}, "--min-cosine must be a number from 0 to 1, got 98"),
        ({"--max-drop": "nan"}, "--max-drop must be a number from 0 to 1, got nan"),
        ({"--skip": "nothing"}, "skip names 'nothing'"),
    ],
)
def test_bad_input(teacher, texts, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    tiny.bert().save_pretrained("bare")
    shutil.copytree(teacher, "cut")
    os.truncate("cut/model.safetensors", 9999)
    transformers.ViTModel(
        transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16)
    ).save_pretrained("images")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1)).save_pretrained("writer")
    for folder in ("images", "writer"):
        tiny.tokenizer().save_pretrained(folder)
    shutil.copytree(teacher, "misfit")
    change_config("misfit", intermediate_size=24)
    shutil.copytree(teacher, "renamed")
    tensors = load_file("renamed/model.safetensors")
    save_file(
        {f"other.{name}": tensor for name, tensor in tensors.items()}, "renamed/model.safetensors", {"format": "pt"}
    )
    given = {"model": teacher, "out": "out", "--text": texts, **change}
    options = [word for name, value in given.items() if name.startswith("--") for word in (name, value)]
    capsys.readouterr()  # bars of what was saved here
    assert main(["quantize", given["model"], given["out"], *options]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_name_without_a_network(texts, tmp_path, monkeypatch, capsys):
    """An answer at once, where huggingface_hub waits and tries again for 25 s; nothing listens on the port."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda _seconds: pytest.fail("it waits"))
    assert main(["quantize", "somebody/something", str(tmp_path / "out"), "--text", texts]) == 2
    assert "MODEL somebody/something: no such folder, and the Hub can't be reached" in capsys.readouterr().err


def test_twice(teacher, texts, tmp_path, capsys):
    assert main(["quantize", teacher, str(tmp_path / "out"), "--text", texts]) == 0
    assert main(["quantize", str(tmp_path / "out"), str(tmp_path / "again"), "--text", texts]) == 2
    assert "quantised already" in capsys.readouterr().err


def test_an_interrupt_writes_nothing(teacher, texts, tmp_path, monkeypatch, capsys):
    def stop(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("kdkernels.quant.report.save", stop)
    assert main(["quantize", teacher, str(tmp_path / "out"), "--text", texts]) == 130
    assert capsys.readouterr().err == "\nkdkernels quantize: interrupted\n"
    assert not (tmp_path / "out").exists()
