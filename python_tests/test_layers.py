"""The rules of the house as tests: who includes what, what an object exports, what a library links, no host sync."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch_abi_audit.inspect import inspect_package

import kdkernels
from kdkernels import _checks, _native

from .case import evaluate
from .cases import CASES
from .nosync import NoSync

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
PACKAGE = Path(kdkernels.__file__).parent
ISAS = list(_native.isas())
LIBRARIES = sorted(PACKAGE.glob("libkdkernels_*.so"))

SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".inl", ".cpp", ".cu", ".cuh"})
KERNELS = [path for path in SOURCES if path.parent.name in {"ops", "core"} or path.suffix in {".inl", ".cu", ".cuh"}]
KERNELS += [CSRC / "cpu" / name for name in ("kernels.cpp", "pair.h", "vec.h")]

STABLE = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
PLAIN = {"cstdint", "cmath", "cstring", "cfloat", "limits", "type_traits"}


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)


def code(path: Path) -> str:
    """A C++ source without comments and strings."""
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(\\.|[^"\\\n])*"', " ", path.read_text(), flags=re.DOTALL)


def run(*command) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_only_csrc_torch_includes_torch(path):
    foreign = [name for name in includes(path) if name.split("/")[0] in {"torch", "ATen", "c10"}]
    assert path.parent == CSRC / "torch" or not foreign
    assert all(
        name.startswith(("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/"))
        for name in foreign
    )


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(path.relative_to(CSRC)))
def test_kernels_know_no_threads_and_no_allocation(path):
    standard = {name for name in includes(path) if "." not in name}
    allowed = (
        {"cstdint"} if path.parent.name == "ops" else {"cstdint", "cmath", "cstring", "cfloat", "limits", "type_traits"}
    )
    assert standard <= allowed
    forbidden = re.findall(
        r"\b(?:new|delete|malloc|calloc|free|aligned_alloc|throw|std::vector|std::thread|omp)\b", code(path)
    )
    assert not forbidden


def compile_commands() -> list[dict]:
    """Every compiler call of the build beside this interpreter, from CMake."""
    return json.loads((ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "compile_commands.json").read_text())


def compile_command(isa: str) -> list[str]:
    """The command of this build that compiles the kernels of one ISA."""
    for entry in compile_commands():
        if entry["file"].endswith("csrc/cpu/kernels.cpp") and f"-DKD_ISA={isa}" in entry["command"]:
            return shlex.split(entry["command"])
    raise AssertionError(f"no object for {isa}")


@pytest.mark.parametrize("isa", ISAS)
def test_isa_object_exports_its_table_alone(isa, tmp_path):
    """Without optimisation, which inlines away the very symbols that the linker could merge across ISAs."""
    command = compile_command(isa)
    command[command.index("-o") + 1] = tmp_path / "kernels.o"
    run(*["-O0" if part == "-O3" else part for part in command])
    symbols = run("nm", "-C", "--extern-only", "--defined-only", tmp_path / "kernels.o")
    assert [line.split(maxsplit=2)[2] for line in symbols.splitlines()] == [f"kd::cpu::{isa}::table"]


def test_isa_flags_reach_the_kernels_only():
    for entry in compile_commands():
        options = shlex.split(entry["command"])
        assert entry["file"].endswith("csrc/cpu/kernels.cpp") or not [o for o in options if re.match(r"-m[a-z]", o)]
        assert not {"-march=native", "-ffast-math", "-Ofast", "-flto", "--use_fast_math"} & set(options)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_op_library_uses_only_the_stable_abi(library):
    (audit,) = inspect_package(str(library)).bundled_libs
    assert audit.torch.uses_torch and audit.torch.stable, audit.torch.unstable_symbols
    assert tuple(map(int, audit.torch.min_torch_version.split("."))) <= (2, 10, 0)


@pytest.mark.parametrize("library", [*LIBRARIES, Path(_native.__file__)], ids=lambda path: path.name)
def test_library_links_what_every_machine_has(library):
    dynamic = run("readelf", "-d", library)
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", dynamic))
    torch_libraries = {"libtorch_cpu"} if library in LIBRARIES else set()
    assert needed <= {"libstdc++", "libm", "libgcc_s", "libc", "libpthread", "ld-linux-x86-64"} | torch_libraries


SYNCS = {"item", "tolist", "nonzero", "cpu", "numpy", "synchronize", "is_nonzero", "masked_select", "unique", "equal"}


@pytest.mark.parametrize(
    "path",
    [path for part in ("ops", "triton") for path in sorted((PACKAGE / part).glob("*.py"))],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_op_files_call_nothing_that_waits_for_the_device(path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call.attr for call in calls if isinstance(call, ast.Attribute) and call.attr in SYNCS]
    assert not [call.id for call in calls if isinstance(call, ast.Name) and call.id == "bool"]


CUDA_SOURCES = [path for path in SOURCES if path.parent.name == "cuda" or path.stem.endswith("_cuda")]
# Waiting, allocating behind torch's back, launching beside torch's current stream: none can be in a CUDA graph.
UNGRAPHABLE = (
    r"\bcuda\w*Synchronize\b|\bcudaMemcpy\b|\bcudaMalloc\w*|\bcudaFree\w*|\bcudaStream(?:Legacy|PerThread)\b|<<<"
)


@pytest.mark.parametrize("path", CUDA_SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_cuda_code_can_be_captured(path):
    assert not re.findall(UNGRAPHABLE, code(path))
    launches = re.findall(r"\blaunch\((.*?)\);", code(path), flags=re.DOTALL)
    assert all(re.search(r"\bstream\b", arguments) for arguments in launches)


def test_waiting_is_seen():
    x, index = torch.ones(3), torch.tensor([True, False, True])
    for wait in (x.sum().item, x.nonzero, lambda: x[index], lambda: x.masked_select(index), lambda: bool(x.any())):
        with pytest.raises(AssertionError, match="makes the host wait"), NoSync():
            wait()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_call_never_makes_the_host_wait(case, monkeypatch):
    monkeypatch.setattr(
        _checks, "readable", lambda value: False
    )  # as for a CUDA tensor: values are checked on the CPU only
    call = case.make()
    with NoSync():
        evaluate(getattr(kdkernels.functional, case.op), call)


def test_memory_of_the_ops_is_poisoned():
    """The NaN of conftest.py reaches what C++ allocates: every `new_empty` of an op is filled."""
    logits = torch.zeros(4, 7)
    with torch.profiler.profile() as profile:
        kdkernels.functional.kd_loss(logits, logits)
    names = [event.name for event in profile.events()]
    assert names.count("aten::new_empty") > 0
    assert names.count("aten::fill_") >= names.count("aten::new_empty")
