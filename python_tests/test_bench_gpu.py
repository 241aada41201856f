"""The GPU's benches where there is no GPU: every row is built, compared and run in a small shape."""

import csv
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benches import gpu_check, gpu_rows, gpu_table, machine, roofline
from benches.gpu_cases import OURS, cases

from .case import Target
from .cases import BENCHES

pytestmark = pytest.mark.usefixtures("one_thread")
CEILINGS = roofline.Ceilings(1e10, 1e11, "made up")


def of(name):
    return next(case for case in cases() if case.name == name)


def measure(case, seconds=0.001, small=True, **options):
    return gpu_rows.measure(case, "cpu", small, seconds, CEILINGS, {"machine": "test"}, **options)


def test_every_case_has_a_name_of_its_own():
    assert len({case.id for case in cases()}) == len(cases())


def test_dry_run_of_everything(tmp_path, monkeypatch, capsys):
    """gpu_check's parts by name, and every row of gpu_rows in processes of their own, on one thread too."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert all(part["status"] == "passed" for part in report["parts"])
    rows = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    assert rows == report["rows"]
    assert {row["variant"] for row in rows} == {"dry run"}
    ours = [row for row in rows if row["implementation"] == OURS]
    assert [(row["op"], row["case"]) for row in ours] == [(case.op, case.name) for case in cases()]
    assert not any(part["without_row"] for part in report["parts"])
    with_targets = {(row["case"], row["implementation"]) for row in rows if row["target"]}
    assert with_targets >= {(case.name, peer) for case in cases() for peer in case.targets}
    with_targets = {row["case"]: row["target"] for row in ours if row["target"]}
    assert with_targets == {
        "bert_base_32x128_int8": "0.95 ms",
        "bert_base_1x128_int8": "0.32 ms",
        "w8a8_4096x768x3072_gelu": "55 %",
    }
    shown = capsys.readouterr().out
    assert "test_cuda_gpu" in shown and "losses-kd_loss kl_8192x128256_bf16 jsd_8192x128256_bf16" in shown


def test_what_has_goals_comes_first():
    """Nothing is left out: what the project has goals for, then the rest."""
    parts = gpu_check.bench_parts(Path("gpu.csv"), dry=False)
    losses = [case for case in BENCHES if case.device == "cuda"]
    goals = [*(case.id for case in cases() if case.has_goals), *(case.id for case in losses if case.target != Target())]
    rest = {case.id for case in (*cases(), *losses)} - {*goals}
    ids = [case.id for part in parts for case in part.cases]
    assert ids[: len(goals)] == goals and {*ids[len(goals) :]} == rest and len(ids) == len({*ids})
    assert len({part.name for part in parts}) == len(parts)


def test_a_row():
    case = of("w4a16_16x4096x4096")
    ours, peer = measure(replace(case, targets={"torch bf16": 1e-9}, share=1e9))
    assert (ours["implementation"], ours["dtype"], ours["ratio"]) == (OURS, "bfloat16", None)
    assert ours["target"] == "1e+09 %" and ours["reached"] is False
    assert peer["ratio"] > 0 and peer["reached"]
    assert ours["loss_error"] < 1e-2 and ours["percent_of_ceiling"] > 0
    assert "(target 1e+09 %)" in gpu_rows.line(ours) and "(target 1e-09x)" in gpu_rows.line(peer)
    for milliseconds in (1e9, 1e-9):
        ours, *_ = measure(replace(case, milliseconds=milliseconds))
        assert ours["target"] == f"{milliseconds:g} ms" and ours["reached"] is (milliseconds > 1)


def test_wrong_results_are_not_timed(capsys):
    case = of("w4a16_16x4096x4096")
    build = case.build

    def wrong(name, factor):
        def built(device, small):
            made = build(device, small)
            calls = made.calls | {name: lambda i: factor * made.calls[name](i)}
            return replace(made, calls=calls)

        return replace(case, build=built)

    with pytest.raises(ArithmeticError, match="not timed"):
        measure(wrong(OURS, 1.1))
    assert [row["implementation"] for row in measure(wrong("torch bf16", 3.0))] == [OURS]
    assert "torch bf16 computes something else" in capsys.readouterr().err


def with_peer(case, call):
    """The case with one more peer, of that name."""
    return replace(case, build=lambda *how: (built := case.build(*how), built.calls.update(peer=call))[0])


def breaks(i):
    raise TypeError("an argument that another version has")


@pytest.mark.parametrize(
    ("call", "said"),
    [(breaks, "TypeError: an argument that another version has"), (lambda i: time.sleep(60), "OutOfTime: not ready")],
)
def test_a_peer_that_breaks_or_takes_too_long_is_left_out(call, said, capsys):
    rows = measure(with_peer(of("w4a16_16x4096x4096"), call), peer_seconds=0.5)
    assert [row["implementation"] for row in rows] == [OURS, "torch bf16"]
    assert f"peer is left out: {said}" in capsys.readouterr().err


def test_a_case_that_fails_loses_its_own_rows_alone(tmp_path, monkeypatch, capsys):
    first, second = (of(name) for name in ("w4a16_16x4096x4096", "w2a16_16x4096x4096"))
    monkeypatch.setattr(gpu_rows, "cases", lambda: (replace(first, build=lambda *how: breaks(0)), second))
    monkeypatch.setattr(gpu_rows.machine, "facts", lambda device: {"machine": device})
    table = tmp_path / "gpu.csv"
    assert gpu_rows.main(["--dry-run", "--seconds", "0.001", "--csv", str(table)]) == 1
    assert {row["case"] for row in csv.DictReader(table.open())} == {second.name}
    assert f"{first.id}: TypeError: an argument" in capsys.readouterr().err
    monkeypatch.setattr(gpu_rows.machine, "is_lost", lambda device: True)
    assert gpu_rows.main(["--dry-run", "--csv", str(table)]) == gpu_rows.machine.LOST


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16], ids=str)
def test_ceilings(dtype):
    ceilings = roofline.measure_products("cpu", dtype, small=True)
    assert (
        ceilings.bandwidth > 0 and ceilings.arithmetic > 0 and str(dtype).removeprefix("torch.") in ceilings.described
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(capsys):
    assert gpu_rows.main([]) == 2
    assert capsys.readouterr().err == "benches.gpu_rows: torch sees no GPU; --dry-run needs none\n"
    with pytest.raises(SystemExit):
        gpu_rows.main(["quant_linea"])
    assert gpu_rows.main(["quant_linear", "--list"]) == 0
    assert "w8a8_4096x768x3072_gelu" in capsys.readouterr().out


def row(op, case, implementation, **values):
    empty = dict.fromkeys(gpu_rows.COLUMNS, "")
    return empty | {"op": op, "case": case, "implementation": implementation, "ceilings": "copy 4 TB/s"} | values


REPORT = {
    "facts": {"machine": "NVIDIA Made Up 9", "torch": "2.13.0", "triton": "3.9.0", "commit": "abc"},
    "parts": [
        {"name": "a", "tests": {"passed": 6, "failed": 1, "error": 0, "skipped": 2}, "without_row": []},
        {"name": "b", "without_row": ["kd_loss-jsd"]},
    ],
    "rows": [
        row("kd_loss", "kl", OURS, median_ms="1.5", percent_of_ceiling="80.4", bound="bandwidth", target="85 %"),
        row("kd_loss", "kl", "eager", median_ms="15", ratio="10", target="6"),
        row(
            "quant_linear", "int8", OURS, median_ms="0.9", percent_of_ceiling="40", bound="bandwidth", target="0.95 ms"
        ),
    ],
}


def test_readme_has_the_tables():
    """`python -m benches.gpu_table` writes them."""
    assert gpu_table.main(["--check"]) == 0


def test_the_table_names_the_gpus_that_the_build_has_code_for():
    archs = re.search(r'KDKERNELS_CUDA_ARCHS "([^"]+)"', (machine.ROOT / "CMakeLists.txt").read_text())[1].split(";")
    assert gpu_table.CUDA == ", ".join(f"sm_{arch}" for arch in archs)


def test_tables_of_a_report(tmp_path, monkeypatch, capsys):
    """Kept as the device's; its op is no longer among those that no GPU has run."""
    readme, kept = tmp_path / "README.md", tmp_path / "gpu-nvidia-made-up-9.json"
    readme.write_text(f"before\n{gpu_table.BEGIN}old\n{gpu_table.END}after\n")
    monkeypatch.setattr(gpu_table, "README", readme)
    monkeypatch.setattr(gpu_table, "RESULTS", tmp_path)
    assert gpu_table.main([]) == 0
    assert readme.read_text().count(gpu_table.NOT_YET) == len(gpu_table.ROUTES)
    (tmp_path / "gpu_check.json").write_text(json.dumps(REPORT))
    assert gpu_table.main(["--check", str(tmp_path / "gpu_check.json")]) == 1
    assert gpu_table.main([]) == 0 and gpu_table.main(["--check"]) == 0
    assert json.loads(kept.read_text()) == REPORT
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert f"| `kd_loss`, CUDA C++ | {gpu_table.CUDA} | the `.cu` source under a host shim | NVIDIA Made Up 9 |" in text
    assert text.count(gpu_table.NOT_YET) == len(gpu_table.ROUTES) - 2
    assert "| `kd_loss` | kl | 1.5 | 80 % (goal 85 %) of bandwidth | eager 10.00x (goal 6x) |" in text
    assert "| `quant_linear` | int8 | 0.9 (goal 0.95 ms) | 40 % of bandwidth |  |" in text
    assert "6 tests passed, 1 failed, 2 were skipped.\nNot measured: kd_loss-jsd.\n" in text
    dry = REPORT | {"rows": [REPORT["rows"][0] | {"variant": "dry run"}]}
    for wrong in ("[]", "{", json.dumps(dry)):
        (tmp_path / "wrong.json").write_text(wrong)
        assert gpu_table.main([str(tmp_path / "wrong.json")]) == 2
    assert "a dry run's" in capsys.readouterr().err
