"""kd_loss's CUDA kernels, compiled by the host compiler and run on the CPU: each thread and barrier of the real source.

What this cannot show: the rounding of the GPU's own exponential and logarithm, races of a warp's own lanes, and speed.
"""

import pytest
import torch

from kdkernels import reference
from kdkernels.ops._common import KIND, REDUCTION

from . import tolerance
from .cases import of
from .cuda_host import Host, threads_reversed
from .sparse import far_apart

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS, REDUCTIONS = list(KIND), list(REDUCTION)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    return Host(tmp_path_factory.mktemp("cuda_host"))


@pytest.fixture
def host_as_cpu(host):
    """The public function leads to these kernels: they take the place of the CPU's."""
    calls = set()
    library = torch.library.Library("kdkernels", "IMPL")
    for op in ("kd_loss", "kd_loss_backward"):

        def call(*arguments, op=op):
            calls.add(op)
            return getattr(host, op)(*arguments)

        library.impl(op, call, "CPU", allow_override=True)
    yield
    library._destroy()
    assert calls == {"kd_loss", "kd_loss_backward"}


def logits(*shape, seed=0, spread=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def pair(*shape, student=torch.float32, teacher=torch.float32, **how):
    return logits(*shape, seed=1, dtype=student, **how), logits(*shape, seed=2, dtype=teacher, **how)


def extras(outer, inner, classes):
    """A mask with holes, labels with ignored rows, a temperature per row."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, classes, (outer, inner), generator=generator)
    labels[..., ::3] = -100
    return {
        "mask": torch.rand(outer, inner, generator=generator) < 0.7,
        "labels": labels,
        "alpha": 0.3,
        "temperature": 0.5 + 3 * torch.rand(outer, inner, generator=generator),
    }


def autograd(student, teacher, grad, dtype, options):
    leaf = student.detach().to(dtype).requires_grad_()
    if isinstance(options.get("temperature"), torch.Tensor):
        options = {**options, "temperature": options["temperature"].to(dtype)}
    loss = reference.kd_loss(leaf, teacher.to(dtype), **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss) if grad is None else grad.to(dtype))
    return loss.detach(), gradient


def check(host, student, teacher, grad=None, **options):
    """Against fp64: no worse than twice what eager fp32 loses, and the rounding of a 16-bit gradient."""
    loss, gradient = host.run(student, teacher, grad, **options)
    true_loss, true_gradient = autograd(student, teacher, grad, torch.float64, options)
    eager_loss, eager_gradient = autograd(student, teacher, grad, torch.float32, options)
    for ours, eager, truth in ((loss, eager_loss, true_loss), (gradient, eager_gradient, true_gradient)):
        assert ours.isfinite().all()
        # Half a unit in the last place of the result's dtype, and some slack where eager is right by luck.
        scale = truth.abs().max().item() if truth.numel() else 0.0
        rounding = torch.finfo(ours.dtype).eps / 2 * truth.abs() + torch.finfo(ours.dtype).smallest_normal * 2**-7
        if ours.dtype == torch.float16:
            rounding = rounding.clamp_min(2**-25)
        allowed = 2 * (eager.double() - truth).abs().max().item() if truth.numel() else 0.0
        if options.get("kind") == "reverse_kl" and truth is true_gradient:
            # p_s (log p_s - log p_t - L): where p_s is nearly one-hot, numbers as large as the loss cancel.
            scale += true_loss.abs().max().item()
        excess = (ours.double() - truth).abs() - rounding
        assert (excess <= max(allowed, 1e-6 * scale)).all(), f"{excess.max():.2e} over {allowed:.2e} at {scale:.2e}"
    return loss, gradient


@pytest.mark.parametrize("dtypes", [(x, x) for x in DTYPES] + [(torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("case", of("kd_loss"), ids=lambda case: case.id)
def test_table(host_as_cpu, case, dtypes):
    assert tolerance.violations(case, dtypes, seeds=range(2)) == []


@pytest.mark.parametrize("teacher", DTYPES, ids=str)
@pytest.mark.parametrize("student", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_dtype(host, kind, student, teacher):
    check(host, *pair(2, 5, 41, student=student, teacher=teacher), torch.tensor(0.375), kind=kind, **extras(2, 5, 41))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_reductions(host, kind, reduction):
    s, t = pair(3, 4, 19)
    grad = torch.linspace(-1, 2, 12).view(4, 3).t() if reduction == "none" else torch.tensor(-1.5)
    options = extras(3, 4, 19)
    check(host, s, t, grad, kind=kind, reduction=reduction, **options)
    check(host, s, t, grad, kind=kind, reduction=reduction, beta=0.2, temperature=4.0, scale_t2=False)
    check(host, s, t, grad, kind=kind, reduction=reduction, mask=options["mask"])
    check(host, s, t, grad, kind=kind, reduction=reduction, labels=options["labels"], alpha=0.9)


def test_upstream_gradient_that_is_one_number_for_all_rows(host):
    check(host, *pair(2, 3, 9), torch.tensor(2.5).expand(2, 3), reduction="none")


# A thread, 8 lanes, a warp and a block per row; whole chunks, broken ones, and rows that begin anywhere in 16 bytes.
@pytest.mark.parametrize("classes", [1, 2, 7, 8, 9, 32, 33, 128, 129, 1000, 2048, 2053, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_lengths(host, classes, dtype):
    for kind in ("kl", "jsd"):
        check(host, *pair(1, 5, classes, student=dtype, teacher=dtype), kind=kind, **extras(1, 5, classes))


def test_more_rows_than_share_a_block_or_a_sum(host):
    check(host, *pair(3, 2801, 2), **extras(3, 2801, 2))
    check(host, *pair(1, 37, 40), **extras(1, 37, 40))


def test_block_of_256(host):
    """From 512 long rows on, blocks are smaller; all but a few rows are padding here, to be quick."""
    s, t = pair(1, 512, 2056)
    check(host, s, t, mask=torch.arange(512).view(1, 512) % 100 == 3)


def layouts(dtype):
    wide = logits(3, 5, 200, seed=4, dtype=dtype)
    yield "every second class", wide[..., ::2]
    yield "rows that begin off the 16-byte grid", wide[..., 3:103]
    yield "all but the last token", logits(3, 6, 100, seed=5, dtype=dtype)[:, :-1]
    yield "transposed rows", logits(5, 3, 100, seed=6, dtype=dtype).transpose(0, 1)
    yield "classes outermost", logits(100, 3, 5, seed=7, dtype=dtype).permute(1, 2, 0)
    yield "one row for all", logits(1, 1, 100, seed=8, dtype=dtype).expand(3, 5, 100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(host, dtype):
    plain = logits(3, 5, 100, seed=9, dtype=torch.bfloat16)
    for _, view in layouts(dtype):
        check(host, view, plain)
        check(host, plain, view, kind="reverse_kl")


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_beyond_32_bits(host, dtype, axis):
    """Rows, or classes, more than 2^32 elements apart, and so the upstream gradient's rows. Where a row begins in
    memory says in which order its classes are added."""
    s, t = pair(2, 3, 41, student=dtype, teacher=dtype)
    grad = torch.linspace(-1, 2, 6).view(2, 3)
    options = {**extras(2, 3, 41), "reduction": "none", "kind": "jsd"}
    expected = host.run(s, t, grad, **options)
    got = host.run(far_apart(s, axis), far_apart(t, axis), far_apart(grad, min(axis, 1)), **options)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 3.0, 0.07])
def test_identical_inputs_give_exactly_zero(host, kind, temperature):
    s = logits(2, 3, 133, dtype=torch.bfloat16)
    for classes in (133, 5):
        for t in (s[..., :classes], s[..., :classes].float()):
            loss, gradient = host.run(s[..., :classes], t, kind=kind, temperature=temperature, beta=0.3)
            assert kind == "ce" or loss == 0
            assert (gradient == 0).all()


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_of_one_side_is_exactly_zero(host, beta):
    loss, gradient = host.run(*pair(1, 4, 50), kind="jsd", beta=beta)
    assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_classes_of_probability_zero_change_nothing(host, kind):
    s, t = pair(2, 2, 60)
    padding = torch.full((2, 2, 13), -torch.inf)
    where = torch.randperm(73, generator=torch.Generator().manual_seed(0))
    padded_s, padded_t = torch.cat((s, padding), -1)[..., where], torch.cat((t, padding), -1)[..., where]
    loss, gradient = check(host, padded_s, padded_t, kind=kind, temperature=2.0)
    assert (gradient[padded_s == -torch.inf] == 0).all()


def test_a_class_that_only_the_teacher_excludes_counts_nothing(host):
    s, t = pair(1, 3, 30)
    t[..., 4:9] = -torch.inf
    for kind in ("kl", "ce", "jsd", "tv"):
        check(host, s, t, kind=kind)
    s[..., 4] = -torch.inf
    check(host, s, t)


def test_a_class_that_only_the_student_excludes_costs_infinity(host):
    s, t = pair(1, 3, 3000)
    s[0, 1, 2500] = -torch.inf
    for kind in ("kl", "ce"):
        loss, gradient = host.run(s, t, kind=kind, reduction="none")
        assert loss[0, 1] == torch.inf and loss[0, 0].isfinite() and gradient.isfinite().all()
    # Its teacher probability underflows only once a larger logit has been seen.
    t[0, 1, 2500], t[0, 1, 2900] = t[0, 1].min(), 4000.0
    assert host.run(s, t, reduction="none")[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_that_underflow(host, kind):
    """Most classes lie far below fp32's smallest number on both sides, where the log of a probability would be -inf."""
    check(host, *pair(1, 4, 100, spread=300.0), kind=kind)
    check(host, *pair(1, 4, 3000, spread=300.0), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_far_from_zero(host, kind):
    s, t = pair(1, 4, 2500)
    check(host, s + 30000, t - 10000, kind=kind, **extras(1, 4, 2500))


@pytest.mark.parametrize("temperature", [0.01, 20.0, 500.0])
def test_extreme_temperatures_beside_labels(host, temperature):
    options = {**extras(1, 6, 50), "temperature": temperature}
    check(host, *pair(1, 6, 50, spread=20.0), **options)
    options = {**extras(1, 3, 4000), "temperature": temperature}
    check(host, *pair(1, 3, 4000, spread=20.0), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_padding_holds_never_matters(host, kind, reduction):
    s, t = pair(2, 3, 100)
    options = extras(2, 3, 100)
    clean = host.run(s, t, kind=kind, reduction=reduction, **options)
    padded = ~options["mask"]
    s[padded], t[padded] = torch.nan, torch.inf
    options["temperature"] = options["temperature"].masked_fill(padded, torch.nan)
    options["labels"] = options["labels"].masked_fill(padded, 12345)
    loss, gradient = host.run(s, t, kind=kind, reduction=reduction, **options)
    assert torch.equal(loss, clean[0]) and torch.equal(gradient, clean[1])
    assert (gradient[padded] == 0).all()


@pytest.mark.parametrize("classes", [3, 100, 3000])
def test_no_real_row(host, classes):
    s = torch.full((2, 2, classes), torch.nan)
    mask, labels = torch.zeros(2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.long)
    for reduction in REDUCTIONS:
        loss, gradient = host.run(s, s, mask=mask, labels=labels, reduction=reduction)
        assert (loss == 0).all() and (gradient == 0).all()


def test_no_row(host):
    s = torch.empty(0, 4, 7)
    for reduction in REDUCTIONS:
        loss, gradient = host.run(s, s, reduction=reduction, labels=torch.empty(0, 4, dtype=torch.long))
        assert (loss == 0).all() and gradient.shape == s.shape


def test_labels_all_ignored(host):
    s, t = pair(1, 3, 20)
    check(host, s, t, labels=torch.full((1, 3), 7), ignore_index=7, alpha=0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [5, 100, 3000])
def test_nan_stays_in_its_row_and_is_seen(host, kind, classes):
    for side in (0, 1):
        logit = pair(1, 3, classes)
        logit[side][0, 1, classes // 2] = torch.nan
        loss, gradient = host.run(*logit, kind=kind, reduction="none")
        assert loss.isnan().tolist() == [[False, True, False]]
        assert gradient[0, 1].isnan().any() and gradient[0, ::2].isfinite().all()


@pytest.mark.parametrize("label", [-1, 100, 2**40, -(2**62)])
def test_a_label_out_of_range_gives_nan_for_its_row(host, label):
    labels = torch.tensor([[3, label, -100]])
    loss, gradient = host.run(*pair(1, 3, 100), labels=labels, alpha=0.5, reduction="none")
    assert loss.isnan().tolist() == [[False, True, False]]
    assert gradient[0, 1].isnan().all() and gradient[0, ::2].isfinite().all()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_a_bad_temperature_gives_nan_for_its_row(host, bad):
    temperature = torch.tensor([[1.0, bad, 2.0]])
    loss, gradient = host.run(*pair(1, 3, 100), temperature=temperature, reduction="none")
    assert loss.isnan().tolist() == [[False, True, False]]
    assert gradient[0, 1].isnan().all() and gradient[0, ::2].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [3, 100, 1000, 4099])
def test_the_order_of_threads_does_not_show(host, kind, classes):
    """A missing barrier would: each thread then reads what others have, or have not yet, written."""
    s, t = pair(1, 5, classes, student=torch.bfloat16, teacher=torch.float16)
    options = {**extras(1, 5, classes), "kind": kind, "reduction": "mean"}
    first = host.run(s, t, **options)
    with threads_reversed(host.library):
        second = host.run(s, t, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("at", ["barrier", "shuffle"])
def test_the_host_reports_threads_that_never_meet(host, at):
    with pytest.raises(RuntimeError, match="different barriers"):
        host.diverge(at)


def test_a_gpu_that_has_no_code_is_an_error_in_words(host):
    """cudaErrorNoKernelImageForDevice, which a launch returns there."""
    assert "not built for this GPU" in host.library.host_status_text(209).decode()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_host_converts_as_torch_does(host, dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    torch.testing.assert_close(host.to_float(every), every.float(), rtol=0, atol=0, equal_nan=True)
    ties = every.float() * (1 + 2**-9)
    numbers = torch.cat((every.float(), ties, logits(10000, spread=1e-6), logits(10000, spread=1e4)))
    converted = host.from_float(numbers, dtype)
    torch.testing.assert_close(converted, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)
