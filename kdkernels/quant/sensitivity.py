"""`hessian_sensitivity`: how much the loss is expected to rise when a layer's weight is quantised.

To second order, at a minimum, a change d of a weight W of n elements raises the loss by d^T H d / 2. HAWQ-V2 (arXiv
1911.03852) takes the mean eigenvalue of the layer's own block of the Hessian for all directions,

    Omega = trace(H) / n * ||Q(W) - W||^2,

and HAWQ (1905.03696), which Q-BERT (1909.05840) followed, the largest one. Neither needs the Hessian: H v is the
gradient of (gradient . v), one double backward. With v of random signs, E[v^T H v] = trace(H), for all layers at once;
power iteration gives the largest eigenvalue, layer by layer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .bits import Sensitivity
from .importance import mean_squares
from .pack import pack
from .quantize import scheme_of, settle
from .scheme import NAMED

_ENOUGH = 0.01  # relative change of the eigenvalue at which power iteration stops, as in Q-BERT's code
_ITERATIONS = 50


def hessian_sensitivity(
    model: nn.Module,
    data: Iterable[Mapping],
    *,
    bits: Sequence[int] = (8, 4, 3, 2),
    measure: str = "trace",
    probes: int = 8,
    loss: Callable[[nn.Module, Mapping], torch.Tensor] | None = None,
    skip: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Sensitivity]:
    """The sensitivity of each linear that `kdkernels.quantize` would quantise, at each number of bits.

    Args:
        model: trained on the task, in float32; is left as it was.
        data: batches for `model(**batch).loss`, some hundred examples with labels.
        bits: which numbers of bits to weigh: the schemes "int8", "int4", "int3", "int2".
        measure: "trace" (HAWQ-V2: the mean eigenvalue) or "eigenvalue" (HAWQ: the largest in magnitude, one layer after
            the other, much slower).
        probes: random vectors per batch for the trace: the error falls with the square root of their number.
        loss: what to differentiate instead, as loss(model, batch).
        skip: parts of names of modules to leave out.
        seed: of the random vectors.

    Returns: {name: Sensitivity}, for `allocate_bits`. A negative trace or eigenvalue (the model is not at a minimum)
        counts by its magnitude, as in Q-BERT.
    Raises: ValueError or TypeError naming the argument.
    """
    if measure not in ("trace", "eigenvalue"):
        raise ValueError(f"measure must be 'trace' or 'eigenvalue', got {measure!r}")
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes must be an int >= 1, got {probes!r}")
    if isinstance(bits, (int, str)):
        raise TypeError(f"bits must be a sequence of numbers of bits, got {bits!r}")
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of batches, got {type(data).__name__}")
    schemes = {number: scheme_of("bits", number) for number in bits}
    if not schemes:
        raise ValueError("bits must name at least one number of bits")
    planned = settle(model, "int4", None, skip).layers
    names = [name for name, scheme in planned.items() if scheme == NAMED["int4"]]  # the others are tables, of 8 bits
    weights = {name: model.get_submodule(name).weight for name in names}
    curvature = _curvature(model, weights, data, loss or _own_loss, measure, probes, seed)
    importance = mean_squares(model, names)
    found = {}
    for name, weight in weights.items():
        packed = {number: pack(weight, scheme, importance=importance.get(name)) for number, scheme in schemes.items()}
        errors = {number: (p.dequantize() - weight.detach()).square().sum().item() for number, p in packed.items()}
        found[name] = Sensitivity(
            {number: curvature[name] * error for number, error in errors.items()},
            {number: p.nbytes for number, p in packed.items()},
        )
    return found


def _own_loss(model: nn.Module, batch: Mapping) -> torch.Tensor:
    found = getattr(model(**batch), "loss", None)
    if found is None:
        raise ValueError("data must have labels, so that the model gives a loss; or give a function as loss")
    return found


def _curvature(model, weights, data, loss, measure: str, probes: int, seed: int) -> dict[str, float]:
    """{name: magnitude of the mean, or of the largest, eigenvalue of the weight's block}, averaged over batches."""
    state = model.training, [(p, p.requires_grad) for p in model.parameters()]
    generator = torch.Generator().manual_seed(seed)
    sums, batches = dict.fromkeys(weights, 0.0), 0
    model.eval().requires_grad_(False)
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in data:
            # the fused attention kernels have no second derivative
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                value = loss(model, batch)
                gradients = torch.autograd.grad(value, list(weights.values()), create_graph=True, allow_unused=True)
                reached = {name: g for name, g in zip(weights, gradients, strict=True) if g is not None}
                estimate = _traces if measure == "trace" else _eigenvalues
                values = estimate(list(reached.values()), [weights[name] for name in reached], probes, generator)
            for name, value in zip(reached, values, strict=True):
                sums[name] += value
            batches += 1
    finally:
        model.train(state[0])
        for parameter, required in state[1]:
            parameter.requires_grad_(required)
    if not batches:
        raise ValueError("data must have at least one batch")
    return {name: abs(total) / batches for name, total in sums.items()}


def _signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return (torch.randint(2, like.shape, generator=generator) * 2 - 1).to(like)


def _traces(gradients, weights, probes: int, generator) -> list[float]:
    """trace(H) / n of each weight's block, by Hutchinson's estimate."""
    sums = [0.0] * len(weights)
    for _ in range(probes):
        vectors = [_signs(weight, generator) for weight in weights]
        products = torch.autograd.grad(gradients, weights, vectors, retain_graph=True)
        for i, (vector, product) in enumerate(zip(vectors, products, strict=True)):
            sums[i] += (vector * product).sum().item()
    return [total / probes / weight.numel() for total, weight in zip(sums, weights, strict=True)]


def _eigenvalues(gradients, weights, _probes: int, generator) -> list[float]:
    """The eigenvalue of the largest magnitude of each weight's block, by power iteration."""
    found = []
    for gradient, weight in zip(gradients, weights, strict=True):
        vector, value = _signs(weight, generator), 0.0
        for _ in range(_ITERATIONS):
            vector = vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)
            (product,) = torch.autograd.grad(gradient, weight, vector, retain_graph=True)
            last, value = value, (vector * product).sum().item()
            if abs(value - last) <= _ENOUGH * abs(value):
                break
            vector = product
        found.append(value)
    return found
