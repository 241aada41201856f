"""Calls that launch every Triton kernel as the package's launchers do, and what each launch compiles to, without a GPU.

A driver that names the target and a launch that stops after compiling are enough: kernels get the specialisations of a
real call. test_triton_compile.py and benches/gpu_resources.py read this list.
"""

from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kdkernels.ops._common import HEAD_REDUCTION, KIND, NORMALIZE, ON, REDUCTION, TAIL, VARIANCE
from kdkernels.triton import (
    attention_kl,
    attention_map_kl,
    attention_map_mse,
    attention_mse,
    hidden_cosine,
    hidden_mse,
    linear_kd_loss,
    moment_mse,
    relation_kl,
    topk_kd_loss,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MASK = torch.ones(2, 256, dtype=torch.bool)
UPSTREAM = torch.ones(())


class Target:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


def compiled(capability, call, *args) -> dict[str, list]:
    """{kernel's name: [what each of its launches compiled to]} of one call, for a compute capability such as 90."""
    run, found = JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **kwargs):
        found.setdefault(self.fn.__name__, []).append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with mock.patch.object(JITFunction, "run", compile_only), mock.patch.object(driver, "_active", Target(capability)):
        call(*args)
    return found


def mask_for(call, option):
    """A mask for the first option of a family and None for the others: the kernels differ, and each is compiled."""
    return MASK if option == OPTIONS[call][0] else None


def heads(dtype, d_s, d_t):
    return [torch.empty(2, 3, 256, d, dtype=dtype) for d in (d_s, d_s, d_t, d_t)]


def packed(tensors):
    """[B, H, N, d] as sequences one behind the other, [tokens, H, d], and their bounds."""
    return [x.transpose(1, 2).flatten(0, 1) for x in tensors], torch.tensor([0, 200, 500], dtype=torch.int32)


def attention_kl_options(option, inputs):
    """(reduction, the other options) of one row of OPTIONS."""
    q_s, _, q_t, _ = inputs
    bias = torch.empty(2, 1, 256, 256, dtype=q_s.dtype).expand(2, 3, 256, 256)
    lse = torch.empty(q_s.shape[:3])
    return {
        "batchmean": {},
        "none": {"reduction": "none", "grad": torch.ones(2, 3, 256)},
        "reverse_causal": {"kind": "reverse_kl", "causal": True},
        "bias": {"bias_s": bias, "bias_t": bias},
        "lse": {"lse_s": lse, "lse_t": lse},
        "head_sum": {"head_reduction": "sum"},
        "head_map": {"head_map": [2, 2, 0]},
        "grouped": {"inputs": [x[:, :1] if i % 2 else x for i, x in enumerate(inputs)]},
        "packed": {"packed": True},
        "full": {"mask": None},
    }[option]


def run_attention_kl(dtype, option):
    inputs = heads(dtype, 32, 64)
    given = attention_kl_options(option, inputs)
    inputs, mask, bounds = given.get("inputs", inputs), given.get("mask", MASK), None
    if given.get("packed"):
        (inputs, bounds), mask = packed(inputs), None
    tensors = *inputs, mask, bounds, *(given.get(name) for name in ("bias_s", "bias_t", "lse_s", "lse_t"))
    scalars = (
        *(256, 1.0, 0.1, 0.1, KIND[given.get("kind", "kl")], HEAD_REDUCTION[given.get("head_reduction")]),
        *(given.get("head_map", []), given.get("causal", False), REDUCTION[given.get("reduction", "batchmean")]),
    )
    _, *saved = attention_kl.attention_kl(*tensors, *scalars, True)
    attention_kl.attention_kl_backward(given.get("grad", UPSTREAM), *tensors, *saved, *scalars)


def run_attention_mse(dtype, option):
    inputs, mask, bounds, on = heads(dtype, 26, 64), MASK, None, option.split("_")[-1]
    if on != option:
        mask = None
    if option.startswith("packed"):
        inputs, bounds = packed(inputs)
    scalars = 256, ON[on], 0.1, 0.1
    _, *saved = attention_mse.attention_mse(*inputs, mask, bounds, *scalars, True)
    attention_mse.attention_mse_backward(UPSTREAM, *inputs, mask, bounds, *saved, *scalars)


def run_relation_kl(dtype, num_heads):
    inputs, bounds = [torch.empty(2, 256, w, dtype=dtype) for w in (384, 768)], None
    mask = mask_for(run_relation_kl, num_heads)
    if num_heads == "packed":
        inputs, num_heads = [x.flatten(0, 1) for x in inputs], 12
        bounds = torch.tensor([0, 200, 500])
    scalars = 256, num_heads, REDUCTION["batchmean"]
    _, *saved = relation_kl.relation_kl(*inputs, mask, bounds, *scalars, True)
    relation_kl.relation_kl_backward(UPSTREAM, *inputs, mask, bounds, *saved, *scalars)


def maps(dtype):
    return [torch.empty(2, heads, 256, 256, dtype=dtype) for heads in (3, 3)]


def run_attention_map_mse(dtype, head_reduction):
    inputs = *maps(dtype), mask_for(run_attention_map_mse, head_reduction)
    attention_map_mse.attention_map_mse(*inputs, HEAD_REDUCTION[head_reduction])
    attention_map_mse.attention_map_mse_backward(UPSTREAM, *inputs, HEAD_REDUCTION[head_reduction])


def run_attention_map_kl(dtype, reduction):
    mask = mask_for(run_attention_map_kl, reduction)
    inputs, grad = (*maps(dtype), mask), UPSTREAM if reduction != "none" else torch.ones(2, 3, 256)
    scalars = 2.0, HEAD_REDUCTION[None], REDUCTION[reduction]
    _, stats = attention_map_kl.attention_map_kl(*inputs, *scalars)
    attention_map_kl.attention_map_kl_backward(grad, *inputs, stats, *scalars)


def run_hidden_mse(dtype, normalize):
    student, teacher = ([torch.empty(2, 256, 768, dtype=dtype) for _ in range(3)] for _ in range(2))
    arguments = student, teacher, mask_for(run_hidden_mse, normalize), [], []
    _, saved = hidden_mse.hidden_mse(*arguments, NORMALIZE[normalize], True)
    hidden_mse.hidden_mse_backward(UPSTREAM, *arguments, saved, NORMALIZE[normalize])


def run_hidden_mse_projected(dtype, normalize):
    student, teacher = torch.empty(2, 256, 384, dtype=dtype), torch.empty(2, 256, 768, dtype=dtype)
    weight, bias = torch.empty(768, 384, dtype=dtype), torch.empty(768, dtype=dtype)
    hidden_mse.hidden_mse([student], [teacher], MASK, [weight], [bias], NORMALIZE[normalize], True)


def run_topk_kd_loss(dtype, tail):
    student, values = torch.empty(2, 256, 30522, dtype=dtype), torch.empty(2, 256, 64, dtype=dtype)
    labels = torch.empty(2, 256, dtype=torch.int64) if tail == "bucket" else None
    mask = mask_for(run_topk_kd_loss, tail)
    inputs = student, values, torch.arange(64).repeat(2, 256, 1), mask, labels, torch.ones(2, 256)
    scalars = TAIL[tail], KIND["kl"], 1.0, True, 0.5, 0.5, -100, REDUCTION["batchmean"]
    _, *saved = topk_kd_loss.topk_kd_loss(*inputs, *scalars)
    topk_kd_loss.topk_kd_loss_backward(UPSTREAM, *inputs, *saved, *scalars)


def run_linear_kd_loss(dtype, kind):
    hidden, weight, bias = (torch.empty(shape, dtype=dtype).fill_(1) for shape in ((2, 256, 16), (30522, 16), (30522,)))
    labels = torch.empty(2, 256, dtype=torch.int64) if kind == "ce" else None
    mask = mask_for(run_linear_kd_loss, kind)
    inputs = hidden, weight, bias, hidden, weight, bias, mask, labels, torch.ones(2, 256)
    scalars = KIND[kind], 1.0, True, 0.5, 0.5, -100, REDUCTION["batchmean"]
    _, *saved = linear_kd_loss.linear_kd_loss(*inputs, *scalars, True)
    linear_kd_loss.linear_kd_loss_backward(UPSTREAM, *inputs, *saved, *scalars)


def run_hidden_cosine(dtype, layers):
    student, teacher = ([torch.empty(2, 256, 768, dtype=dtype) for _ in range(layers)] for _ in range(2))
    mask = mask_for(run_hidden_cosine, layers)
    hidden_cosine.hidden_cosine(student, teacher, mask, False)
    hidden_cosine.hidden_cosine_backward(UPSTREAM, student, teacher, mask)


def run_moment_mse(dtype, variance):
    student, teacher = ([torch.empty(2, 256, 512, dtype=dtype) for _ in range(3)] for _ in range(2))
    mask = mask_for(run_moment_mse, variance)
    _, stats = moment_mse.moment_mse(student, teacher, mask, 5000.0, 5.0, VARIANCE[variance], True)
    moment_mse.moment_mse_backward(UPSTREAM, student, mask, stats)


OPTIONS = {
    run_attention_kl: (
        *("batchmean", "none", "reverse_causal", "bias", "lse", "head_sum", "head_map", "grouped", "packed", "full"),
    ),
    run_attention_mse: (*ON, "full_scores", "packed_scores", "full_probs", "packed_probs"),
    run_relation_kl: (12, 1, "packed"),
    run_attention_map_mse: (None, "mean"),
    run_attention_map_kl: ("batchmean", "none"),
    run_hidden_mse: tuple(NORMALIZE),
    run_hidden_mse_projected: (None,),
    run_topk_kd_loss: tuple(TAIL),
    run_linear_kd_loss: tuple(KIND),
    run_hidden_cosine: (1, 3),
    run_moment_mse: tuple(VARIANCE),
}
# float16 differs from bfloat16 in nothing but the type: one option of each family has it.
CALLS = [
    (call, option, dtype)
    for call, options in OPTIONS.items()
    for option in options
    for dtype in DTYPES
    if dtype != "float16" or option == options[0]
]
