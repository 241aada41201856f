"""Two gloo processes with fully sharded parameters (FSDP2) take the optimiser steps that one process takes.

What is sharded is the module that DistillTrainer trains, student, projections and losses. The Trainer itself cannot be
tested so without a GPU: accelerate ignores `fsdp` on CPUs and trains with DDP, which test_distill_resume.py covers.
"""

import dataclasses
import subprocess
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kdkernels.distill import Frozen
from kdkernels.distill.matches import count
from kdkernels.distill.trainer import Distillation
from kdkernels.recipes import RECIPES
from python_tests import tiny

OPTIONS = {
    "hinton": {},
    "minilm": {"relation_heads": 6},
    "tinybert": {"layers": 2, "hidden_size": 16, "intermediate_size": 32},
}
PROCESSES, STEPS, ROWS = 2, 3, 3  # rows a process and step


def module_of(stage, recipe, teacher) -> Distillation:
    torch.manual_seed(1)
    return Distillation(recipe.student(teacher), dataclasses.replace(stage, source=Frozen(teacher)))


def train(module, batches, **how) -> dict[str, torch.Tensor]:
    """The parameters after a step for every batch."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    for step, (batch, totals) in enumerate(batches):
        optimizer.zero_grad()
        module(step=step, totals=totals, **how, **batch)["loss"].backward()
        optimizer.step()
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in module.named_parameters()}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (PROCESSES,))
    whole = [tiny.batch(PROCESSES * ROWS, seed, labels=True) for seed in range(STEPS)]
    own = [{name: x[rank * ROWS : (rank + 1) * ROWS] for name, x in batch.items()} for batch in whole]
    totals = [count(batch) for batch in whole]
    teacher = tiny.bert(head=True)
    for name, options in OPTIONS.items():
        recipe = RECIPES[name](teacher.config, **options)
        for stage in recipe.stages:
            expected = train(module_of(stage, recipe, teacher), zip(whole, totals, strict=True))
            module = module_of(stage, recipe, teacher)
            # torch gathers a layer again when a gradient reaches its output. MiniLM's last one gets it through q, k and
            # v alone, so that only the module as a whole can be sharded.
            for layer in module.student.base_model.encoder.layer if name != "minilm" else ():
                fully_shard(layer, mesh=mesh)
            fully_shard(module, mesh=mesh)
            assert all(isinstance(p, DTensor) for p in module.parameters())
            got = train(module, zip(own, totals, strict=True), processes=PROCESSES)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()


def test_sharded_steps_are_the_steps_of_one_process():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    done = subprocess.run([*torchrun, "-m", "python_tests.test_fsdp"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    main()
