"""The resource report of GPU kernels: CUDA C++ kernels stay within their limits (Triton's: test_triton_compile.py), and
the report sees what is beyond one."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benches import gpu_resources
from benches.gpu_resources import Kernel, Limit, occupancy
from kdkernels import _native

ROOT = Path(__file__).parent.parent
needs_library = pytest.mark.skipif(not gpu_resources.LIBRARY.exists(), reason="the CUDA library was not built: no nvcc")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
# Keeps 96 values across a barrier; a thread of 1024 has 64 registers.
SPILLING = """
namespace { __global__ void __launch_bounds__(1024) spilling(float* x) {
  float kept[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) x[(95 - i) * 1024 + threadIdx.x] = kept[i] * kept[i / 2];
} }
void run(float* x) { spilling<<<1, 1024>>>(x); }
"""


@needs_library
def test_kernels_stay_within_their_limits():
    found = gpu_resources.of_library()
    archs = _native.build_info()["cuda_archs"].split(",")
    sources = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu") if "__global__" in path.read_text()}
    assert {kernel.arch for kernel in found} == {f"sm_{arch}" for arch in archs}
    assert {kernel.name.split("::")[0] for kernel in found} == sources
    assert [kernel for kernel in found if kernel.excess] == []


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "expected"),
    [
        ("sm_80", 512, 64, 0, 0.5),  # registers: two blocks
        ("sm_80", 512, 65, 0, 0.25),  # a warp's come in multiples of 256
        ("sm_90a", 128, 217, 68 << 10, 8 / 64),  # 219 KB would hold three
        ("sm_90", 32, 16, 0, 0.5),  # 32 blocks at most
        ("sm_80", 128, 32, 54 << 10, 8 / 64),  # 55 KB of 164 with what is reserved: two
        ("sm_90a", 128, 32, 54 << 10, 16 / 64),  # of 228: four
        ("sm_75", 256, 32, 0, 1.0),
        ("sm_100", 1024, 64, 0, 0.5),
    ],
)
def test_occupancy(arch, threads, registers, shared, expected):
    assert occupancy(arch, threads, registers, shared) == expected


@needs_nvcc
def test_spills_are_seen(tmp_path):
    (tmp_path / "spilling.cu").write_text(SPILLING)
    library = tmp_path / "spilling.so"
    options = ["-arch=sm_80", "-Xcompiler=-fPIC", "-shared"]
    subprocess.run(["nvcc", *options, tmp_path / "spilling.cu", "-o", library], check=True)
    (kernel,) = gpu_resources.of_library(library)
    assert (kernel.name, kernel.threads, kernel.registers) == ("spilling::spilling", 1024, 64)
    assert kernel.stack > 0 and kernel.spill_stores > 0 and kernel.spill_loads > 0
    assert re.fullmatch(r"\d+ stack, limit 0", kernel.excess)


def kernel(name, registers=64, stack=0, arch="sm_80", variant="float"):
    return Kernel(name, variant, arch, 512, registers, stack, 0, 0, 0, 0.5)


@pytest.mark.parametrize(
    ("name", "arch", "variant", "beyond"),
    [
        ("kd_loss::forward", "sm_80", "float", True),
        ("triton::_attention::forward_kernel", "sm_80", "none, bfloat16", False),
        ("triton::_attention::forward_kernel", "sm_90a", "none, float32", False),
        ("triton::_attention::forward_kernel", "sm_90a", "none, bfloat16", True),
    ],
)
def test_hot_kernels_may_not_spill(name, arch, variant, beyond):
    assert kernel(name, arch=arch, variant=variant).excess == ""
    assert bool(kernel(name, stack=8, arch=arch, variant=variant).excess) == beyond


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_resources, "LIMITS", {"kd_loss::": Limit(64), "": Limit()})
    found = [kernel("kd_loss::forward"), kernel("other::kernel", 200)]
    monkeypatch.setattr(gpu_resources, "of_library", lambda: found)
    assert gpu_resources.main(["cuda", "--out", str(tmp_path / "new" / "kernels.csv")]) == 0
    assert [row["registers"] for row in csv.DictReader((tmp_path / "new" / "kernels.csv").open())] == ["64", "200"]
    found.append(kernel("kd_loss::forward", 65))
    assert gpu_resources.main(["cuda", "--all", "--out", str(tmp_path / "kernels.json")]) == 1
    rows = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    assert [row["excess"] for row in rows] == ["", "", "65 registers, limit 64"]
    shown = capsys.readouterr()
    assert shown.out.count("kd_loss::forward") == 3
    assert shown.err == "gpu_resources: kd_loss::forward<float> for sm_80: 65 registers, limit 64\n"


def test_command_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_resources.of_library, "__defaults__", (tmp_path / "libkdkernels_cuda.so",))
    assert gpu_resources.main(["cuda"]) == 2
    assert capsys.readouterr().err == "gpu_resources: libkdkernels_cuda.so was not built: no nvcc\n"
    for wrong in (["metal"], ["cuda", "--out", "kernels.txt"]):
        with pytest.raises(SystemExit):
            gpu_resources.main(wrong)
