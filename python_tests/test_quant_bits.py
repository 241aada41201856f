"""Curvature against the exact Hessian, and bits against every allocation there is."""

import itertools
import math
import random

import pytest
import torch
from torch import nn

import kdkernels
from kdkernels.quant import allocate_bits, hessian_sensitivity, pack
from kdkernels.quant.bits import Sensitivity

from . import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))


def _loss(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def _batches(model, count):
    """Data that the model fits: at the minimum the Hessian has no negative eigenvalues that would cancel in a trace."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(7, 5, generator=generator) for _ in range(count)]
    return [{"x": x, "y": model(x).detach()} for x in inputs]


def _block(model, name, batches) -> torch.Tensor:
    """The exact block of the mean loss's Hessian that belongs to one weight."""
    weight = model.get_submodule(name).weight

    def value(flat):
        changed = {f"{name}.weight": flat.view_as(weight)}
        losses = [_loss(lambda x: torch.func.functional_call(model, changed, x), batch) for batch in batches]
        return torch.stack(losses).mean()

    return torch.autograd.functional.hessian(value, weight.detach().flatten())


@pytest.mark.parametrize(("measure", "batches"), [("trace", 2), ("eigenvalue", 1)])
def test_curvature_is_the_exact_hessians(measure, batches):
    model = _network()
    data = _batches(model, batches)
    found = hessian_sensitivity(model, data, bits=(2, 4), loss=_loss, measure=measure, probes=1000)
    for name in ("0", "2", "4"):
        values = torch.linalg.eigvalsh(_block(model, name, data))
        expected = values.mean().abs() if measure == "trace" else values.abs().max()
        weight = model.get_submodule(name).weight.detach()
        for bits in (2, 4):
            packed = pack(weight, f"int{bits}")
            error = (packed.dequantize() - weight).square().sum()
            assert found[name].loss[bits] == pytest.approx((expected * error).item(), rel=0.06), (name, bits)
            assert found[name].nbytes[bits] == packed.nbytes


def test_bits_for_a_bert():
    """Every linear of the encoder gets bits within the budget, quantize() takes them; the model is left as it was."""
    model = tiny.bert(head=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = hessian_sensitivity(model, [tiny.batch(labels=True)], probes=2)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(found) == 25 and all(layer.loss[2] > layer.loss[8] >= 0 for layer in found.values())
    sizes = [sum(layer.nbytes[bits] for layer in found.values()) for bits in (2, 8)]
    budget = (sizes[0] + sizes[1]) // 2
    chosen = allocate_bits(found, budget=budget)
    assert len(set(chosen.values())) > 1
    quantised = kdkernels.quantize(model, "int8", bits_per_layer=chosen)
    packed = {name: quantised.get_submodule(name).weight for name in chosen}
    assert {name: weight.scheme.bits for name, weight in packed.items()} == chosen
    assert sum(weight.nbytes for weight in packed.values()) <= budget


@pytest.mark.parametrize("seed", range(8))
def test_allocation_is_the_best_there_is(seed):
    generator = random.Random(seed)
    layers = {
        f"layer{i}": Sensitivity(
            {bits: generator.random() * 4 / bits for bits in (8, 4, 2)},
            {bits: bits * generator.choice((64, 128, 192)) + 64 for bits in (8, 4, 2)},
        )
        for i in range(6)
    }
    totals = []
    for choice in itertools.product((8, 4, 2), repeat=6):
        loss = sum(layer.loss[bits] for layer, bits in zip(layers.values(), choice, strict=True))
        totals.append((sum(layer.nbytes[b] for layer, b in zip(layers.values(), choice, strict=True)), loss))
    least, most = min(totals)[0], max(totals)[0]
    for budget in (least, least + 64, (least + most) // 2, (least + 3 * most) // 4, most, 2 * most):
        chosen = allocate_bits(layers, budget=budget)
        assert sum(layers[name].nbytes[bits] for name, bits in chosen.items()) <= budget
        loss = sum(layers[name].loss[bits] for name, bits in chosen.items())
        assert loss == pytest.approx(min(loss for size, loss in totals if size <= budget))


def _layer(loss=1.0):
    return Sensitivity({8: loss, 2: 2.0}, {8: 640, 2: 192})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: allocate_bits({"a": _layer(), "b": _layer()}, budget=383),
            "budget must be at least 384 bytes.*got 383",
        ),
        (lambda: allocate_bits({}, budget=1), "sensitivity must name at least one layer"),
        (lambda: allocate_bits({"a": _layer(math.nan)}, budget=999), "sensitivity of a must have finite losses"),
        (lambda: allocate_bits({"a": Sensitivity({8: 1.0}, {})}, budget=999), "for the same numbers of bits"),
        (lambda: hessian_sensitivity(tiny.bert(), [], measure="norm"), "measure must be 'trace' or 'eigenvalue'"),
        (lambda: hessian_sensitivity(tiny.bert(), [], probes=0), "probes must be an int >= 1, got 0"),
        (lambda: hessian_sensitivity(tiny.bert(), [], bits=(5,)), "bits must give 8, 4, 3 or 2 bits"),
        (lambda: hessian_sensitivity(tiny.bert(), []), "data must have at least one batch"),
        (lambda: hessian_sensitivity(tiny.bert(), {}), "data must be an iterable of batches, got dict"),
        (lambda: hessian_sensitivity(tiny.bert(), [], bits=8), "bits must be a sequence of numbers of bits, got 8"),
        (lambda: allocate_bits({"a": _layer()}, budget="1"), "budget must be a number of bytes, got str"),
        (lambda: hessian_sensitivity(tiny.bert(), [tiny.batch()]), "data must have labels"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
