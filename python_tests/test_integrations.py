"""The losses beside what a training script surrounds them with: autocast, GradScaler, torch.compile, activation
checkpointing, torch.func, saved-tensor hooks, threads, copies of modules. Results are those of a plain call, mostly to
the bit.

CUDA graphs and streams are in test_cuda_gpu.py, host synchronisation in test_layers.py, DDP in test_distill_resume.py.
"""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from kdkernels import explain, functional, nn, reference

from .case import OPS, Call, evaluate, upstream
from .cases import CASES, of
from .test_registration import Recorder

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = (torch.bfloat16, torch.float16)
MIXES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
# A map at a time, a row at a time: what backward saves differs, and with it what a hook or a second forward sees.
SAVING = [of(op)[0] for op in OPS] + [
    case for case in CASES if case.name in ("none", "projected_each", "labels_masked")
]
ids = {"ids": lambda case: case.id}


def equal(a, b) -> bool:
    return torch.equal(a[0], b[0]) and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def of_leaves(call: Call, function):
    """The loss as a function of the student's tensors alone, for calls without lists."""
    return lambda *leaves: function(**dict(zip(call.student, leaves, strict=True)), **call.teacher, **call.other)


def detached(tensors) -> tuple[torch.Tensor, ...]:
    return tuple(x.detach() for x in tensors)


# Autocast and gradient scaling


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(op, half, dtypes):
    """Arithmetic and loss stay float32, whatever mix of dtypes a model hands over."""
    call = of(op)[0].make(dtypes=dtypes)
    function = getattr(functional, op)
    loss = function(**call.arguments)
    with torch.autocast("cpu", half):
        inside = function(**call.arguments)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss)
    above = upstream(loss)
    expected = torch.autograd.grad(loss, call.leaves, above)
    assert all(
        torch.equal(a, b) for a, b in zip(torch.autograd.grad(inside, call.leaves, above), expected, strict=True)
    )


@pytest.mark.parametrize("case", CASES, **ids)
def test_autocast_does_not_reach_the_reference(case):
    """It serves where no kernel does, and then its products must not be rounded either."""
    call = case.make()
    function = getattr(reference, case.op)
    with torch.autocast("cpu", torch.bfloat16):
        inside = function(**call.arguments)
    assert torch.equal(inside, function(**call.arguments))


def test_a_step_under_a_gradient_scaler():
    """A scale that is a power of two changes no bit of the step; an infinite loss skips it."""

    def step(scaler, poison=1.0):
        torch.manual_seed(0)
        student, inputs, teacher = torch.nn.Linear(6, 9), torch.randn(5, 6), torch.randn(5, 9)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        loss = functional.kd_loss(student(inputs) * poison, teacher, temperature=2.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return list(student.parameters()), scaler.get_scale()

    plain, _ = step(torch.amp.GradScaler("cpu", enabled=False))
    scaled, _ = step(torch.amp.GradScaler("cpu", init_scale=2.0**16))
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))
    skipped, scale = step(torch.amp.GradScaler("cpu", init_scale=2.0**16), poison=torch.inf)
    assert scale == 2.0**15
    assert all(p.isfinite().all() for p in skipped)


# torch.compile


class Graphs:
    """A backend that counts what was compiled."""

    def __init__(self):
        torch._dynamo.reset()
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return aot_eager(graph, inputs)


def resized(case, batch, tokens):
    sizes = {"lead": (batch, tokens), "rows": batch, "batch": batch, "tokens": tokens}
    return replace(case, shape={**case.shape, **{key: value for key, value in sizes.items() if key in case.shape}})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_one_recompile_serves_every_shape(op, masked):
    """The first batch compiles its own shape, the second all others."""
    case = replace(of(op)[0], mask="holes" if masked else None)
    graphs = Graphs()
    compiled = torch.compile(getattr(functional, op), fullgraph=True, backend=graphs)
    for batch, tokens in ((3, 19), (4, 31), (5, 7), (2, 26)):
        call = resized(case, batch, tokens).make()
        assert equal(evaluate(compiled, call), evaluate(getattr(functional, op), call))
    assert graphs.count <= 2


def test_a_temperature_schedule_does_not_recompile():
    """As a tensor; a Python number that an op takes is a constant to the compiler."""
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    graphs = Graphs()
    compiled = torch.compile(functional.kd_loss, fullgraph=True, backend=graphs)
    for temperature in (1.0, 2.0, 3.5, 7.0):
        got = compiled(student, teacher, temperature=torch.tensor(temperature))
        assert torch.equal(got, functional.kd_loss(student, teacher, temperature=temperature))
    assert graphs.count == 1


def test_a_compiled_training_step():
    """Student, several losses and their sum in one graph without a break; the steps are those of eager code."""

    def losses(student, inputs, mask, teacher):
        hidden = student["body"](inputs)
        heads = hidden.unflatten(-1, (2, 4)).transpose(1, 2)
        return (
            functional.kd_loss(student["head"](hidden), teacher["logits"], temperature=4.0, mask=mask)
            + functional.hidden_mse(hidden, teacher["hidden"], mask, weight=student["fit"].weight)
            + functional.attention_mse(heads, heads, teacher["heads"], teacher["heads"], mask)
            + functional.relation_kl(hidden, teacher["hidden"], mask, num_heads=2)
        )

    def train(function):
        torch.manual_seed(0)
        student = torch.nn.ModuleDict(
            {"body": torch.nn.Linear(6, 8), "head": torch.nn.Linear(8, 11), "fit": torch.nn.Linear(8, 12)}
        )
        optimizer = torch.optim.AdamW(student.parameters())
        for tokens in (7, 9, 5):
            inputs, mask = torch.randn(2, tokens, 6), torch.rand(2, tokens) < 0.7
            wide = torch.randn(2, tokens, 12)
            heads = wide.unflatten(-1, (2, 6)).transpose(1, 2)
            teacher = {"logits": torch.randn(2, tokens, 11), "hidden": wide, "heads": heads}
            optimizer.zero_grad()
            function(student, inputs, mask, teacher).backward()
            optimizer.step()
        return list(student.parameters())

    expected = train(losses)
    graphs = Graphs()
    got = train(torch.compile(losses, fullgraph=True, backend=graphs))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert graphs.count <= 2


# What runs the forward pass a second time, or keeps its tensors elsewhere


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])
@pytest.mark.parametrize("case", SAVING, **ids)
def test_activation_checkpointing(case, reentrant):
    call = case.make()
    function = getattr(functional, case.op)
    _, expected = evaluate(function, call)
    # An input that requires grad: reentrant checkpoints look at nothing else.
    tick = torch.ones((), requires_grad=True)
    loss = checkpoint(lambda tick: function(**call.arguments) * tick, tick, use_reentrant=reentrant)
    loss.backward(upstream(loss))
    assert all(torch.equal(leaf.grad, g) for leaf, g in zip(call.leaves, expected, strict=True))


@pytest.mark.parametrize("case", SAVING, **ids)
def test_saved_tensors_may_be_kept_elsewhere(case):
    """As torch.autograd.graph.save_on_cpu does."""
    call = case.make()
    function = getattr(functional, case.op)
    expected = evaluate(function, call)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        assert equal(evaluate(function, call), expected)


# torch.func: the reference computes, since the fused ops have no rules for its transforms


@pytest.mark.parametrize("op", OPS)
def test_func_grad(op):
    call = of(op)[0].make()
    function = of_leaves(call, getattr(functional, op))
    got = torch.func.grad(function, argnums=tuple(range(len(call.leaves))))(*detached(call.leaves))
    torch.testing.assert_close(got, torch.autograd.grad(function(*call.leaves), call.leaves))


@pytest.mark.parametrize("op", OPS)
def test_forward_mode(op):
    """torch itself drops the tangent at an op without a rule: a derivative of 0, and no error."""
    call = of(op)[0].make()
    function = of_leaves(call, getattr(functional, op))
    gradients = torch.autograd.grad(function(*call.leaves), call.leaves)
    primals = detached(call.leaves)
    tangents = tuple(torch.randn_like(x) for x in primals)
    expected = sum((g * v).sum() for g, v in zip(gradients, tangents, strict=True))
    torch.testing.assert_close(torch.func.jvp(function, primals, tangents)[1], expected, rtol=1e-4, atol=1e-6)
    with forward_ad.dual_level():
        dual = function(*map(forward_ad.make_dual, primals, tangents))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_vmap(op):
    """Over students, teachers and masks at once, and per-sample gradients."""
    calls = [of(op)[0].make(seed) for seed in range(3)]
    function = getattr(functional, op)
    lead = calls[0].leaves[0].shape
    mask_shape = (lead[0], lead[2]) if op.startswith("attention") else lead[:-1]  # [batch, tokens]
    masks = torch.rand(3, *mask_shape) < 0.7
    students = [torch.stack(detached(xs)) for xs in zip(*(call.leaves for call in calls), strict=True)]
    teachers = [torch.stack(xs) for xs in zip(*(call.teachers for call in calls), strict=True)]

    def one(student, teacher, mask):
        named = dict(zip(calls[0].student, student, strict=True)) | dict(zip(calls[0].teacher, teacher, strict=True))
        return function(**named, **{**calls[0].other, "mask": mask})

    expected = torch.stack([one(call.leaves, call.teachers, mask) for call, mask in zip(calls, masks, strict=True)])
    torch.testing.assert_close(torch.func.vmap(one)(students, teachers, masks), expected.detach())
    per_sample = torch.func.vmap(torch.func.grad(one))(students, teachers, masks)
    for index, call in enumerate(calls):
        for got, true in zip(
            per_sample, torch.autograd.grad(expected[index], call.leaves, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(got[index], true)


def test_transforms_inside_a_compiled_function():
    call = of("kd_loss")[0].make()
    function = of_leaves(call, functional.kd_loss)
    compiled = torch.compile(lambda x: torch.func.grad(function)(x), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(*call.leaves), call.leaves)
    torch.testing.assert_close(compiled(call.leaves[0].detach()), expected[0])


@pytest.mark.parametrize("op", OPS)
def test_functional_call(op):
    """No transform, only other parameters: the kernels stay in use."""
    call = of(op)[0].make()

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in call.student.items():
                self.register_parameter(name, torch.nn.Parameter(torch.zeros_like(value)))

        def forward(self):
            return getattr(functional, op)(**dict(self.named_parameters()), **call.teacher, **call.other)

    with Recorder() as recorder:
        loss = torch.func.functional_call(Holder(), call.student, ())
    assert [function.name() for function, *_ in recorder.calls] == [f"kdkernels::{op}"]
    assert torch.equal(loss, getattr(functional, op)(**call.arguments))


def test_explain_names_what_the_reference_serves():
    assert all(any("torch.func" in device for device in devices) for devices in explain().values())


@pytest.mark.skipif(not explain()["encoder"]["cuda"].startswith("CUDA C++"), reason="the CUDA library was not built")
@pytest.mark.parametrize(("capability", "told"), [((7, 5), True), ((8, 0), False)])
def test_explain_says_what_turing_lacks(monkeypatch, capability, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert ("in float16 alone" in explain()["quant_linear"]["cuda"]) == told


# Modules and threads


@pytest.mark.parametrize("op", OPS)
def test_modules_are_copied_and_pickled(op):
    call = of(op)[0].make()
    options = {name: value for name, value in call.other.items() if not torch.is_tensor(value)}
    tensors = {name: value for name, value in call.arguments.items() if name not in options}
    module = getattr(nn, "".join(part.title() for part in op.split("_")))(**options)
    expected = getattr(functional, op)(**call.arguments)
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.options == module.options
        assert torch.equal(twin(**tensors), expected)


@pytest.mark.parametrize("op", OPS)
def test_calls_from_several_threads(op):
    """As the replicas of a server make them: no state is shared."""
    calls = [of(op)[0].make(seed) for seed in range(8)]
    function = getattr(functional, op)
    expected = [evaluate(function, call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda call: evaluate(function, call), calls))
    assert all(equal(a, b) for a, b in zip(got, expected, strict=True))
