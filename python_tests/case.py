"""What a row of the table in `cases/` is, and how it becomes tensors.

A case says what an op is called with (shapes, options, mask, memory layout) and why it is in the table; `Case.make`
turns it into tensors from a seed. All rows of an op take the public function's argument names, so that the fused op,
the reference and the eager peer are called alike: `function(**call.arguments)`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

OPS = (
    "kd_loss",
    "linear_kd_loss",
    "topk_kd_loss",
    "attention_kl",
    "attention_mse",
    "relation_kl",
    "attention_map_mse",
    "attention_map_kl",
    "hidden_mse",
    "hidden_cosine",
    "moment_mse",
    "gram_mse",
)
FLOAT32 = (torch.float32, torch.float32)


@dataclass(frozen=True)
class Target:
    """What a bench row must reach: how many times faster than a peer, the percentage of the ceiling, and the memory
    beyond inputs and gradients."""

    eager: float | None = None
    compile: float | None = None
    float32: float | None = None
    liger: float | None = None
    share: float | None = None
    memory: Callable[["Call"], int] | None = None


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    why: str
    shape: dict
    options: dict = field(default_factory=dict)
    mask: object = None
    layout: str = "contiguous"
    spread: float = 1.0
    near: float | None = None
    dtypes: tuple = FLOAT32
    device: str = "cpu"
    target: Target | None = None

    @property
    def packed(self) -> bool:
        """Sequences of all lengths in one axis of tokens, with their bounds."""
        return "packed" in self.shape

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"

    def make(self, seed: int = 0, dtypes: tuple | None = None, device: str | None = None) -> "Call":
        """The tensors of this case; `dtypes` = (student's, teacher's). The student's tensors require grad."""
        dtypes, device = dtypes or self.dtypes, device or self.device
        generator = torch.Generator(device).manual_seed(seed)
        with torch.device(device):
            student, teacher, other = _MAKERS[self.op](generator, self)

        def place(value, dtype, layout):
            if isinstance(value, list):
                return [place(x, dtype, layout) for x in value]
            return _lay_out(value.to(dtype), layout)

        student_layout = "contiguous" if self.layout == "expanded" else self.layout
        student = {name: place(value, dtypes[0], student_layout) for name, value in student.items()}
        teacher = {name: place(value, dtypes[1], self.layout) for name, value in teacher.items()}
        for leaf in _flat(student.values()):
            leaf.requires_grad_()
        return Call(student, teacher, {**other, **self.options})


@dataclass(frozen=True)
class Call:
    """Arguments of one call by name: the student's (differentiable), the teacher's, and the rest."""

    student: dict
    teacher: dict
    other: dict

    @property
    def arguments(self) -> dict:
        return {**self.student, **self.teacher, **self.other}

    @property
    def leaves(self) -> list[torch.Tensor]:
        return _flat(self.student.values())

    @property
    def teachers(self) -> list[torch.Tensor]:
        return _flat(self.teacher.values())

    def map(self, function) -> "Call":
        """The same call with `function` applied to every student and teacher tensor; the students require grad
        again."""

        def apply(value):
            return [apply(x) for x in value] if isinstance(value, list) else function(value.detach())

        student = {name: apply(value) for name, value in self.student.items()}
        for leaf in _flat(student.values()):
            leaf.requires_grad_()
        return Call(student, {name: apply(value) for name, value in self.teacher.items()}, self.other)

    def to(self, dtype: torch.dtype) -> "Call":
        return self.map(lambda x: x.to(dtype, copy=True))

    def with_options(self, **options) -> "Call":
        return replace(self, other={**self.other, **options})


def upstream(loss: torch.Tensor) -> torch.Tensor:
    """A gradient from above that is not 1 and differs from row to row, on the loss's device and in its dtype."""
    if loss.dim() == 0:
        return torch.full_like(loss, 0.375, requires_grad=False)
    return (
        torch.linspace(0.25, 1.75, max(loss.numel(), 1), device=loss.device)[: loss.numel()]
        .to(loss.dtype)
        .view(loss.shape)
    )


def evaluate(function, call: Call) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and the gradients of the student's tensors under `upstream`."""
    loss = function(**call.arguments)
    return loss.detach(), list(torch.autograd.grad(loss, call.leaves, upstream(loss)))


def padding(op: str, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """True at the elements of an argument that belong to padding: maps [B, H, N, N], heads [B, H, N, d], else [*mask,
    D]."""
    if op.startswith("attention_map"):
        real = mask[:, None, :, None] & mask[:, None, None, :]
    else:
        real = mask[:, None, :, None] if op.startswith("attention") else mask[..., None]
    return ~real.expand(x.shape)


def _flat(values) -> list[torch.Tensor]:
    return [x for value in values for x in (value if isinstance(value, list) else [value])]


def _lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values at other addresses; what lies between them is NaN, so that a read beside a row shows."""
    if layout == "contiguous" or x.dim() < 2:
        return x.contiguous()
    if layout == "expanded":
        return x[:1].contiguous().expand(x.shape)
    if layout == "transposed":
        a, b = (0, 1) if x.dim() == 3 else (-3, -2) if x.dim() > 3 else (0, 1)
        return x.transpose(a, b).contiguous().transpose(a, b)
    padded = x.new_full((*x.shape[:-2], x.shape[-2] + 1, 2 * x.shape[-1] + 3), torch.nan)
    if layout == "sliced":
        view = padded[..., :-1, 2 : 2 + x.shape[-1]]
    elif layout == "strided":
        view = padded[..., 1:, : 2 * x.shape[-1] : 2]
    else:
        raise ValueError(f"unknown layout {layout!r}")
    return view.copy_(x)


def _mask(generator: torch.Generator, spec, shape: tuple) -> dict:
    """spec: None, "holes", "half", "left" (half, padded on the left), a tuple of lengths (one per sequence) or
    ("uniform", low, high)."""
    if spec is None:
        return {}
    if spec == "holes":
        return {"mask": torch.rand(shape, generator=generator) < 0.6}
    if spec in ("half", "left"):
        lengths = torch.linspace(1, shape[-1] - 1, shape[0]).round().long()
    elif spec[0] == "uniform":
        lengths = torch.randint(spec[1], spec[2] + 1, shape[:1], generator=generator)
    else:
        lengths = torch.tensor(spec)
    position = torch.arange(shape[-1])
    return {"mask": (position if spec != "left" else position.flip(0)) < lengths[:, None]}


def _pair(generator: torch.Generator, case: Case, student_shape: tuple, teacher_shape: tuple):
    teacher = case.spread * torch.randn(teacher_shape, generator=generator)
    noise = torch.randn(student_shape, generator=generator)
    student = case.spread * noise if case.near is None else teacher + case.near * noise
    return student, teacher


def _kd_loss(generator, case):
    lead, classes = case.shape["lead"], case.shape["classes"]
    student, teacher = _pair(generator, case, (*lead, classes), (*lead, classes))
    other = _mask(generator, case.mask, lead)
    if case.shape.get("labels"):
        labels = torch.randint(classes, lead, generator=generator)
        other["labels"] = torch.where(torch.rand(lead, generator=generator) < 0.3, -100, labels)
    if case.shape.get("row_temperature"):
        other["temperature"] = 0.5 + 4 * torch.rand(lead, generator=generator)
    return {"student_logits": student}, {"teacher_logits": teacher}, other


def _topk_kd_loss(generator, case):
    """The K largest logits of a teacher, as logits or as log-probabilities at the call's temperature; K = V keeps the
    classes' order."""
    student, teacher, other = _kd_loss(generator, case)
    teacher = teacher["teacher_logits"]
    named, classes = case.shape["named"], case.shape["classes"]
    if case.options.get("tail") == "bucket":
        temperature = torch.as_tensor(other.get("temperature", case.options.get("temperature", 1.0)))
        teacher = (teacher / temperature.unsqueeze(-1)).log_softmax(-1)
    indices = teacher.topk(named).indices if named < classes else torch.arange(classes).expand(teacher.shape).clone()
    other["teacher_indices"] = indices.to(case.shape["indices"])
    return student, {"teacher_values": teacher.gather(-1, indices)}, other


def _linear_kd_loss(generator, case):
    """Both heads scaled so that logits have the hidden states' spread; equal widths may share `near` weights."""
    lead, classes, d_s, d_t = (case.shape[key] for key in ("lead", "classes", "d_s", "d_t"))
    _, _, other = _kd_loss(generator, case)
    hidden_s, hidden_t = _pair(generator, case, (*lead, d_s), (*lead, d_t))
    weight_s, weight_t = _pair(generator, replace(case, spread=1.0), (classes, d_s), (classes, d_t))
    student = {"student_hidden": hidden_s, "student_weight": weight_s * d_s**-0.5}
    teacher = {"teacher_hidden": hidden_t, "teacher_weight": weight_t * d_t**-0.5}
    if case.shape["bias"]:
        student["student_bias"], teacher["teacher_bias"] = _pair(generator, case, (classes,), (classes,))
    return student, teacher, other


def _attention(generator, case):
    """shape: batch, heads, tokens, d_s, d_t; of the teacher's heads (heads_t) and of key heads (kv_s, kv_t) where they
    differ; bias_s and bias_t as shapes; lse; packed."""
    shape = case.shape
    batch, heads, tokens, d_s, d_t = (shape[key] for key in ("batch", "heads", "tokens", "d_s", "d_t"))
    heads_t = shape.get("heads_t", heads)
    other = _bounds(case) if case.packed else _mask(generator, case.mask, (batch, tokens))
    lead = (tokens,) if case.packed else (batch,)
    rest = () if case.packed else (tokens,)
    q_s, q_t = _pair(generator, case, (*lead, heads, *rest, d_s), (*lead, heads_t, *rest, d_t))
    kv_s, kv_t = shape.get("kv_s", heads), shape.get("kv_t", heads_t)
    k_s, k_t = _pair(generator, case, (*lead, kv_s, *rest, d_s), (*lead, kv_t, *rest, d_t))
    for name in ("bias_s", "bias_t"):
        if name in shape:
            other[name] = torch.randn(shape[name], generator=generator)
    if shape.get("lse"):
        for side, q, k in (("s", q_s, k_s), ("t", q_t, k_t)):
            other[f"lse_{side}"] = _lse(q, k, other.get("mask"), case.options)
    return {"q_s": q_s, "k_s": k_s}, {"q_t": q_t, "k_t": k_t}, other


def _bounds(case) -> dict:
    """shape["packed"]: lengths whose sum is at most shape["tokens"]; int32, as flash attention has them."""
    lengths = torch.tensor((0, *case.shape["packed"]))
    return {"cu_seqlens": lengths.cumsum(0).to(torch.int32)}


def _lse(q, k, mask, options) -> torch.Tensor:
    """What a model's own attention leaves: float32, of whole rows, garbage where they are padding."""
    scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5 / options.get("temperature", 1.0)
    if options.get("causal"):
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    return scores.logsumexp(-1).float()


def _relation(generator, case):
    batch, tokens, w_s, w_t = (case.shape[key] for key in ("batch", "tokens", "w_s", "w_t"))
    lead = (tokens,) if case.packed else (batch, tokens)
    student, teacher = _pair(generator, case, (*lead, w_s), (*lead, w_t))
    other = _bounds(case) if case.packed else _mask(generator, case.mask, lead)
    return {"student": student}, {"teacher": teacher}, other


def _attention_map(generator, case):
    batch, heads, heads_t, tokens = (case.shape[key] for key in ("batch", "heads", "heads_t", "tokens"))
    student, teacher = _pair(generator, case, (batch, heads, tokens, tokens), (batch, heads_t, tokens, tokens))
    mask = _mask(generator, case.mask, (batch, tokens))
    return {"student_scores": student}, {"teacher_scores": teacher}, mask


def _hidden(generator, case):
    batch, tokens, d_s, d_t = (case.shape[key] for key in ("batch", "tokens", "d_s", "d_t"))
    layers, weights = case.shape.get("layers"), case.shape.get("weights", 0)
    pairs = [_pair(generator, case, (batch, tokens, d_s), (batch, tokens, d_t)) for _ in range(layers or 1)]
    student = {"student": [s for s, _ in pairs] if layers else pairs[0][0]}
    if weights:
        made = [torch.randn(d_t, d_s, generator=generator) * d_s**-0.5 for _ in range(weights)]
        student["weight"] = made if weights > 1 else made[0]
        if case.shape.get("bias"):
            made = [torch.randn(d_t, generator=generator) for _ in range(weights)]
            student["bias"] = made if weights > 1 else made[0]
    return (
        student,
        {"teacher": [t for _, t in pairs] if layers else pairs[0][1]},
        _mask(generator, case.mask, (batch, tokens)),
    )


def _tinybert_step(generator, case):
    batch, tokens, layers, heads, d_s, d_t, classes = (
        case.shape[key] for key in ("batch", "tokens", "layers", "heads", "d_s", "d_t", "classes")
    )

    def pairs(count, student_shape, teacher_shape):
        made = [_pair(generator, case, student_shape, teacher_shape) for _ in range(count)]
        return [s for s, _ in made], [t for _, t in made]

    q_s, q_t = pairs(layers, (batch, heads, tokens, d_s), (batch, heads, tokens, d_t))
    k_s, k_t = pairs(layers, (batch, heads, tokens, d_s), (batch, heads, tokens, d_t))
    states = pairs(layers + 1, (batch, tokens, heads * d_s), (batch, tokens, heads * d_t))
    logits = _pair(generator, case, (batch, classes), (batch, classes))
    weight = torch.randn(heads * d_t, heads * d_s, generator=generator) * (heads * d_s) ** -0.5
    student = {"q_s": q_s, "k_s": k_s, "student": states[0], "weight": weight, "student_logits": logits[0]}
    student["bias"] = torch.randn(heads * d_t, generator=generator)
    teacher = {"q_t": q_t, "k_t": k_t, "teacher": states[1], "teacher_logits": logits[1]}
    return student, teacher, _mask(generator, case.mask, (batch, tokens))


def _gram(generator, case):
    batch, tokens, d_s, d_t = (case.shape[key] for key in ("batch", "tokens", "d_s", "d_t"))
    s0, t0 = _pair(generator, case, (batch, tokens, d_s), (batch, tokens, d_t))
    other = _mask(generator, case.mask, (batch, tokens))
    if case.shape["same"]:
        return {"s0": s0}, {"t0": t0}, {**other, "s1": None, "t1": None}
    s1, t1 = _pair(generator, case, (batch, tokens, case.shape["d_s1"]), (batch, tokens, case.shape["d_t1"]))
    return {"s0": s0, "s1": s1}, {"t0": t0, "t1": t1}, other


_MAKERS = {
    "kd_loss": _kd_loss,
    "linear_kd_loss": _linear_kd_loss,
    "topk_kd_loss": _topk_kd_loss,
    "attention_kl": _attention,
    "attention_mse": _attention,
    "relation_kl": _relation,
    "attention_map_mse": _attention_map,
    "attention_map_kl": _attention_map,
    "hidden_mse": _hidden,
    "hidden_cosine": _hidden,
    "moment_mse": _hidden,
    "gram_mse": _gram,
    "tinybert_step": _tinybert_step,
}
