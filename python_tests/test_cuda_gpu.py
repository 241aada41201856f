"""What only a GPU can show: of every op streams, CUDA graphs and that the host never waits; of kd_loss, whose CUDA C++
kernels nothing else runs there, the table of cases, memory and a second device too. The Triton kernels' values are in
test_triton.py, those of quant_linear in test_cuda_quant_linear.py, and all of varlen_attention is in
test_cuda_varlen_attention.py. Quantised encoders: values, graphs, no waiting."""

import copy

import pytest
import torch

import kdkernels
from kdkernels import functional
from kdkernels.ops._common import KIND
from kdkernels.quant import Scheme, linear, pack

from . import tolerance
from .case import OPS, evaluate
from .cases import of
from .test_cuda_quant_linear import Gpu, extremes
from .test_quantize import batch, tiny

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

KINDS = list(KIND)
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16_student": (torch.bfloat16, torch.float32),
    "float16_teacher": (torch.float32, torch.float16),
}


# Without a mask and with one, which is another way through each op.
EVERY_OP = [case for op in OPS for case in (of(op)[0], next(case for case in of(op) if case.mask is not None))]


def flat(result) -> list[torch.Tensor]:
    return [result[0], *result[1]]


def pair(*shape, dtype=torch.float32, spread=3.0, device="cuda"):
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = ((torch.randn(shape, generator=generator, device=device) * spread).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def loss_and_gradient(student, teacher, **options):
    loss = functional.kd_loss(student, teacher, **options)
    return loss.detach(), *torch.autograd.grad(loss, student, torch.full_like(loss, 0.375))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", of("kd_loss"), ids=lambda case: case.id)
def test_table(case, dtypes):
    assert tolerance.violations(case, dtypes, device="cuda") == []


@pytest.mark.parametrize("rows, classes", [(600, 30522), (64, 128256), (4096, 2), (20000, 9), (1, 262144)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_real_sizes(kind, dtype, rows, classes):
    """Every way of sharing a row out, against float64, and the same bits on every run."""
    student, teacher = pair(rows, classes, dtype=dtype)
    options = {"kind": kind, "temperature": 2.0, "mask": torch.arange(rows, device="cuda") % 5 != 2}
    loss, gradient = loss_and_gradient(student, teacher, **options)
    truth, expected = loss_and_gradient(student.detach().double().requires_grad_(), teacher.double(), **options)
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=1e-7)
    error = (gradient.double() - expected).abs() - torch.finfo(dtype).eps / 2 * expected.abs()
    assert error.max() <= 4e-6 * expected.abs().max()
    for _ in range(3):
        again = loss_and_gradient(student, teacher, **options)
        assert torch.equal(again[0], loss) and torch.equal(again[1], gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [5, 129, 3001, 30522])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_identical_inputs_give_exactly_zero(kind, classes, dtype):
    """Rests on the GPU's own exponential and on which products the compiler fused."""
    _, logits = pair(7, classes, dtype=dtype)
    for teacher in (logits, logits.float()):
        for temperature in (1.0, 3.0):
            student = logits.clone().requires_grad_()
            loss, gradient = loss_and_gradient(student, teacher, kind=kind, temperature=temperature, beta=0.3)
            assert kind == "ce" or loss == 0
            assert (gradient == 0).all()


def test_bad_values_give_nan_for_their_row():
    student, teacher = pair(4, 100)
    labels = torch.tensor([3, 100, -1, -100], device="cuda")
    loss, gradient = loss_and_gradient(student, teacher, labels=labels, alpha=0.5, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, False]
    assert gradient[1:3].isnan().all() and gradient[::3].isfinite().all()
    temperature = torch.tensor([1.0, 0.0, -2.0, float("nan")], device="cuda")
    loss, gradient = loss_and_gradient(student, teacher, temperature=temperature, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, True]
    assert gradient[0].isfinite().all()


def test_what_padding_holds_never_matters():
    student, teacher = pair(9, 3001)
    mask = torch.arange(9, device="cuda") % 3 == 0
    clean = loss_and_gradient(student, teacher, mask=mask)
    with torch.no_grad():
        student[~mask], teacher[~mask] = torch.nan, torch.inf
    loss, gradient = loss_and_gradient(student, teacher, mask=mask)
    assert torch.equal(loss, clean[0]) and torch.equal(gradient, clean[1])
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("case", EVERY_OP, ids=lambda case: case.id)
def test_every_op_replays_in_a_graph(case):
    """Forward and backward captured together; what the inputs hold at the replay is what counts."""
    call, function = case.make(device="cuda"), getattr(functional, case.op)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        evaluate(function, call)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = flat(evaluate(function, call))
    with torch.no_grad():
        for leaf in call.leaves:
            leaf.mul_(0.5)
        if "mask" in call.other:
            call.other["mask"].logical_not_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, flat(evaluate(function, call)), strict=True))


@pytest.mark.parametrize("case", EVERY_OP, ids=lambda case: case.id)
def test_every_op_on_two_streams(case):
    """Each stream has work of its own before it, so that kernels queued elsewhere would read what is not there yet."""
    calls, function = [case.make(seed, device="cuda") for seed in range(2)], getattr(functional, case.op)
    expected = [flat(evaluate(function, call)) for call in calls]
    late = [call.map(torch.zeros_like) for call in calls]
    streams, results = [torch.cuda.Stream() for _ in calls], []
    for stream, call, empty in zip(streams, calls, late, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            torch.cuda._sleep(20_000_000)
            for x, y in zip(empty.leaves + empty.teachers, call.leaves + call.teachers, strict=True):
                x.copy_(y)
        with torch.cuda.stream(stream):
            results.append(flat(evaluate(function, empty)))
    torch.cuda.synchronize()
    for got, true in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, true, strict=True))


@pytest.mark.parametrize("case", EVERY_OP, ids=lambda case: case.id)
def test_no_op_waits_for_the_device(case):
    call, function = case.make(device="cuda"), getattr(functional, case.op)
    evaluate(function, call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(function, call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream():
    student, teacher = pair(64, 30522)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = teacher + 1.0 * torch.arange(30522, device="cuda") / 30522
        loss, gradient = loss_and_gradient(student, late)
    stream.synchronize()
    expected = loss_and_gradient(student, late)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])


@pytest.mark.parametrize("rows", [64, 9000])
def test_replays_in_a_graph(rows):
    student, teacher = pair(rows, 1000)
    mask = torch.arange(rows, device="cuda") % 4 != 1
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        loss_and_gradient(student, teacher, mask=mask)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = loss_and_gradient(student, teacher, mask=mask)
    with torch.no_grad():
        student.mul_(0.5), mask.logical_not_()
    graph.replay()
    expected = loss_and_gradient(student, teacher, mask=mask)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])


def test_memory_beyond_the_gradient():
    """32 bytes a row, and what torch's allocator rounds three small tensors up to."""
    student, teacher = pair(4096, 8192, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_and_gradient(student, teacher)
    extra = torch.cuda.max_memory_allocated() - before - student.numel() * student.element_size()
    assert extra <= 32 * 4096 + 4 * 512


def test_offsets_beyond_32_bits():
    """More than 2^31 classes in all, and a row that lies more than 2^31 elements away."""
    rows, classes = 70_000, 32_000
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GB")
    student = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    teacher = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    small_s, small_t = pair(2, classes, dtype=torch.bfloat16)
    student[-2:], teacher[-2:] = small_s.detach(), small_t
    student.requires_grad_()
    loss, gradient = loss_and_gradient(student, teacher, reduction="sum")
    expected = loss_and_gradient(small_s, small_t, reduction="sum")
    torch.testing.assert_close(loss, expected[0])
    assert torch.equal(gradient[-2:], expected[1]) and not gradient[:-2].any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_a_device_that_is_not_current():
    here, there = (loss_and_gradient(*pair(64, 3001, device=f"cuda:{device}")) for device in (0, 1))
    assert torch.cuda.current_device() == 0 and there[1].device.index == 1
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(here, there, strict=True))


def test_tensors_on_different_devices_are_an_error():
    student, teacher = pair(4, 10)
    with pytest.raises(ValueError, match="teacher_logits"):
        functional.kd_loss(student, teacher.cpu())
    scalars = (0, 1.0, True, 0.5, 1.0, -100, 3)
    with pytest.raises(RuntimeError, match="teacher must be on the student's device"):
        torch.ops.kdkernels.kd_loss(student.detach()[None], teacher.cpu()[None], None, None, None, *scalars)


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_opcheck_and_compile(reduction):
    student, teacher = pair(3, 129)
    labels = torch.tensor([5, -100, 7], device="cuda")
    scalars = (0, 2.0, True, 0.5, 0.3, -100, {"none": 0, "batchmean": 3}[reduction])
    arguments = (student.detach()[None].requires_grad_(), teacher[None], None, labels[None], None, *scalars)
    torch.library.opcheck(torch.ops.kdkernels.kd_loss.default, arguments)
    options = {"labels": labels, "alpha": 0.3, "temperature": 2.0, "reduction": reduction}
    compiled = torch.compile(lambda s, t: functional.kd_loss(s, t, **options), fullgraph=True)
    loss = compiled(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student, torch.full_like(loss, 0.375))
    expected = loss_and_gradient(student, teacher, **options)
    assert torch.equal(loss.detach(), expected[0]) and torch.equal(gradient, expected[1])


@pytest.mark.parametrize("rows", [3, 16, 133, 2050])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_integer_sums_are_exact(bits, rows):
    """Few rows, and enough for both sizes of tiles."""
    x, packed, expected = extremes(bits, rows, 400, 1100)
    assert torch.equal(Gpu().linear(x, packed), expected)


@pytest.fixture(params=["int8", "int4", "int3", "int2", Scheme(4, "block", activation_bits=None)], ids=str)
def product(request):
    """A linear layer of x in that scheme, 300 features to 200."""
    generator = torch.Generator("cuda").manual_seed(0)
    packed = pack(torch.randn(200, 300, generator=generator, device="cuda"), request.param)
    return lambda x: linear(x, packed, activation="gelu")


ROWS = pytest.mark.parametrize("rows", [1, 16, 150])


@ROWS
def test_products_replay_in_a_graph(product, rows):
    """What x holds at the replay is what counts."""
    x = torch.randn(rows, 300, device="cuda", dtype=torch.bfloat16)
    product(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(x)
    x.mul_(-0.5)
    graph.replay()
    assert torch.equal(y, product(x))


@ROWS
def test_products_on_two_streams(product, rows):
    """Each stream has work of its own before it, so that kernels queued elsewhere would read what is not there yet."""
    inputs = [torch.randn(rows, 300, device="cuda") for _ in range(2)]
    expected, results = [product(x) for x in inputs], []
    late = [torch.zeros_like(x) for x in inputs]
    for stream, x, empty in zip([torch.cuda.Stream() for _ in inputs], inputs, late, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            results.append(product(empty.copy_(x)))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@ROWS
def test_products_never_wait_for_the_device(product, rows):
    x = torch.randn(rows, 300, device="cuda")
    product(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        product(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=[("bert", "int8"), ("roberta", "int4"), ("distilbert", "int2")], ids="-".join)
def encoder(request):
    """A quantised model on the CPU and the same on the GPU, and a batch of texts of mixed length for each."""
    name, scheme = request.param
    model = kdkernels.quantize(tiny(name), scheme).requires_grad_(False)
    inputs = batch(model.config)
    return model, inputs, copy.deepcopy(model).cuda(), {key: x.cuda() for key, x in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_encoder_gives_what_the_cpu_gives(encoder, dtype):
    """Attention's products are bf16 or fp16 there, which flips codes here and there; padding is exactly 0."""
    on_cpu, inputs, model, on_gpu = encoder
    real, expected = inputs["attention_mask"].bool(), on_cpu(**inputs).last_hidden_state
    got = model.to(dtype)(**on_gpu).last_hidden_state.cpu()
    assert got.dtype == dtype and not got[~real].any()
    assert torch.nn.functional.cosine_similarity(got[real].float(), expected[real]).min() > 0.99


def test_encoder_replays_in_a_graph(encoder):
    """On texts of other lengths than those that were captured."""
    model, inputs = encoder[2:]
    other = {key: x.cuda() for key, x in batch(model.config, lengths=(3, 17, 0, 8), seed=1).items()}
    expected = [model(**given).last_hidden_state for given in (inputs, other)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(**inputs).last_hidden_state
    for given, true in zip((dict(inputs), other), expected, strict=True):
        for key, x in given.items():
            inputs[key].copy_(x)
        graph.replay()
        assert torch.equal(output, true)


def test_encoder_never_waits_for_the_device(encoder):
    model, inputs = encoder[2:]
    model(**inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_encoder_compiles_to_graphs(encoder):
    """torch.compile(mode="reduce-overhead") captures by itself."""
    model, inputs = encoder[2:]
    expected = model(**inputs).last_hidden_state
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        got = compiled(**inputs).last_hidden_state.clone()
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.999
