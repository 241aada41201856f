"""The CUDA library where there is nvcc and no GPU: it loads beside a CPU build of torch, and no kernel of it spills."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import kdkernels

ROOT = Path(__file__).parent.parent
LIBRARY = Path(kdkernels.__file__).parent / "libkdkernels_cuda.so"
OPS = ("kd_loss", "kd_loss_backward")

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library was not built: no nvcc")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@needs_library
@pytest.mark.parametrize("op", OPS)
def test_registers_beside_any_torch(op):
    """`import kdkernels` has loaded it, on a build of torch without CUDA too."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kdkernels::{op}", "CUDA")


@needs_library
def test_needs_no_cuda_library():
    """The CUDA runtime is inside and opens the driver itself; torch's stream getter is looked up and not linked."""
    undefined = subprocess.run(["nm", "-D", "-u", LIBRARY], check=True, capture_output=True, text=True).stdout
    symbols = [line.split()[-1].split("@")[0] for line in undefined.splitlines()]
    assert "aoti_torch_create_device_guard" in symbols
    assert not [name for name in symbols if name.startswith(("cu", "__cuda")) or "cuda_stream" in name]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """{(arch, kernel): (registers, spilled bytes)} from ptxas, for what CMakeLists.txt builds by default."""
    archs = re.search(r'KDKERNELS_CUDA_ARCHS "([^"]+)"', (ROOT / "CMakeLists.txt").read_text())[1].split(";")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    output = tmp_path_factory.mktemp("ptxas") / "kd_loss.cubins"
    source = ROOT / "csrc" / "cuda" / "kd_loss.cu"
    command = ["nvcc", "-std=c++20", "-O3", *targets, "-Xptxas=-v", "--fatbin", "-o", output, source]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    pattern = r"entry function '(\S+)' for '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) reg"
    return {
        (arch, name): (int(registers), int(stores) + int(loads))
        for name, arch, stores, loads, registers in re.findall(pattern, log, flags=re.DOTALL)
    }


@needs_nvcc
def test_kernels_spill_nothing(report):
    """90 kernels (kind, two dtypes, forward and backward) and two that add rows up, per architecture."""
    assert len(report) == 2 * 92
    assert not {kernel: spilled for kernel, (_, spilled) in report.items() if spilled}
    # Two blocks of 512 threads on a multiprocessor have 64 registers a thread.
    assert max(registers for registers, _ in report.values()) <= 64
