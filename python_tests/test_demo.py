"""The demo end to end on a tiny teacher, its measurements against computations by hand, and its texts."""

import json

import pytest
import torch
from transformers import AutoModel

from kdkernels.cli import main
from kdkernels.demo import corpus, measure, packaged_teacher
from kdkernels.distill import DistillError

from . import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def test_demo_end_to_end(tmp_path, capsys):
    tiny.save_teacher(tmp_path / "teacher", head=False)
    (tmp_path / "texts.txt").write_text("\n".join(tiny.texts(200)))
    argv = [
        "demo",
        "--out",
        str(tmp_path / "out"),
        "--teacher",
        str(tmp_path / "teacher"),
        "--text",
        str(tmp_path / "texts.txt"),
    ]
    assert main([*argv, "--layers", "2", "--epochs", "15", "--length", "24"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["train_texts"] + report["held_out_texts"] == len(set(tiny.texts(200)))
    assert report["after"]["similarity"] > report["before"]["similarity"]
    assert report["student"]["parameters"] < report["teacher"]["parameters"]
    assert [point["step"] for point in report["curve"]][-1] == 30
    for way in ("fused", "eager"):
        assert 0 < report["step"][way]["losses_ms"]
    assert (tmp_path / "out" / "demo.png").read_bytes()[:4] == b"\x89PNG"
    assert AutoModel.from_pretrained(tmp_path / "out" / "student").config.num_hidden_layers == 2
    printed = capsys.readouterr().out
    assert "nearest neighbours" in printed and "relation_kl(qkv.-1, qkv.-1" in printed


def test_measurements():
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=-1)
    y = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=-1)
    assert measure.similarity(x, x) == pytest.approx(1) and measure.neighbour_overlap(x, x) == 1
    shared = 0
    for i in range(40):
        near = [set(sorted((j for j in range(40) if j != i), key=lambda j: -float(z[i] @ z[j]))[:10]) for z in (x, y)]
        shared += len(near[0] & near[1])
    assert measure.neighbour_overlap(x, y) == pytest.approx(shared / 400)


def test_embeddings_come_in_the_given_order():
    model, tokenizer, texts = tiny.bert(), tiny.tokenizer(), tiny.texts(70)
    one_by_one = torch.cat([measure.embeddings(model, tokenizer, [text], 24) for text in texts[:5]])
    torch.testing.assert_close(measure.embeddings(model, tokenizer, texts, 24)[:5], one_by_one)


def test_docstrings_are_real_texts_and_the_split_is_stable():
    train, held_out = corpus.texts(None)
    assert len(train) + len(held_out) > 5000 and len(held_out) == 1000
    assert not set(train) & set(held_out)
    assert all(len(text.split()) >= 4 and "\n" not in text for text in train)
    assert (train, held_out) == corpus.texts(None)


def test_bad_input(tmp_path, capsys):
    (tmp_path / "few.txt").write_text("one two\n" * 300)
    with pytest.raises(DistillError, match="1 different texts are too few"):
        corpus.texts(str(tmp_path / "few.txt"))
    assert main(["demo", "--teacher", "/nowhere", "--out", str(tmp_path)]) == 2
    assert main(["demo", "--text", "/nowhere", "--out", str(tmp_path)]) == 2
    assert main(["demo", "--epochs", "0", "--out", str(tmp_path)]) == 2
    assert main(["demo", "--layers", "7", "--out", str(tmp_path / "layers")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert packaged_teacher().endswith("model")
