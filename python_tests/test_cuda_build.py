"""The CUDA library where there is nvcc and no GPU: it loads beside a CPU build of torch. What its kernels
take of a multiprocessor is in test_gpu_resources.py."""

import subprocess
from pathlib import Path

import pytest
import torch

import kdkernels

LIBRARY = Path(kdkernels.__file__).parent / "libkdkernels_cuda.so"
OPS = ("kd_loss", "kd_loss_backward", "quant_prepare", "quant_linear", "varlen_attention", "encoder")

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library was not built: no nvcc")


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
