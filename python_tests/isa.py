"""The instruction sets of this machine, and code in a process of its own that is made to use one of them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

try:
    from kdkernels import _native
except ImportError:  # the op libraries, which bind to no Python, were carried to another Python, for its GPU
    SETS, OWN = {}, ""
else:
    SETS, OWN = _native.isas(), _native.isa()
PRESENT = [name for name, supported in SETS.items() if supported]
ABSENT = [name for name, supported in SETS.items() if not supported]


def in_a_process(code: str, isa: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "KDKERNELS_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def on_isa(isa: str, module: str, code: str) -> None:
    """Runs `code`, to which a test module of this folder is `t`, on one thread; it must not fail."""
    done = in_a_process(f"import torch; torch.set_num_threads(1)\nfrom python_tests import {module} as t\n{code}", isa)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
