"""Every instruction set of this machine gives results as exact as the best one's; forcing one that is missing raises.

The choice is made once per process, so each ISA runs the tests of values in a process of its own; the one that this
process runs on has them in test_values.
"""

import os
import subprocess
import sys

import pytest

import kdkernels

from .isa import ABSENT, OWN, PRESENT, ROOT, SETS

USE = """
import torch, kdkernels
print(kdkernels.explain()["kd_loss"]["cpu"])
kdkernels.functional.kd_loss(torch.ones(2, 3), torch.ones(2, 3))
"""


def run(isa: str, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "KDKERNELS_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("isa", [isa for isa in PRESENT if isa != OWN])
def test_values_on(isa):
    done = run(
        isa,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "python_tests/test_values.py",
        "-k",
        # What makes several chunks of rows out of one is no ISA's: one type shows that sums go on in the next chunk.
        "test_error_against_float64 and (not chunks or chunks-float32)",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.parametrize("isa", PRESENT)
def test_forced(isa):
    done = run(isa, "-c", USE)
    assert done.returncode == 0, done.stderr
    assert f"C++ {isa}" in done.stdout


@pytest.mark.parametrize("isa", ["sse9", "AVX2", " avx2", *ABSENT])
def test_impossible(isa):
    done = run(isa, "-c", USE)
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert "KDKERNELS_CPU_ISA" in message and isa in message
    assert all(name in message for name in PRESENT), f"says what is accepted: {message}"


def test_every_kernel_set_is_built():
    assert {*SETS} >= {"generic"}
    assert "generic" in PRESENT


def test_libraries_carried_to_another_python_work(monkeypatch):
    """There `_native` does not import."""
    monkeypatch.delattr(kdkernels, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "kdkernels._native", None)
    assert all("not built for this Python" in devices["cpu"] for devices in kdkernels.explain().values())
