"""`python -m benches.gpu_resources [KIND ...] [--all] [--out PATH]`: what each GPU kernel takes of a multiprocessor.

CUDA C++ kernels are read from the built library, Triton's are compiled as a real call launches them; no GPU is needed.
A row has registers a thread, the stack a thread and the instructions that spill to it, shared memory a block, threads a
block, and the share of a multiprocessor's warps that these leave room for. Exit status 1 where a kernel is beyond
`LIMITS`; the tests ask the same.
"""

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import chain
from pathlib import Path

import torch

import kdkernels

LIBRARY = Path(kdkernels.__file__).parent / "libkdkernels_cuda.so"
ARCHITECTURES = ("sm_80", "sm_90a")  # what the report compares Triton's kernels on too
KINDS = ("cuda", "triton")
WARP, RESERVED_SHARED = 32, 1024  # threads; bytes that the system takes of each block's shared memory, from sm_80 on
REGISTERS, REGISTERS_AT_ONCE = 65536, 256  # of a multiprocessor; a warp's come in multiples


@dataclass(frozen=True)
class Multiprocessor:
    """What one holds at a time (CUDA programming guide, technical specifications per compute capability)."""

    warps: int
    blocks: int
    shared: int


MULTIPROCESSORS = {
    75: Multiprocessor(32, 16, 64 << 10),
    80: Multiprocessor(64, 32, 164 << 10),
    90: Multiprocessor(64, 32, 228 << 10),
    100: Multiprocessor(64, 32, 228 << 10),
}


@dataclass(frozen=True)
class Limit:
    """The most that a kernel may take: registers a thread, and bytes of stack, which is where spills go."""

    registers: int = 255
    stack: int = 0


# By the beginning of a kernel's name; the first that fits. Registers are limited where the blocks that a multiprocessor
# shall hold leave no more.
LIMITS = {
    "kd_loss::": Limit(64),  # two blocks of 512 threads
    "normalize_rows::": Limit(128),  # a block of 512, which holds the longest rows
    "quant_unpack::": Limit(64),  # four blocks of 256
    "quant_rows::": Limit(64),  # four blocks of 256
    "quant_few_rows::": Limit(255),  # one block of 256 threads, or two: their launch bounds say which
    "quant_linear::multiply_rows": Limit(255),  # two blocks of 128: tiles of 128 x 128 keep 128 sums a thread
    # ptxas gives up a few registers to fit one more block on a multiprocessor; real spilling takes hundreds of bytes.
    # None do so in bfloat16 on sm_90, which their tiles were chosen for.
    "triton::": Limit(stack=48),
    "": Limit(),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture. `spill_stores`, `spill_loads`: instructions, not bytes."""

    name: str
    variant: str
    arch: str
    threads: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    occupancy: float

    @property
    def limit(self) -> Limit:
        limit = next(limit for name, limit in LIMITS.items() if self.name.startswith(name))
        tuned = _capability(self.arch) == 90 and self.variant.endswith("bfloat16")
        return replace(limit, stack=0) if tuned else limit

    @property
    def excess(self) -> str:
        """What is beyond the limit; empty where nothing is."""
        beyond = [key for key in ("registers", "stack") if getattr(self, key) > getattr(self.limit, key)]
        return ", ".join(f"{getattr(self, key)} {key}, limit {getattr(self.limit, key)}" for key in beyond)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu_resources", description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="cuda, triton (default: both)")
    parser.add_argument("--all", action="store_true", help="print every variant, not each kernel's least occupancy")
    parser.add_argument("--out", type=Path, metavar="PATH", help="write every variant there: .csv or .json")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.kinds) - {*KINDS}:
        parser.error(f"KIND must be cuda or triton, got {', '.join(sorted(unknown))}")
    if arguments.out is not None and arguments.out.suffix not in (".csv", ".json"):
        parser.error(f"--out must end in .csv or .json, got {arguments.out}")
    kernels, sources = [], {"cuda": of_library, "triton": of_triton}
    for kind in arguments.kinds or KINDS:
        try:
            kernels += sources[kind]()
        except RuntimeError as error:
            print(f"gpu_resources: {error}", file=sys.stderr)
            return 2
    if arguments.out is not None:
        _write(arguments.out, kernels)
    for line in table(kernels if arguments.all else worst(kernels)):
        print(line)
    beyond = [kernel for kernel in kernels if kernel.excess]
    for kernel in beyond:
        print(f"gpu_resources: {kernel.name}<{kernel.variant}> for {kernel.arch}: {kernel.excess}", file=sys.stderr)
    return 1 if beyond else 0


def of_library(path: Path = LIBRARY) -> list[Kernel]:
    """Every kernel of the CUDA library, for every architecture in it. RuntimeError where there is no library."""
    if not path.is_file():
        raise RuntimeError(f"{path.name} was not built: no nvcc")
    threads = dict(_max_threads(path))
    found = []
    for arch, symbol, registers, stack, shared in _resources(path):
        name, variant = _readable(symbol)
        dynamic = _dynamic_shared(name, variant, _capability(arch))
        found.append(
            _kernel(path, symbol, name, variant, arch, threads[arch, symbol], registers, stack, shared + dynamic)
        )
    return sorted(found, key=lambda kernel: (kernel.name, kernel.arch, kernel.variant))


def of_triton(architectures: tuple[str, ...] = ARCHITECTURES) -> list[Kernel]:
    """Every Triton kernel, as the launches that the tests compile have it. RuntimeError where there is no Triton."""
    try:
        from python_tests import triton_launches
    except ImportError as error:
        raise RuntimeError(f"Triton's kernels need Triton: {error}") from None
    found = {}
    for arch in architectures:
        for call, option, dtype in triton_launches.CALLS:
            launches = triton_launches.compiled(_capability(arch), call, triton_launches.DTYPES[dtype], option)
            for kernel in chain.from_iterable(launches.values()):
                if kernel.hash not in found:
                    found[kernel.hash] = of_compiled(kernel, arch, f"{option}, {dtype}")
    return sorted(found.values(), key=lambda kernel: (kernel.name, kernel.arch, kernel.variant))


def of_compiled(kernel, arch: str, variant: str) -> Kernel:
    """One kernel that Triton has compiled; its shared memory is all dynamic."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        ((_, symbol, registers, stack, _),) = _resources(path)
        module = kernel.src.fn.__module__.rsplit(".", 1)[-1]
        name, threads = f"triton::{module}::{symbol.strip('_')}", kernel.metadata.num_warps * WARP
        return _kernel(path, symbol, name, variant, arch, threads, registers, stack, kernel.metadata.shared)


def occupancy(arch: str, threads: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's warps that blocks of these can be, 0 to 1."""
    holds = MULTIPROCESSORS[_capability(arch)]
    warps = -(-threads // WARP)
    of_warp = -(-registers * WARP // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    by_registers = REGISTERS // of_warp // warps
    of_block = shared + (RESERVED_SHARED if _capability(arch) >= 80 else 0)
    by_shared = holds.shared // of_block if of_block else holds.blocks
    return min(holds.blocks, holds.warps // warps, by_registers, by_shared) * warps / holds.warps


def worst(kernels: list[Kernel]) -> list[Kernel]:
    """Of each kernel and architecture the variant of the least occupancy, then of the most registers."""
    found = {}
    for kernel in sorted(kernels, key=lambda kernel: (-kernel.occupancy, kernel.registers)):
        found[kernel.name, kernel.arch] = kernel
    return [found[key] for key in sorted(found)]


def table(kernels: list[Kernel]) -> Iterator[str]:
    """Lines for a terminal."""
    yield (
        f"{'kernel':44} {'arch':7} {'threads':>7} {'registers':>9} {'stack':>5} {'spills':>9} {'shared':>7} "
        f"{'occupancy':>9}  variant"
    )
    for k in kernels:
        spills = f"{k.spill_stores}/{k.spill_loads}"
        yield (
            f"{k.name:44} {k.arch:7} {k.threads:7} {k.registers:9} {k.stack:5} {spills:>9} {k.shared:7} "
            f"{k.occupancy:9.0%}  {k.variant}"
        )


def _capability(arch: str) -> int:
    return int(arch.removeprefix("sm_").rstrip("a"))


def _kernel(path, symbol, name, variant, arch, threads, registers, stack, shared) -> Kernel:
    stores, loads = _spills(path, symbol, arch) if stack else (0, 0)
    share = occupancy(arch, threads, registers, shared)
    return Kernel(name, variant, arch, threads, registers, stack, stores, loads, shared, share)


def _resources(path: Path) -> Iterator[tuple[str, str, int, int, int]]:
    """(architecture, symbol, registers, stack, static shared memory) of each kernel of a library or a cubin."""
    arch = ""
    for line in _cuobjdump("-res-usage", path).splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.startswith(" Function "):
            symbol = line.removeprefix(" Function ").rstrip(":")
        elif line.startswith("  REG:"):
            used = dict(re.findall(r"(\w+):(\d+)", line))
            shared = int(used["SHARED"])
            if shared and arch and _capability(arch) >= 90:  # where what the system reserves is counted in
                shared -= RESERVED_SHARED
            yield arch, symbol, int(used["REG"]), int(used["STACK"]), shared


def _max_threads(path: Path) -> Iterator[tuple[tuple[str, str], int]]:
    """((architecture, symbol), threads a block) from each kernel's launch bounds."""
    arch = symbol = ""
    lines = iter(_cuobjdump("-elf", path).splitlines())
    for line in lines:
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.startswith(".nv.info."):
            symbol = line.removeprefix(".nv.info.").strip()
        elif line.endswith("EIATTR_MAX_THREADS"):
            next(lines)
            yield (arch, symbol), int(next(lines).split()[1], 16)


def _spills(path: Path, symbol: str, arch: str) -> tuple[int, int]:
    """Instructions that store to a thread's stack, and that load from it."""
    code = _cuobjdump("-sass", path, "-fun", symbol, *(("-arch", arch) if path.suffix == ".so" else ()))
    return len(re.findall(r"\bSTL\b", code)), len(re.findall(r"\bLDL\b", code))


def _readable(symbol: str) -> tuple[str, str]:
    """(source's name::kernel, template arguments) of a C++ symbol."""
    source = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", symbol)[1]
    full = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", full)
    kernel, arguments = re.fullmatch(r"(?:void )?(\w+)(?:<(.*)>)?\(.*\)", plain).groups()
    return f"{source}::{kernel}", (arguments or "").replace(" >", ">")


def _dynamic_shared(name: str, variant: str, capability: int) -> int:
    """Bytes that a launch adds; the binary does not say."""
    shape = re.sub(r"Shape<(.*)>", r"\1", variant).split(", ")  # kSharedBytes, or shared_bytes, of the sources
    sm80 = capability >= 80
    if name == "quant_linear::multiply_rows":
        bits, m, n, groups = map(int, shape[:4])
        tile = 64 * 64 * bits // 8 + (128 if bits < 8 else 0)
        return groups * max((4 if sm80 else 2) * (m * 64 + n // 64 * tile), (m if sm80 else 32) * (n + 8) * 4)
    if name == "quant_few_rows::multiply":
        return 4 * 16 * int(shape[3]) * (64 + 8) * 4
    stages = 2 if sm80 else 1
    return stages * 2 * 64 * (2 * int(shape[1]) + 16) if name == "varlen_attention::attend" else 0


def _cuobjdump(*arguments) -> str:
    command = [_tool(), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def _tool() -> str:
    """cuobjdump, of the CUDA toolkit or of Triton, which brings its own."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton

        return triton.knobs.nvidia.cuobjdump.path
    except (ImportError, RuntimeError):
        raise RuntimeError("there is no cuobjdump: install the CUDA toolkit or Triton") from None


def _write(path: Path, kernels: list[Kernel]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(kernel) | {"excess": kernel.excess} for kernel in kernels]
    if path.suffix == ".json":
        versions = {"kdkernels": kdkernels.__version__, "torch": torch.__version__}
        path.write_text(json.dumps({**versions, "kernels": rows}, indent=1))
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(Kernel)), "excess"])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
