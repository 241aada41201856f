"""What the demo measures: how well the student keeps the teacher's embedding space, what it costs, and what the losses
cost.
"""

import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import reference
from ..distill import Frozen, Stage
from ..distill.matches import losses_from
from ..distill.surgery import parameters, size_bytes
from ..distill.taps import collect
from ..distill.trainer import Distillation

NEIGHBOURS = 10


@torch.no_grad()
def embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int
) -> torch.Tensor:
    """Sentence embeddings [texts, D], unit length; batches of similar length, the result in the given order."""
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    result = torch.empty(len(texts), model.config.hidden_size)
    for start in range(0, len(texts), 64):
        chosen = by_length[start : start + 64]
        batch = tokenizer(
            [texts[i] for i in chosen], padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        result[chosen] = collect(model.eval(), batch, ["embedding"])["embedding"].float()
    return result


def similarity(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """Mean cosine of student's and teacher's embedding of the same text."""
    return torch.nn.functional.cosine_similarity(student, teacher).mean().item()


def neighbour_overlap(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """Share of a text's 10 nearest other texts under the teacher that are among the 10 nearest under the student."""
    near = []
    for x in (student, teacher):
        scores = (x @ x.T).fill_diagonal_(-2.0)
        near.append(torch.zeros_like(scores).scatter_(1, scores.topk(NEIGHBOURS).indices, 1.0))
    return (near[0] * near[1]).sum().item() / (len(student) * NEIGHBOURS)


@torch.no_grad()
def cost(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> dict:
    """Parameters, bytes and milliseconds for one text (median over `texts`)."""
    model.eval()
    batches = [tokenizer([text], truncation=True, max_length=length, return_tensors="pt") for text in texts]
    for batch in batches[:5]:
        model(**batch)
    times = [_seconds(lambda batch=batch: model(**batch)) for batch in batches]
    return {"parameters": parameters(model), "bytes": size_bytes(model), "latency_ms": 1e3 * statistics.median(times)}


def step_times(
    student: PreTrainedModel, teacher: PreTrainedModel, stage: Stage, batches: Sequence[dict], rounds: int = 2
) -> dict:
    """Median milliseconds of a training step, fused and eager: the whole step, and the losses alone (forward and
    backward).

    Eager is `kdkernels.reference`, plain torch. Fused and eager take turns on the same batches.
    """
    source = Frozen(teacher)
    module = Distillation(student, Stage(stage.name, stage.matches, source)).train()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("embeddings." not in name)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.0)
    ways = {"fused": nullcontext, "eager": lambda: losses_from(reference)}
    whole, losses = {way: [] for way in ways}, {way: [] for way in ways}
    for turn in range(rounds + 1):
        for batch in batches:
            student_taps = {k: _leaf(v) for k, v in collect(module.student, batch, stage.student_taps).items()}
            teacher_taps = source.taps(stage.teacher_taps, batch, [], 0, 0)
            for way, context in ways.items():
                with context():
                    step = _seconds(lambda batch=batch: _step(module, optimizer, batch))
                    loss = _seconds(lambda batch=batch, s=student_taps, t=teacher_taps: _losses(module, s, t, batch))
                if turn:  # the first turn warms up
                    whole[way].append(step)
                    losses[way].append(loss)
    return {
        way: {"step_ms": 1e3 * statistics.median(whole[way]), "losses_ms": 1e3 * statistics.median(losses[way])}
        for way in ways
    }


def _step(module, optimizer, batch):
    module(**batch)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


def _losses(module, student_taps, teacher_taps, batch):
    terms = [match.loss(student_taps, teacher_taps, batch, module.projections, 0)[0] for match in module.stage.matches]
    sum(terms).backward()


def _leaf(value):
    if isinstance(value, tuple):
        return tuple(map(_leaf, value))
    return value.detach().requires_grad_()


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
