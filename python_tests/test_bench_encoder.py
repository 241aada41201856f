"""The encoder bench names what is missing, times nothing that deviates, and its rows can be plotted."""

import pytest
import torch

from benches import encoder, plot_encoder, run
from benches.peers.encoder import ours, pytorch

from . import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = encoder.Case("2 x 8", (8, 5), {(encoder.BEST, encoder.OURS): 1e-6, (encoder.BEST, encoder.OURS4): 1e6})


def _missing(_model, _folder):
    raise ImportError("No module named 'made_up'")


def test_rows_and_figure(tmp_path, monkeypatch, capsys):
    model = tiny.bert()
    peers = {
        encoder.OURS: ours.int8, encoder.OURS4: ours.int4, "eager fp32": pytorch.float32, "made up": _missing,
        "eager bf16": lambda model, _: lambda *batch: -pytorch.float32(model, None)(*batch),
        encoder.BEST: pytorch.float32,
    }  # fmt: skip
    monkeypatch.setattr(encoder, "PEERS", peers)
    monkeypatch.setattr(encoder, "COSINE", 0.8)  # random weights of a standard deviation of 0.3
    ready = encoder.prepare(model, tmp_path, list(peers))
    assert "preparing made up ... not installed (No module named 'made_up')" in capsys.readouterr().out
    cosines = encoder.compare(ready, SMALL.batch(65))
    assert set(cosines) == set(ready) - {"eager bf16"} and cosines[encoder.OURS] > cosines[encoder.OURS4]
    assert "eager bf16 deviates (mean cosine -1.0000 to float32) and is not timed" in capsys.readouterr().err

    rows = encoder.measure(SMALL, {name: ready[name] for name in cosines}, 65, seconds=0.01)
    found = {row["implementation"]: row for row in rows}
    assert found[encoder.OURS]["reached"] and not found[encoder.OURS4]["reached"] and found[encoder.OURS]["ratio"] == 1
    assert all(row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in rows)
    assert all(row["real_tokens"] == 13 and row["padded_tokens"] == 16 for row in rows)
    extra = {"machine": "m", "threads": 1, "commit": "c", "when": "now"}
    rows = [{**row, "cosine": cosines[row["implementation"]], **extra} for row in rows]
    assert encoder.OURS in encoder.table(SMALL, rows) and "MISSED" in encoder.table(SMALL, rows)
    out = tmp_path / "rows.csv"
    encoder.append(out, encoder.COLUMNS, rows)
    encoder.append(out, encoder.COLUMNS, [{**row, "case": plot_encoder.MIXED} for row in rows])
    assert plot_encoder.main([str(out)]) == 0 and (tmp_path / "rows.png").stat().st_size > 10_000
    assert plot_encoder.main([str(tmp_path / "none.csv")]) == 2


def test_batches_have_their_lengths():
    for case in encoder.CASES:
        ids, mask = case.batch(30522)
        assert mask.sum(1).tolist() == list(case.lengths) and torch.equal(ids != 0, mask.bool())


def test_texts_are_shuffled(tmp_path):
    """The same 32 lines of a sorted file at every call, long ones among them."""
    path = tmp_path / "texts.txt"
    path.write_text("\n".join("1 " + "a " * count for count in range(1, 101)))
    lengths = encoder.lengths_of(path)
    assert len(lengths) == 32 and max(lengths) > 40 and lengths == encoder.lengths_of(path)
    assert set(lengths) < {count + 2 for count in range(1, 101)}  # [CLS] and [SEP]; no label


def test_command(capsys):
    assert run.main(["encoder", "--list"]) == 0
    assert "32 texts   772 real tokens of 1632" in capsys.readouterr().out
    assert run.main(["encoder", "--case", "nothing"]) == 2
