"""Extra memory of one forward and backward: the peak beyond the inputs and the gradients that were asked for.

On a GPU the caching allocator counts. On the CPU torch's profiler reports each allocation and release of ATen's
allocator, which the C++ kernels use too (their temporaries are tensors), to the byte; what a library allocates on its
own, such as a GEMM's packing buffers, is not seen, for any implementation.
"""

import gc

import torch
from torch.profiler import ProfilerActivity, profile

from python_tests.case import upstream

from .timing import Runner


def extra_bytes(runner: Runner) -> int:
    leaves, arguments = runner.call.leaves, runner.call.arguments
    with torch.no_grad():
        gradient = upstream(runner.function(**arguments))

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        runner.function(**arguments).backward(gradient)

    step()  # whatever is made once, such as compiled code, is there
    for leaf in leaves:
        leaf.grad = None
    gc.collect()
    peak = _peak_on_cuda(step) if leaves[0].device.type == "cuda" else _peak_on_cpu(step)
    gradients = sum(leaf.grad.numel() * leaf.grad.element_size() for leaf in leaves)
    for leaf in leaves:
        leaf.grad = None
    return max(0, peak - gradients)


def _peak_on_cuda(step) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(step) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    changes = [(e.start_ns(), e.nbytes()) for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak
