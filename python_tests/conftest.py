"""What every test runs under: no network, and uninitialised memory that is NaN.

torch fills what `empty` and its kin return with NaN when deterministic algorithms are asked for. Allocations of the C++
ops go through the same function (`test_layers.py` checks it), so a kernel that leaves an output unwritten, or reads one
before writing, shows.
"""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """For many small calls: waiting for a second thread costs more than it brings, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
