"""Measurements: `python -m benches.run`, `python -m benches.gpu_check`, `python -m benches.plot`."""

import os

# torch's profiler, which counts memory, announces each start on stderr otherwise; it reads this before torch is
# imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
