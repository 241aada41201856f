"""The build as its users meet it: a wheel in an empty environment, the facts it tells, ceilings, raw kernels."""

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import kdkernels
from kdkernels import _native

ROOT = Path(__file__).parent.parent

USE_THE_WHEEL = """
import json, torch, kdkernels
student, teacher = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[2.0, 1.0]])
loss = kdkernels.functional.kd_loss(student, teacher)
loss.backward()
print(json.dumps([kdkernels.__file__, loss.item(), student.grad.tolist()]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", folder, ROOT]
    subprocess.run(command, check=True, timeout=600)
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package_and_names_its_python(wheel):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"  # _native binds to this Python
    assert wheel.name == f"kdkernels-{kdkernels.__version__}-{python}-{python}-{platform}.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert "kdkernels/libkdkernels_cpu.so" in names
    assert "kdkernels/" + Path(_native.__file__).name in names
    assert any(name.endswith(".yaml") for name in names)
    assert {name.split("/")[0] for name in names} == {"kdkernels", f"kdkernels-{kdkernels.__version__}.dist-info"}


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The wheel installed as `pip install .` ends: into a virtual environment that is empty but for torch and what else
    the package requires, which it sees where they lie."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "requirements.pth").write_text(str(Path(torch.__file__).parent.parent))
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", folder / "bin" / "python"]
    # Not what is lying beside torch: that may be an editable install of this very package.
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel], check=True, timeout=100)
    return folder


def test_the_installed_package_computes(environment, tmp_path):
    printed = subprocess.run(
        [environment / "bin" / "python", "-c", USE_THE_WHEEL], check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout
    file, loss, gradient = json.loads(printed.splitlines()[-1])
    assert Path(file).is_relative_to(environment)
    probability = 1 / (1 + np.e)
    assert loss == pytest.approx(1 - 2 * probability, rel=1e-6)  # KL of (1 - p, p) to (p, 1 - p) at a log ratio of 1
    assert gradient == [pytest.approx([2 * probability - 1, 1 - 2 * probability], rel=1e-6)]


def test_the_installed_command_works(environment, tmp_path):
    done = subprocess.run([environment / "bin" / "kdkernels", "doctor"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"C++ {_native.isa()}" in done.stdout


def test_build_facts():
    facts = _native.build_info()
    assert facts["version"] == kdkernels.__version__
    assert set(_native.isas()) <= {"amx", "avx512", "avx2", "generic"} and _native.isas()["generic"]
    assert bool(facts["cuda_archs"]) == Path(kdkernels.__file__).with_name("libkdkernels_cuda.so").exists()


def test_ceilings():
    found = _native.ceilings(threads=1, seconds=0.01, repeats=1)
    assert {"read", "copy"} <= set(found) and all(value > 0 for value in found.values())
    with pytest.raises(ValueError, match="fp31.*known: "):
        _native.measure("fp31")
    with pytest.raises(ValueError, match="threads must be >= 0"):
        _native.measure("read", threads=-1)


@pytest.mark.parametrize("isa", [isa for isa, supported in _native.isas().items() if supported])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_raw_kd_loss_is_the_kernel_of_the_op(isa, dtype):
    student, teacher = np.random.default_rng(0).normal(size=(2, 5, 37)).astype(dtype)
    call = _native.KdLossCall(isa, student, teacher, temperature=2.0)
    leaf = torch.tensor(student, requires_grad=True)
    loss = kdkernels.functional.kd_loss(leaf, torch.tensor(teacher), temperature=2.0, scale_t2=False, reduction="sum")
    loss.backward()
    assert call.forward() == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(call.backward(), leaf.grad.numpy(), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("isa", [isa for isa, supported in _native.isas().items() if supported])
def test_raw_attention_kl_is_the_kernel_of_the_op(isa):
    arrays = list(np.random.default_rng(0).normal(size=(4, 2, 19, 12)).astype(np.float32))
    q_s, k_s, q_t, k_t = (torch.tensor(array[None]) for array in arrays)
    loss = kdkernels.functional.attention_kl(
        q_s.requires_grad_(), k_s.requires_grad_(), q_t, k_t, scale_s=12**-0.5, scale_t=12**-0.5, reduction="sum"
    )
    loss.backward()
    value, grad_q, grad_k = _native.AttentionKlCall(isa, *arrays).run()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(grad_q, q_s.grad[0].numpy(), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(grad_k, k_s.grad[0].numpy(), rtol=1e-3, atol=1e-6)
