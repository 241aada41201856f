"""The benches measure what they say: they refuse wrong results, count work and memory, and write rows that can be
plotted."""

import csv
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benches import gpu_check, plot, quant_linear, roofline, run
from benches.peers import eager
from kdkernels import functional, reference

from . import tolerance
from .case import OPS, Target, evaluate
from .cases import BENCHES, CASES, of
from .cases.attention import attention, relation
from .cases.attention_map import maps
from .cases.hidden import hidden
from .cases.logits import kd
from .cases.steps import tinybert
from .steps import STEPS, loss_of

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
SMALL = replace(
    kd("small", "a test's", (8,), 64, temperature=2.0), target=Target(eager=0.001, memory=lambda call: 4096)
)
BRIEFLY = run.Effort(peers=(run.EAGER,), seconds=0.05)
CEILINGS = roofline.Ceilings(1e10, 1e11, "made up")


def test_every_op_has_targets():
    for device in ("cpu", "cuda"):
        assert {case.op for case in BENCHES if case.device == device} == {*OPS, *STEPS}
    assert all(case.target is not None for case in BENCHES)
    assert len({case.id for case in BENCHES}) == len(BENCHES)
    assert len({case.id for case in CASES}) == len(CASES)


def test_a_row():
    ours, peer = run.measure(SMALL, BRIEFLY, CEILINGS, {"machine": "test"})
    assert (ours["implementation"], peer["implementation"]) == (run.OURS, run.EAGER)
    assert ours["p20_ms"] <= ours["median_ms"] <= ours["p80_ms"]
    assert ours["bytes"] == 3 * 8 * 64 * 4
    assert ours["percent_of_ceiling"] == pytest.approx(100 * ours["floor_ms"] / ours["median_ms"])
    assert ours["extra_reached"] and ours["extra_bytes"] <= 8 * 32 + 1024
    assert peer["ratio"] > 0 and peer["reached"]
    assert max(ours["loss_error"], ours["gradient_error"]) < 1e-5
    assert set(ours) | set(peer) <= set(run.COLUMNS)


def small(case):
    """A GPU's case, on the CPU: fewer rows, tokens, classes and layers, of the same widths, in float32, since so few
    numbers in bfloat16 say little."""
    most = {"classes": 64, "named": 8, "batch": 2, "tokens": 8, "layers": 2}
    shape = {key: min(size, most[key]) if key in most and size else size for key, size in case.shape.items()}
    mask = None if case.mask is None else tuple(min(length, 8) for length in case.mask[:2])
    shape |= {"lead": (16,)} if "lead" in shape else {}
    return replace(case, shape=shape, mask=mask, device="cpu", dtypes=SMALL.dtypes)


@pytest.mark.parametrize("case", [case for case in BENCHES if case.device == "cuda"], ids=lambda case: case.id)
def test_every_case_of_a_gpu_gives_its_rows(case):
    """All of them that can be seen without one: inputs, the faster eager code, work, memory, goals."""
    ours, peer = run.measure(small(case), run.Effort(peers=(run.EAGER,), seconds=0.01), CEILINGS, {"machine": "test"})
    assert (ours["implementation"], peer["implementation"]) == (run.OURS, run.EAGER)
    assert ours["bytes"] > 0 and ours["floor_ms"] > 0 and case.dtypes[0] == torch.bfloat16
    assert peer["target"] == case.target.eager and ours.get("target") == (
        case.target.share and f"{case.target.share} %"
    )
    assert (ours["extra_target"] is None) == (case.target.memory is None)


def test_wrong_results_are_not_timed(monkeypatch):
    monkeypatch.setattr(functional, "kd_loss", lambda *args, **options: 1.01 * reference.kd_loss(*args, **options))
    monkeypatch.setattr(run, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(run.Mismatch, match="not timed"):
        run.measure(SMALL, BRIEFLY, CEILINGS, {"machine": "test"})


def test_a_peer_that_computes_something_else_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(eager.VARIANTS, "kd_loss", (lambda *args, **options: 2 * eager.kd_loss(*args, **options),))
    rows = run.measure(SMALL, BRIEFLY, CEILINGS, {"machine": "test"})
    assert [row["implementation"] for row in rows] == [run.OURS]
    assert "left out" in capsys.readouterr().err


@pytest.mark.parametrize("op", OPS)
def test_eager_code_computes_the_same(op):
    """Its accuracy is the yardstick, so it must be the same formula: in float64 it agrees to float64's rounding."""
    for case in of(op):
        if case.spread > 10:  # where natural code gives NaN
            continue
        call = case.make(dtypes=(torch.float64, torch.float64))
        if torch.is_tensor(call.other.get("temperature")):
            call = call.with_options(temperature=call.other["temperature"].double())
        truth = evaluate(getattr(reference, op), call)
        for variant in eager.VARIANTS[op]:
            got = evaluate(variant, call)
            torch.testing.assert_close([got[0], *got[1]], [truth[0], *truth[1]], rtol=1e-7, atol=1e-12, msg=case.id)


def test_a_step_is_the_sum_of_its_losses():
    """Ours, the reference and eager code, and the work that the floor counts."""
    shape = dict(batch=3, tokens=9, layers=2, heads=2, d_s=3, d_t=5, classes=2)
    call = tinybert("", "", **shape, mask=(9, 0, 4)).make()
    s, t, mask = call.student, call.teacher, call.other["mask"]
    truth = tolerance.truth_of("tinybert_step", call)
    expected = reference.hidden_mse(s["student"], t["teacher"], mask, weight=s["weight"], bias=s["bias"])
    expected = expected - (t["teacher_logits"].softmax(-1) * s["student_logits"].log_softmax(-1)).mean()
    for layer in zip(s["q_s"], s["k_s"], t["q_t"], t["k_t"], strict=True):
        expected = expected + reference.attention_mse(*layer, mask)
    torch.testing.assert_close(truth[0], expected.detach().double())
    for library in (functional, eager):
        got = evaluate(loss_of(library, "tinybert_step"), call)
        torch.testing.assert_close([got[0], *got[1]], [truth[0], *truth[1]], check_dtype=False)
    real, rows, logits = 13, 2 * 13, 3 * 3 * 2 * 4
    attention = shape["layers"] * 2 * 3 * 2 * 9 * (2 * 3 + 5) * 4
    states = (shape["layers"] + 1) * (real * (6 + 10) + 3 * 9 * 6) * 4
    work = roofline.work("tinybert_step", call)
    assert work.bytes == attention + states + logits
    assert work.operations == 2 * rows * (2 * 8**2 + 4 * 8 * 3) + 3 * real * 6 * 6 * 10


@pytest.mark.parametrize(
    "case", [kd("", "", (64,), 100000), attention("attention_kl", "", "", batch=4, heads=60, tokens=1024, d_s=32)]
)
def test_truth_in_parts_is_the_truth(case, monkeypatch):
    monkeypatch.setattr(run, "LARGE", 1)
    small = replace(
        case, shape={**case.shape, **({"classes": 50} if case.op == "kd_loss" else {"tokens": 9, "heads": 2})}
    )
    call = small.make()
    got, expected = run._truth(case.op, call), tolerance.truth_of(case.op, call)
    torch.testing.assert_close([got[0], *got[1]], [expected[0], *expected[1]])


def test_work_counts_real_tokens_only():
    full = hidden("", "", 8, 16, batch=2)
    half = replace(full, mask=(8, 0))
    assert roofline.work("hidden_mse", full.make()).bytes == 3 * 2 * 8 * 16 * 4
    assert roofline.work("hidden_mse", half.make()).bytes == 2 * 2 * 8 * 16 * 4
    heads = attention("attention_kl", "", "", 8, 4, 6, batch=1, heads=2)
    assert roofline.work("attention_kl", heads.make()).operations == 2 * 8 * 8 * (6 * 4 + 2 * 6)
    stored = maps("attention_map_kl", "", "", 8, heads=3, mask=(8, 2))
    assert roofline.work("attention_map_kl", stored.make()).bytes == 3 * 4 * (2 * (8 * 8 + 2 * 2) + 2 * 8 * 8)
    pairs = relation("", "", 8, 12, 24, batch=1, num_heads=3)
    assert roofline.work("relation_kl", pairs.make()).operations == 8 * 8 * (12 + 24 + 2 * 12)


def test_csv_and_plot(tmp_path):
    table = tmp_path / "rows.csv"
    facts = {"machine": "test", "threads": "1", "torch": "0", "commit": "none"}
    for _ in range(2):
        run.append(table, run.COLUMNS, run.measure(SMALL, BRIEFLY, CEILINGS, facts))
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["implementation"] for row in rows] == [run.OURS, run.EAGER] * 2
    assert plot.main([str(table)]) == 0
    assert (tmp_path / "rows.png").stat().st_size > 5000
    assert plot.main([str(tmp_path / "missing.csv")]) == 2


@pytest.mark.parametrize("kind", [quant_linear.INPUT, quant_linear.DYNAMIC])
def test_rows_of_quantised_products(kind, monkeypatch):
    case = quant_linear.Case(kind, (2, 64, 128), ("int8", "int4"), "gelu", target=0.001)
    rows = quant_linear.measure(case, 0.01, {"machine": "test"})
    assert [row["scheme"] for row in rows] == ["int8", "int4"]
    assert rows[0]["reached"] and rows[0]["times_8_bit"] is None and rows[1]["times_8_bit"] > 0
    assert all(row["p20_us"] <= row["median_us"] <= row["p80_us"] and row["error"] < 1e-5 for row in rows)
    assert set(rows[0]) <= set(quant_linear.COLUMNS)

    right = quant_linear.reference.quant_linear
    monkeypatch.setattr(quant_linear.reference, "quant_linear", lambda *args, **options: 1.01 * right(*args, **options))
    monkeypatch.setattr(quant_linear, "_in_turns", lambda *_: pytest.fail("timed"))
    with pytest.raises(ArithmeticError, match="not timed"):
        quant_linear.measure(case, 0.01, {})


def test_command_line():
    def call(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "benches.run", *arguments], cwd=ROOT, capture_output=True, text=True
        )

    listed = call("relation_kl", "--list")
    assert listed.returncode == 0 and "n256_padded" in listed.stdout and "kd_loss" not in listed.stdout
    listed = call("quant_linear", "--list")
    assert listed.returncode == 0 and "quantised input 128 x 768 x 3072" in listed.stdout
    unknown = call("kd_lose")
    assert unknown.returncode == 2 and "kd_lose" in unknown.stderr.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_says_that_there_is_no_gpu(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_gpu_check_survives_failing_parts(tmp_path, monkeypatch, capsys):
    """Parts that fail, work, write one of their rows and hang, and are never reached, as on a machine with a GPU; and
    what goes on where they ended."""
    tests = "print('a.py::test[x y] PASSED [50%]\\na.py::test_b FAILED [99%]'); raise SystemExit(1)"
    first_row_alone = (
        "import pathlib, sys, time; table, _, first, *others = sys.argv[1:]; path = pathlib.Path(table)\n"
        "head = '' if path.exists() else 'op,case,implementation,median_ms,percent_of_ceiling,bound,ratio,target\\n'\n"
        "path.open('a').write(f'{head}kd_loss,{first},kdkernels,1,50,bandwidth,,\\n'); time.sleep(60 * len(others))"
    )
    names = ("first", "second", "third")
    first, second, third = (replace(SMALL, name=name, device="cuda") for name in names)

    def benches(table, dry):
        python = (sys.executable, "-c", first_row_alone, str(table))
        return [gpu_check.Part("hangs", python, 2, (first, second)), gpu_check.Part("late", python, 9, (third,))]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.machine, "facts", lambda device: {"machine": device})
    monkeypatch.setattr(gpu_check, "test_parts", lambda: [gpu_check.Part("broken", (sys.executable, "-c", tests), 9)])
    monkeypatch.setattr(gpu_check, "bench_parts", benches)

    def run(*options):
        assert gpu_check.main(["--out", str(tmp_path), *options]) == 1
        report = json.loads((tmp_path / "gpu_check.json").read_text())
        parts = [(part["name"], part["status"], part["without_row"]) for part in report["parts"]]
        return report, parts, capsys.readouterr().out

    started = time.monotonic()
    report, parts, shown = run("--budget", "2")
    assert time.monotonic() - started < 9
    assert parts[0] == ("broken", "failed", [])
    assert parts[1:] == [("hangs", "timed out", [second.id]), ("late", "not reached", [third.id])]
    assert report["parts"][0]["tests"] == {"passed": 1, "failed": 1, "error": 0, "skipped": 0}
    assert [row["case"] for row in report["rows"]] == ["first"]
    assert (tmp_path / "broken.log").read_text().startswith("a.py") and "0 of 3 parts passed" in shown
    report, parts, shown = run("--resume")
    assert [status for _, status, _ in parts] == ["failed", "passed", "passed"]
    assert [row["case"] for row in report["rows"]] == [*names] and "2 of 3 parts passed" in shown


def test_gpu_check_goes_on_behind_a_case_that_takes_its_process_down(tmp_path, monkeypatch, capsys):
    one_by_one = (
        "import os, pathlib, sys, time; table, _, *names = sys.argv[1:]; path = pathlib.Path(table)\n"
        "for name in names:\n"
        "    print(name, flush=True)\n"
        "    if 'aborts' in name: os.abort()\n"
        "    if 'hangs' in name: time.sleep(60)\n"
        "    columns = 'op,case,implementation,median_ms,percent_of_ceiling,bound,ratio,target'\n"
        "    head = '' if path.exists() else columns + chr(10)\n"
        "    path.open('a').write(f'{head}kd_loss,{name},kdkernels,1,50,bandwidth,,\\n')"
    )
    cases = tuple(replace(SMALL, name=name, device="cuda") for name in ("first", "aborts", "second", "hangs", "third"))
    part = gpu_check.Part("part", (sys.executable, "-c", one_by_one, str(tmp_path / "gpu.csv")), 2, cases)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.machine, "facts", lambda device: {"machine": device})
    monkeypatch.setattr(gpu_check, "test_parts", list)
    monkeypatch.setattr(gpu_check, "bench_parts", lambda table, dry: [part])
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [row["case"] for row in report["rows"]] == ["first", "second", "third"]
    assert report["parts"][0]["without_row"] == [cases[1].id, cases[3].id]
    assert report["parts"][0]["status"] == "timed out" and "crashed" in capsys.readouterr().out
    assert (tmp_path / "part.log").read_text().split() == [case.name for case in cases]
