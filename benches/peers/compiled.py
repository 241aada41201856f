"""torch.compile at its best: every mode on every natural way of writing the loss, the fastest one stands as the peer.

Which one won is remembered per case, machine and torch version in `~/.cache/kdkernels/compiled.json` (Inductor keeps
the code itself), so only the first run pays for compiling all of them. Delete that file to choose anew.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from python_tests.case import Call, Case

from ..timing import Runner, quick
from . import eager

# The default compiles for the shapes that it first sees, which is dynamic=False once more.
MODES = {
    "dynamic=False": {"dynamic": False},
    "max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs", "dynamic": False},
}


def best(case: Case, call: Call, machine: str, seconds: float):
    """(the compiled function, a description of the choice), or (None, "") if nothing compiles, said on stderr.

    After `seconds` no further mode is tried, and the choice is not remembered.
    """
    choices = {
        f"{variant.__name__} {mode}": (variant, options)
        for mode, options in MODES.items()
        for variant in eager.VARIANTS[case.op]
    }
    remembered = _read()
    key = f"{case.id} | {machine} | torch {torch.__version__} | {torch.get_num_threads()} threads"
    if remembered.get(key) in choices:
        return _compile(*choices[remembered[key]]), remembered[key]
    times, failed, started = {}, 0, time.monotonic()
    for name, choice in choices.items():
        if times and time.monotonic() - started > seconds:
            break
        try:
            times[name] = quick(Runner(name, _compile(*choice), call))
        except Exception as error:  # a mode of the compiler that breaks on this case is no peer; it is named
            failed += 1
            print(f"  torch.compile {name} failed on {case.id}: {str(error).splitlines()[0]}", file=sys.stderr)
    if not times:
        return None, ""
    fastest = min(times, key=times.get)
    if len(times) + failed == len(choices):
        _write({**_read(), key: fastest})
    return _compile(*choices[fastest]), fastest


def _compile(function, options: dict):
    torch._dynamo.reset()
    return torch.compile(function, **options)


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kdkernels" / "compiled.json"


def _read() -> dict[str, str]:
    return json.loads(_path().read_text()) if _path().is_file() else {}


def _write(choices: dict[str, str]) -> None:
    _path().parent.mkdir(parents=True, exist_ok=True)
    _path().write_text(json.dumps(choices, indent=1, sort_keys=True))
