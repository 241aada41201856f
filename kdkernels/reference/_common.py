"""What every reference shares: the arithmetic dtype, masks and the divergences of one row.

Everything is differentiable plain torch. A value that must not count (a padded row, a key outside the mask, a class
with p_teacher = 0) is replaced *before* it meets an operation whose result or derivative could be NaN; multiplying a
NaN by a zero mask afterwards would not remove it.
"""

import functools
import itertools
import math

import torch


def arithmetic_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 where any input is fp64, else fp32: what the fused kernels accumulate in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def outside_autocast(function):
    """For a reference with products of matrices: autocast would round their operands to 16 bits."""

    @functools.wraps(function)
    def exact(*args, **options):
        first = next(iter((*args, *options.values())))
        device = (first[0] if isinstance(first, (list, tuple)) else first).device.type
        with torch.autocast(device, enabled=False):
            return function(*args, **options)

    return exact


def keep_rows(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x [..., D] with the rows outside mask [...] set to 0, their gradient too."""
    return x if mask is None else torch.where(mask.bool().unsqueeze(-1), x, 0)


def sequences(cu_seqlens: torch.Tensor, *packed: torch.Tensor):
    """Each sequence of packed tensors [tokens, heads, d] as a batch of one: its tensors [1, heads, n, d] and its mask.

    Last, masked out, the tokens behind the last sequence. The result depends on every token, so that its gradient
    does.
    """
    bounds = [*cu_seqlens.tolist(), packed[0].shape[0]]
    for index, (first, last) in enumerate(itertools.pairwise(bounds)):
        mask = torch.full((1, last - first), index < len(bounds) - 2, device=packed[0].device)
        yield [x[first:last].transpose(0, 1)[None] for x in packed], mask


def count(mask: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """The number of real rows, at least 1 so that an empty batch gives 0 and not 0/0."""
    real = torch.as_tensor(float(rows.numel()), dtype=rows.dtype, device=rows.device) if mask is None else mask.sum()
    return real.to(rows.dtype).clamp_min(1)


def reduce_rows(rows: torch.Tensor, mask: torch.Tensor | None, reduction: str, classes: int = 1) -> torch.Tensor:
    """Row losses -> the value that `reduction` asks for; rows outside the mask are 0."""
    if mask is not None:
        rows = torch.where(mask.bool(), rows, 0)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / (count(mask, rows) * (classes if reduction == "mean" else 1))


def divergence(student: torch.Tensor, teacher: torch.Tensor, kind: str, beta: float = 0.5) -> torch.Tensor:
    """One value per row from logits [..., V] that are already divided by the temperature (losses.md 6, items 3, 4, 18).

    kl = sum p_t (x_t - x_s) - (lse_t - lse_s) never takes the log of a probability, so that underflow and -inf on both
    sides are exact no-ops, and identical inputs give 0 to the bit. -inf is a class of probability 0.
    """
    lse_s, lse_t = torch.logsumexp(student, -1, keepdim=True), torch.logsumexp(teacher, -1, keepdim=True)
    log_s, log_t = student - lse_s, teacher - lse_t
    p_s, p_t = log_s.exp(), log_t.exp()

    def expect(p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.where(p > 0, p * torch.where(p > 0, value, 0), 0).sum(-1)

    if kind == "kl":
        return expect(p_t, teacher - student) - (lse_t - lse_s).squeeze(-1)
    if kind == "ce":
        return lse_s.squeeze(-1) - expect(p_t, student)
    if kind == "reverse_kl":
        return expect(p_s, log_s - log_t)
    if kind == "tv":
        return 0.5 * (p_s - p_t).abs().sum(-1)
    if beta in (0.0, 1.0):
        return (log_s * 0).nansum(-1)
    dead = (p_s == 0) & (p_t == 0)
    mixture = torch.logaddexp(
        torch.where(dead, 0, log_t) + math.log(beta), torch.where(dead, 0, log_s) + math.log(1 - beta)
    )
    return beta * expect(p_t, log_t - mixture) + (1 - beta) * expect(p_s, log_s - mixture)
