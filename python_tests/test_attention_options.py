"""What the options of the attention losses promise beyond the table's values: sequences never meet, the future and
hidden places may hold anything, and an option that says nothing new changes nothing. Mostly to the bit."""

import itertools
from dataclasses import replace

import pytest
import torch

from kdkernels import functional, reference

from .case import evaluate
from .cases import CASES, of

pytestmark = pytest.mark.usefixtures("one_thread")

PACKED = [case for case in CASES if case.packed]
ids = {"ids": lambda case: case.id}


def named(*names):
    return [case for case in CASES if case.id in names]


def equal(a, b) -> bool:
    return torch.equal(a[0], b[0]) and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def bounds(call) -> list[int]:
    return call.other["cu_seqlens"].tolist()


@pytest.mark.parametrize("case", [case for case in PACKED if case.options.get("reduction") == "none"], **ids)
def test_packed_sequences_are_each_alone(case):
    """The rows and gradients of a sequence are the bits of that sequence packed by itself."""
    call = case.make()
    function = getattr(functional, case.op)
    rows, gradients = function(**call.arguments), None
    above = torch.linspace(0.25, 1.75, rows.numel()).view(rows.shape)
    gradients = torch.autograd.grad(rows, call.leaves, above)
    for first, last in itertools.pairwise(bounds(call)):
        alone = call.map(lambda x, first=first, last=last: x[first:last].clone())
        alone = alone.with_options(cu_seqlens=torch.tensor([0, last - first]))
        own = function(**alone.arguments)
        assert torch.equal(own, rows[first:last])
        for got, of_all in zip(torch.autograd.grad(own, alone.leaves, above[first:last]), gradients, strict=True):
            assert torch.equal(got, of_all[first:last])


@pytest.mark.parametrize("case", PACKED, **ids)
def test_packed_is_padded(case):
    """The same sequences in a padded batch give the same loss."""
    call, bias = case.make(), case.shape.get("bias_s")
    edges = bounds(call)
    longest = max(b - a for a, b in itertools.pairwise(edges))

    def pad(x):
        batch = x.new_full((len(edges) - 1, longest, *x.shape[1:]), torch.nan)
        for sequence, first, last in zip(batch, edges, edges[1:], strict=False):
            sequence[: last - first] = x[first:last]
        return batch.transpose(1, 2) if x.dim() == 3 else batch

    lengths = call.other["cu_seqlens"].diff()
    other = {name: value for name, value in call.other.items() if name not in ("cu_seqlens", "max_seqlen")}
    other |= {"mask": torch.arange(longest) < lengths[:, None], "reduction": "sum"}
    if case.op == "attention_mse":
        del other["reduction"]
    if bias:
        other["bias_s"] = call.other["bias_s"][..., :longest, :longest]
    padded = replace(call.map(pad), other=other)
    expected = getattr(functional, case.op)(**padded.arguments)
    got = getattr(functional, case.op)(**{**call.arguments, **{k: other[k] for k in ("reduction",) if k in other}})
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("case", [c for c in PACKED if sum(c.shape["packed"]) < c.shape["tokens"]], **ids)
def test_tokens_behind_the_last_sequence_may_hold_anything(case, poison):
    call = case.make()
    expected, end = evaluate(getattr(functional, case.op), call), bounds(call)[-1]

    def poisoned(x):
        return torch.cat([x[:end], torch.full_like(x[end:], poison)])

    got = evaluate(getattr(functional, case.op), call.map(poisoned))
    assert equal(got, expected)
    assert all((g[end:] == 0).all() for g in got[1])


@pytest.mark.parametrize("case", PACKED, **ids)
def test_bounds_of_either_type_and_a_looser_limit(case):
    call = case.make()
    expected = evaluate(getattr(functional, case.op), call)
    wide = call.with_options(cu_seqlens=call.other["cu_seqlens"].long())
    assert equal(evaluate(getattr(functional, case.op), wide), expected)
    if "bias_s" not in case.shape:
        loose = call.with_options(max_seqlen=None)
        assert equal(evaluate(getattr(functional, case.op), loose), expected)


@pytest.mark.parametrize("op", ["attention_kl", "attention_mse", "relation_kl"])
def test_no_sequences(op):
    case = next(case for case in PACKED if case.op == op)
    call = case.make().with_options(cu_seqlens=torch.tensor([0]), max_seqlen=None)
    loss, gradients = evaluate(getattr(functional, op), call)
    assert loss == 0 and all((g == 0).all() for g in gradients)


def test_the_future_may_hold_anything():
    """A NaN shows in the rows that see it, and in no earlier one."""
    (case,) = named("attention_kl-causal")
    call = case.make().with_options(reduction="none")
    expected = functional.attention_kl(**call.arguments)
    with torch.no_grad():
        call.leaves[1][:, :, 70] = torch.nan
    rows = functional.attention_kl(**call.arguments)
    assert torch.equal(rows[:, :, :70], expected[:, :, :70])
    assert rows[:, :, 70:].isnan().all()


def test_padding_of_a_bias_may_hold_anything():
    (case,) = named("attention_kl-bias")
    call = case.make()
    expected, mask = evaluate(functional.attention_kl, call), call.other["mask"]
    real = (mask[:, None, :, None] & mask[:, None, None, :]).expand(2, 3, 41, 41)
    for poison in (torch.nan, -torch.inf, torch.inf):
        biases = {name: torch.where(real, call.other[name], poison) for name in ("bias_s", "bias_t")}
        assert equal(evaluate(functional.attention_kl, call.with_options(**biases)), expected)


@pytest.mark.parametrize("kind", ["kl", "reverse_kl"])
def test_a_bias_of_minus_infinity_hides_a_key(kind):
    """On both sides: the loss without that key, and no gradient to it. As a causal mask: the option itself."""
    (case,) = named("attention_kl-plain")
    call = case.make().with_options(kind=kind)
    hidden = torch.zeros(41).index_fill_(0, torch.tensor([5, 17]), -torch.inf)
    keys = torch.tensor([j for j in range(41) if j not in (5, 17)])
    loss, (_, grad_k) = evaluate(functional.attention_kl, call.with_options(bias_s=hidden, bias_t=hidden))
    assert (grad_k[:, :, [5, 17]] == 0).all()
    without = call.with_options(reduction="none", mask=hidden.isfinite().expand(2, 41))
    rows = functional.attention_kl(**call.with_options(reduction="none", bias_s=hidden, bias_t=hidden).arguments)
    torch.testing.assert_close(rows[..., keys], functional.attention_kl(**without.arguments)[..., keys])
    future = torch.full((41, 41), -torch.inf).triu(1)
    by_bias = evaluate(functional.attention_kl, call.with_options(bias_s=future, bias_t=future))
    torch.testing.assert_close(by_bias, evaluate(functional.attention_kl, call.with_options(causal=True)))


@pytest.mark.parametrize("kind", ["kl", "reverse_kl"])
@pytest.mark.parametrize("option", ["bias", "lse", "causal", "head_sum"])
def test_identical_inputs_give_exactly_zero(option, kind):
    q, k = torch.randn(2, 3, 33, 8, requires_grad=True), torch.randn(2, 3, 33, 8, requires_grad=True)
    bias, lse = torch.randn(3, 33, 33), (q @ k.mT * 8**-0.5).logsumexp(-1).detach()
    given = {
        "bias": {"bias_s": bias, "bias_t": bias},
        "lse": {"lse_s": lse, "lse_t": lse},
        "causal": {"causal": True},
        "head_sum": {"head_reduction": "sum"},
    }[option]
    loss = functional.attention_kl(q, k, q.detach(), k.detach(), kind=kind, **given)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (q, k)))


@pytest.mark.parametrize("side", ["scale_s", "scale_t"])
@pytest.mark.parametrize(
    ("op", "options"),
    [
        *(("attention_kl", {"kind": kind}) for kind in ("kl", "reverse_kl")),
        *(("attention_mse", {"on": on}) for on in ("probs", "scores")),
    ],
    ids=str,
)
def test_a_scale_of_0_makes_all_scores_equal(op, options, side):
    """0 * -inf, which stands for what lies behind a row that is no whole vector, would be NaN."""
    call = next(case for case in of(op) if case.name.endswith("plain")).make()
    call = call.with_options(**{**options, side: 0.0})
    got, truth = (
        evaluate(getattr(module, op), given)
        for module, given in ((functional, call), (reference, call.to(torch.float64)))
    )
    torch.testing.assert_close([got[0], *got[1]], [truth[0], *truth[1]], rtol=1e-5, atol=1e-7, check_dtype=False)
    if side == "scale_s":
        assert all((gradient == 0).all() for gradient in got[1])


def test_options_that_say_nothing_new():
    (case,) = named("attention_kl-mask_lengths")
    call = case.make()
    expected = evaluate(functional.attention_kl, call)
    assert equal(evaluate(functional.attention_kl, call.with_options(head_map=[0, 1, 2])), expected)
    assert equal(evaluate(functional.attention_kl, call.with_options(kind="kl", causal=False)), expected)
    zero = torch.zeros(1)
    torch.testing.assert_close(evaluate(functional.attention_kl, call.with_options(bias_s=zero)), expected)


def test_grouped_heads_are_repeated_keys():
    (case,) = named("attention_kl-grouped")
    call = case.make()
    loss, (grad_q, grad_k) = evaluate(functional.attention_kl, call)

    def repeat(x):
        return x.repeat_interleave(4 // x.shape[1], 1)

    repeated_loss, (repeated_q, repeated_k) = evaluate(functional.attention_kl, call.map(repeat))
    torch.testing.assert_close([loss, grad_q], [repeated_loss, repeated_q])
    torch.testing.assert_close(grad_k, repeated_k.unflatten(1, (2, 2)).sum(2))


def test_no_gradient_to_lse():
    """A log-sum-exp with a graph of its own gets none: the gradient is the loss's by q and k."""
    (case,) = named("attention_kl-lse")
    call = case.make()
    expected = evaluate(functional.attention_kl, call)
    lse = call.other["lse_s"].clone().requires_grad_()
    got = functional.attention_kl(**{**call.arguments, "lse_s": lse})
    gradients = torch.autograd.grad(got, [*call.leaves, lse], torch.tensor(0.375), allow_unused=True)
    assert gradients[2] is None
    assert equal((got.detach(), gradients[:2]), expected)
