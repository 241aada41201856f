"""Where and with what a number was measured: every row and every result file carries these."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def facts(device: str) -> dict[str, str]:
    """Device, threads, what else the machine was doing, ISA, versions and commit."""
    import kdkernels

    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.2f}",
        "implementation_of_ours": kdkernels.explain()["kd_loss"][device],
        "kdkernels": kdkernels.__version__,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "python": platform.python_version(),
        "commit": commit(),
    }


LOST = 3  # the exit status of a process that its GPU is lost to


def is_lost(device: str) -> bool:
    """Whether CUDA refuses everything to this process, as after a kernel's illegal access."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def in_a_line(error: BaseException) -> str:
    """What an error says first, and of which kind it is."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def commit() -> str:
    """The commit of the checkout, with "+dirty" where tracked files differ from it; what KDKERNELS_COMMIT says where
    the files came without their history."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("KDKERNELS_COMMIT", "unknown")
    return head.stdout.strip() + ("+dirty" if changed.stdout.strip() else "")
