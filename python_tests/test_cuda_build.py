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
OPS = ("kd_loss", "kd_loss_backward", "quant_prepare", "quant_linear")

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library was not built: no nvcc")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@needs_library
@pytest.mark.parametrize("op", OPS)
def test_registers_beside_any_torch(op):
    """`import kdkernels` has loaded it, on a build of torch without CUDA too."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kdkernels::{op}", "CUDA")


def test_attention_of_packed_tokens_falls_back_to_torch():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("kdkernels::varlen_attention", "CUDA")


@needs_library
def test_needs_no_cuda_library():
    """The CUDA runtime is inside and opens the driver itself; torch's stream getter is looked up and not linked."""
    undefined = subprocess.run(["nm", "-D", "-u", LIBRARY], check=True, capture_output=True, text=True).stdout
    symbols = [line.split()[-1].split("@")[0] for line in undefined.splitlines()]
    assert "aoti_torch_create_device_guard" in symbols
    assert not [name for name in symbols if name.startswith(("cu", "__cuda")) or "cuda_stream" in name]


def report(source: str, tmp_path) -> dict[tuple[str, str], tuple[int, int]]:
    """{(arch, kernel): (registers, spilled bytes)} from ptxas, for what CMakeLists.txt builds by default."""
    archs = re.search(r'KDKERNELS_CUDA_ARCHS "([^"]+)"', (ROOT / "CMakeLists.txt").read_text())[1].split(";")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    command = ["nvcc", "-std=c++17", "-O3", *targets, "-Xptxas=-v", "--fatbin", "-o", tmp_path / "cubins"]
    log = subprocess.run([*command, ROOT / "csrc" / "cuda" / source], check=True, capture_output=True, text=True).stderr
    pattern = r"entry function '(\S+)' for '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) reg"
    return {
        (arch, name): (int(registers), int(stores) + int(loads))
        for name, arch, stores, loads, registers in re.findall(pattern, log, flags=re.DOTALL)
    }


# Kernels per architecture, and the most registers a thread: what the blocks that a multiprocessor shall hold leave.
LIMITS = {
    "kd_loss.cu": (92, 64),  # kind, two dtypes, forward and backward; two that add rows up. Two blocks of 512 threads
    "quant_linear.cu": (9, 255),  # bits, size of tiles; segments. Two blocks of 128 threads
    "quant_rows.cu": (3, 64),  # dtypes
}


@needs_nvcc
@pytest.mark.parametrize("source", LIMITS)
def test_kernels_spill_nothing(source, tmp_path):
    kernels, most = LIMITS[source]
    found = report(source, tmp_path)
    assert len(found) == 2 * kernels
    assert not {kernel: spilled for kernel, (_, spilled) in found.items() if spilled}
    assert max(registers for registers, _ in found.values()) <= most
