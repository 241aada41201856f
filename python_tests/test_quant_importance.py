"""Which columns count is estimated without data, and quantisation is closer to the original for it."""

import copy

import pytest
import torch
from torch import nn

import kdkernels
from kdkernels.quant import pack
from kdkernels.quant.importance import _random_ids, mean_squares

from . import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def uneven():
    """A BERT whose norms make some features a hundred times as large as others."""
    model = tiny.bert(hidden_size=64, intermediate_size=128)
    generator = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.weight.data = torch.exp(2 * torch.randn(norm.weight.shape, generator=generator))
    return model


def test_it_is_the_mean_square_of_what_the_linear_reads():
    model = uneven()
    name = "encoder.layer.1.attention.self.query"
    with torch.no_grad():
        read = model(_random_ids(model), output_hidden_states=True).hidden_states[1]
    expected = read.double().square().mean((0, 1)).float()
    found = mean_squares(model, [name])[name]
    torch.testing.assert_close(found, expected.clamp_min(0.01 * expected.mean().item()))
    assert torch.equal(found, mean_squares(model, [name])[name])


@pytest.mark.parametrize("scheme", ["int4", "int3", "int2"])
def test_quantised_linears_err_less_on_text(scheme):
    """Estimated on random tokens, it lowers the errors of the linears' outputs on other ones, through quantize()."""
    model = uneven()
    linears = {name: part for name, part in model.encoder.named_modules() if isinstance(part, nn.Linear)}
    read = {}
    for name, part in linears.items():
        part.register_forward_pre_hook(lambda _, inputs, name=name: read.update({name: inputs[0].flatten(0, 1)}))
    with torch.no_grad():
        model(**tiny.batch(16))
    quantised = kdkernels.quantize(copy.deepcopy(model), scheme).encoder
    ratios = []
    for name, part in linears.items():
        weight = part.weight.detach()
        candidates = (quantised.get_submodule(name).weight.dequantize(), pack(weight, scheme).dequantize())
        errors = [(read[name] @ (candidate - weight).T).square().sum() for candidate in candidates]
        ratios.append(errors[0] / errors[1])
    assert torch.stack(ratios).log().mean().exp() < 0.85


def test_a_linear_that_no_encoder_runs_has_none():
    model = tiny.bert(head=True)
    model.extra = nn.Linear(4, 4)
    assert set(mean_squares(model, ["extra", "bert.encoder.layer.0.output.dense"])) == {
        "bert.encoder.layer.0.output.dense"
    }
    alone = nn.Sequential(nn.Linear(64, 8))
    assert mean_squares(alone, ["0"]) == {} and isinstance(kdkernels.quantize(alone, "int4"), nn.Module)


def test_a_silent_feature_still_counts():
    model = tiny.bert(hidden_act="relu")
    inner = model.encoder.layer[0].intermediate.dense
    inner.bias.data[3] = -1e6
    found = mean_squares(model, ["encoder.layer.0.output.dense"])["encoder.layer.0.output.dense"]
    assert found[3] > 0 and (found > 0).all()


def test_progress():
    seen = []
    kdkernels.quantize(tiny.bert(), "int4", progress=lambda done, all: seen.append((done, all)))
    assert seen == [(i, len(seen)) for i in range(1, len(seen) + 1)] and len(seen) > 24
