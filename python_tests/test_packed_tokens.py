"""Packed tokens where the host never learns how many are real, as on a GPU, here on the CPU: the same tokens, the same
hidden states, and nothing that would wait for the device."""

from types import SimpleNamespace

import pytest
import torch

import kdkernels
from kdkernels.quant import architectures, encoder
from kdkernels.quant.encoder import PackedTokens

from .nosync import NoSync
from .test_quantize import batch, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

MASKS = {
    "right": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left": [[0, 0, 1, 1], [0, 1, 1, 1]],
    "holes": [[0, 1, 0, 1], [1, 0, 0, 1]],
    "an empty text": [[0, 0], [1, 1], [0, 0]],
    "padding alone": [[0, 0, 0]],
    "no text": torch.zeros(0, 5),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_same_tokens_with_room_for_more(monkeypatch, mask):
    mask = torch.as_tensor(mask)
    x = torch.randn(*mask.shape, 3, generator=torch.Generator().manual_seed(0))
    tight = PackedTokens(x, mask)
    expected, count = tight.pack(x), int(mask.sum())
    monkeypatch.setattr(encoder, "keeps_room", lambda device: True)
    with NoSync():
        roomy = PackedTokens(x, mask)
        packed = roomy.pack(x)
    assert torch.equal(roomy.cumulative, tight.cumulative)
    assert len(packed) == mask.numel() and torch.equal(packed[:count], expected)
    packed[count:] = torch.nan
    with NoSync():
        unpacked = roomy.unpack(packed)
    assert torch.equal(unpacked, tight.unpack(expected))


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert", "albert"])
@torch.no_grad()
def test_a_model_never_makes_the_host_wait(monkeypatch, name):
    """The blocks, which only a GPU runs with room, get the tokens that are real and leave NaN behind them."""
    model = kdkernels.quantize(tiny(name))
    inputs = batch(model.config)
    expected = model(**inputs, output_hidden_states=True).hidden_states
    count, run_blocks = int(inputs["attention_mask"].sum()), encoder.run_blocks

    def with_room(x, *rest):
        assert len(x) == inputs["attention_mask"].numel()
        states = run_blocks(x[:count], *rest)
        return [torch.cat((state, torch.full_like(x[count:], torch.nan))) for state in states]

    monkeypatch.setattr(encoder, "keeps_room", lambda device: True)
    monkeypatch.setattr(encoder, "run_blocks", with_room)
    with NoSync():
        got = model(**inputs, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@torch.no_grad()
def test_a_model_is_one_graph(monkeypatch):
    """torch.compile finds nothing that it has to leave to Python, not even in the model's first call. Without padding,
    so that the CPU's blocks do."""
    model = kdkernels.quantize(tiny("roberta")).requires_grad_(False)
    inputs = batch(model.config, lengths=(9, 9))
    monkeypatch.setattr(encoder, "keeps_room", lambda device: True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(**inputs).last_hidden_state
    assert torch.equal(got, model(**inputs).last_hidden_state)


@pytest.mark.parametrize("masked", [False, True])
def test_everything_is_on_the_device_of_the_tokens(masked):
    """Which here has no values to look at, and whose tensors refuse to meet the CPU's."""
    ids = torch.empty(3, 4, dtype=torch.int64, device="meta")
    tokens = PackedTokens(ids, torch.empty_like(ids) if masked else None)
    packed = tokens.pack(ids[..., None].float())
    positions = architectures.positions(SimpleNamespace(embeddings=None), ids, tokens.shape, ids.device)
    made = (packed, tokens.unpack(packed), tokens.pack(positions), tokens.cumulative)
    assert {x.device.type for x in made} == {"meta"}
    assert [x.shape for x in made] == [(12, 1), (3, 4, 1), (12,), (4,)]
