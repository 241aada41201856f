"""What a case must cost at least, and what the machine can do at best: the percentage of the ceiling in every row.

The floor counts the bytes that must cross to memory (every input read once, every gradient written once) and the
operations that the algorithm needs, real tokens only. It is the larger of bytes / bandwidth and operations /
arithmetic rate; exponentials are not counted, so 100 % cannot be reached where they matter. The ceilings are
measured, on the CPU by `kdkernels._native`, on a GPU by a large copy and a large matrix product.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from python_tests.case import Call


@dataclass(frozen=True)
class Work:
    bytes: float
    operations: float


@dataclass(frozen=True)
class Ceilings:
    """Bytes and operations per second, and what was measured."""

    bandwidth: float
    arithmetic: float
    described: str

    def floor(self, work: Work) -> tuple[float, str]:
        """Seconds that the work must take, and what bounds it."""
        memory, compute = work.bytes / self.bandwidth, work.operations / self.arithmetic
        return (memory, "bandwidth") if memory >= compute else (compute, "arithmetic")


def measure(device: str, dtype: torch.dtype, threads: int) -> Ceilings:
    if device == "cuda":
        return measure_products(device, dtype)
    from kdkernels import _native

    copy, arithmetic = _native.measure("copy", threads=threads), _native.measure("fp32", threads=threads)
    return Ceilings(
        copy * 1e9, arithmetic * 1e9, f"copy {copy:.1f} GB/s, fp32 {arithmetic:.0f} GFLOPS, {threads} threads"
    )


def measure_products(device: str, dtype: torch.dtype, small: bool = False) -> Ceilings:
    """A GPU's: torch's copy, and its product of square matrices, of int8 with int32 sums. `small` for a dry run."""
    source = torch.ones(1 << (20 if small else 30), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / _seconds(lambda: target.copy_(source), device)
    size = 64 if small else 8192
    a, b = (_random(size, dtype, device) for _ in range(2))
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    product = 2 * size**3 / _seconds(lambda: multiply(a, b.t()), device)
    name = str(dtype).removeprefix("torch.")
    return Ceilings(copy, product, f"copy {copy * 1e-12:.2f} TB/s, {name} {product * 1e-12:.0f} TFLOPS")


def _random(size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Values as products have them: power, and so the clock, depends on the bits."""
    x = torch.randn(size, size, device=device)
    return (x * 40).clamp(-127, 127).to(dtype) if dtype == torch.int8 else x.to(dtype)


def _seconds(run: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    from triton.testing import do_bench

    return do_bench(run, return_mode="median") * 1e-3


def work(op: str, call: Call) -> Work:
    """Bytes and operations of one forward and backward."""
    return _WORK[op](call)


def _traffic(call: Call) -> int:
    """Read the student and the teacher, write the gradient."""
    size = sum(x.numel() * x.element_size() for x in call.leaves)
    return 2 * size + sum(x.numel() * x.element_size() for x in call.teachers)


def _lengths(call: Call, batch: int, tokens: int) -> torch.Tensor:
    mask = call.other.get("mask")
    return torch.full((batch,), tokens) if mask is None else mask.sum(-1).cpu()


def _kd_loss(call: Call) -> Work:
    return Work(_traffic(call), 0)


def _linear_kd_loss(call: Call) -> Work:
    """Logits of both sides, and the gradients of the student's hidden states and weight."""
    (classes, d_s), d_t = call.student["student_weight"].shape, call.teacher["teacher_weight"].shape[1]
    hidden, mask = call.student["student_hidden"], call.other.get("mask")
    rows = hidden.numel() // d_s if mask is None else mask.sum().item()
    return Work(_traffic(call), rows * classes * (6 * d_s + 2 * d_t))


def _topk_kd_loss(call: Call) -> Work:
    indices = call.other["teacher_indices"]
    return Work(_traffic(call) + indices.numel() * indices.element_size(), 0)


def _attention_maps(call: Call) -> Work:
    """Both maps once (2 d_s + 2 d_t operations an entry) and the products of the gradients of q and k (4 d_s)."""
    batch, heads, tokens, d_s = call.student["q_s"].shape
    entries = heads * _lengths(call, batch, tokens).square().sum().item()
    return Work(_traffic(call), entries * (6 * d_s + 2 * call.teacher["q_t"].shape[-1]))


def _attention_mse(call: Call) -> Work:
    if call.other.get("on", "scores") == "probs":
        return _attention_maps(call)
    batch, heads, tokens, d_s = call.student["q_s"].shape
    width = d_s + call.teacher["q_t"].shape[-1]
    rows = heads * _lengths(call, batch, tokens).sum().item()
    # Two symmetric Gram matrices of the joined heads, then each gradient as rows x width by width x d_s.
    return Work(_traffic(call), rows * (2 * width**2 + 4 * width * d_s))


def _stored_maps(call: Call) -> Work:
    """Read both maps where query and key are real, write the whole gradient."""
    student, teacher = call.student["student_scores"], call.teacher["teacher_scores"]
    batch, _, tokens, _ = student.shape
    entry = sum(x.shape[1] * x.element_size() for x in (student, teacher))
    pairs = _lengths(call, batch, tokens).square().sum().item()
    return Work(pairs * entry + student.numel() * student.element_size(), 0)


def _relation_kl(call: Call) -> Work:
    """Two symmetric maps, of which half is enough, and one product with the symmetric gradient of the map."""
    student, teacher = call.student["student"], call.teacher["teacher"]
    pairs = _lengths(call, *student.shape[:2]).square().sum().item()
    return Work(_traffic(call), pairs * (student.shape[2] + teacher.shape[2] + 2 * student.shape[2]))


def _hidden_mse(call: Call) -> Work:
    students, teachers = (x if isinstance(x, list) else [x] for x in (call.student["student"], call.teacher["teacher"]))
    real = _lengths(call, *students[0].shape[:2]).sum().item()
    batch, tokens, d_s = students[0].shape
    d_t, size_s, size_t = teachers[0].shape[2], students[0].element_size(), teachers[0].element_size()
    moved = len(students) * (real * (d_s * size_s + d_t * size_t) + batch * tokens * d_s * size_s)
    # The projection forward, and the gradients of its input and of its weight.
    return Work(moved, len(students) * real * 6 * d_s * d_t if "weight" in call.student else 0)


def _tinybert_step(call: Call) -> Work:
    """The sum over its losses."""
    s, t, other = call.student, call.teacher, call.other
    parts = [
        _attention_mse(Call({"q_s": q_s, "k_s": k_s}, {"q_t": q_t, "k_t": k_t}, other))
        for q_s, k_s, q_t, k_t in zip(s["q_s"], s["k_s"], t["q_t"], t["k_t"], strict=True)
    ]
    parts.append(_hidden_mse(Call({name: s[name] for name in ("student", "weight")}, {"teacher": t["teacher"]}, other)))
    parts.append(_kd_loss(Call({"logits": s["student_logits"]}, {"logits": t["teacher_logits"]}, {})))
    return Work(sum(part.bytes for part in parts), sum(part.operations for part in parts))


def _gram_mse(call: Call) -> Work:
    """Both Gram matrices, half of them where symmetric, and the products of their difference with both factors."""
    s0, s1 = call.student["s0"], call.student.get("s1")
    lengths = _lengths(call, *s0.shape[:2])
    width = s0.shape[2] + call.teacher["t0"].shape[2]
    if call.other.get("over", "hidden") == "token":
        pairs = lengths.square().sum().item()
        return Work(_traffic(call), pairs * (width + 2 * s0.shape[2] if s1 is None else 2 * width + 4 * s0.shape[2]))
    entries = s0.shape[2] * (s0 if s1 is None else s1).shape[2]
    return Work(_traffic(call), lengths.sum().item() * entries * (4 if s1 is None else 8))


_WORK = {
    "kd_loss": _kd_loss,
    "linear_kd_loss": _linear_kd_loss,
    "topk_kd_loss": _topk_kd_loss,
    "attention_kl": _attention_maps,
    "attention_mse": _attention_mse,
    "relation_kl": _relation_kl,
    "attention_map_mse": _stored_maps,
    "attention_map_kl": _stored_maps,
    "hidden_mse": _hidden_mse,
    "hidden_cosine": _hidden_mse,
    "moment_mse": _hidden_mse,
    "gram_mse": _gram_mse,
    "tinybert_step": _tinybert_step,
}
