"""Bad input: one clear error that names the argument, before any kernel sees a pointer.

One row per mistake: the op, what is changed in a good call, the exception, and the words that its message must hold.
"""

import pytest
import torch

from kdkernels import functional

from .case import OPS
from .cases import of
from .test_registration import recorded

GOOD = {
    "kd_loss": {"student_logits": torch.randn(4, 6, 11), "teacher_logits": torch.randn(4, 6, 11)},
    "linear_kd_loss": {
        "student_hidden": torch.randn(4, 6, 5),
        "student_weight": torch.randn(11, 5),
        "teacher_hidden": torch.randn(4, 6, 7),
        "teacher_weight": torch.randn(11, 7),
    },
    "topk_kd_loss": {
        "student_logits": torch.randn(4, 6, 11),
        "teacher_values": torch.randn(4, 6, 3).log_softmax(-1),
        "teacher_indices": torch.rand(4, 6, 11).topk(3).indices,
    },
    "attention_kl": dict(
        zip(("q_s", "k_s", "q_t", "k_t"), (torch.randn(2, 3, 5, d) for d in (4, 4, 8, 8)), strict=True)
    ),
    "attention_mse": dict(
        zip(("q_s", "k_s", "q_t", "k_t"), (torch.randn(2, 3, 5, d) for d in (4, 4, 8, 8)), strict=True)
    ),
    "attention_map_mse": {"student_scores": torch.randn(2, 3, 5, 5), "teacher_scores": torch.randn(2, 3, 5, 5)},
    "attention_map_kl": {"student_scores": torch.randn(2, 3, 5, 5), "teacher_scores": torch.randn(2, 3, 5, 5)},
    "relation_kl": {"student": torch.randn(2, 5, 12), "teacher": torch.randn(2, 5, 24), "num_heads": 3},
    "hidden_mse": {"student": torch.randn(2, 5, 12), "teacher": torch.randn(2, 5, 12)},
    "hidden_cosine": {"student": torch.randn(2, 5, 12), "teacher": torch.randn(2, 5, 12)},
    "moment_mse": {"student": torch.randn(2, 5, 12), "teacher": torch.randn(2, 5, 12)},
    "gram_mse": dict(zip(("s0", "s1", "t0", "t1"), (torch.randn(2, 5, 12) for _ in range(4)), strict=True)),
}


def grad(*shape) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def labels(value: int) -> torch.Tensor:
    return torch.full((4, 6), value)


def changed(value) -> torch.Tensor:
    return torch.ones(4, 6).index_fill_(1, torch.tensor([2]), value)


KD = {
    "vocabularies differ": ({"teacher_logits": torch.randn(4, 6, 12)}, ValueError, "teacher_logits.*vocabulary"),
    "rows differ": ({"teacher_logits": torch.randn(4, 5, 11)}, ValueError, "teacher_logits.*shape"),
    "no tensor": ({"student_logits": [1.0]}, TypeError, "student_logits.*list"),
    "integer logits": ({"student_logits": torch.ones(4, 6, 11, dtype=torch.long)}, ValueError, "student_logits.*int64"),
    "half a byte": (
        {"teacher_logits": torch.ones(4, 6, 11).to(torch.float8_e4m3fn)},
        ValueError,
        "teacher_logits.*float8",
    ),
    "complex logits": ({"teacher_logits": torch.ones(4, 6, 11) + 0j}, ValueError, "teacher_logits.*complex"),
    "no classes": (
        {"student_logits": torch.ones(4, 0), "teacher_logits": torch.ones(4, 0)},
        ValueError,
        "student_logits.*classes",
    ),
    "a number": ({"student_logits": torch.ones(()), "teacher_logits": torch.ones(())}, ValueError, "student_logits"),
    "teacher requires grad": ({"teacher_logits": grad(4, 6, 11)}, ValueError, "teacher_logits requires grad"),
    "another device": (
        {"teacher_logits": torch.ones(4, 6, 11, device="meta")},
        ValueError,
        "teacher_logits is on meta",
    ),
    "kind": ({"kind": "kld"}, ValueError, "kind.*'kl', 'ce', 'reverse_kl', 'jsd', 'tv'.*'kld'"),
    "kind of another type": ({"kind": ["kl"]}, ValueError, "kind"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction.*'batchmean'.*'avg'"),
    "beta too large": ({"kind": "jsd", "beta": 1.5}, ValueError, r"beta.*\[0.0, 1.0\].*1.5"),
    "beta NaN": ({"kind": "jsd", "beta": float("nan")}, ValueError, "beta"),
    "alpha infinite": ({"alpha": float("inf")}, ValueError, "alpha"),
    "alpha a word": ({"alpha": "half"}, TypeError, "alpha.*str"),
    "T = 0": ({"temperature": 0.0}, ValueError, "temperature.*> 0.*0"),
    "T < 0": ({"temperature": -2}, ValueError, "temperature"),
    "T NaN": ({"temperature": float("nan")}, ValueError, "temperature.*nan"),
    "T infinite": ({"temperature": float("inf")}, ValueError, "temperature"),
    "T a word": ({"temperature": "4"}, TypeError, "temperature.*str"),
    "T a truth value": ({"temperature": None}, TypeError, "temperature.*NoneType"),
    "row T of another shape": ({"temperature": torch.ones(6)}, ValueError, r"temperature.*\[4, 6\].*\[6\]"),
    "row T with a zero": ({"temperature": changed(0.0)}, ValueError, "temperature"),
    "row T with a NaN": ({"temperature": changed(torch.nan)}, ValueError, "temperature"),
    "row T requires grad": ({"temperature": grad(4, 6).abs()}, ValueError, "temperature requires grad"),
    "mask of another shape": ({"mask": torch.ones(4, 5)}, ValueError, r"mask.*\[4, 6\].*\[4, 5\]"),
    "mask with classes": ({"mask": torch.ones(4, 6, 11)}, ValueError, "mask"),
    "additive mask": ({"mask": changed(-1e4)}, ValueError, "mask.*0.*1"),
    "mask a list": ({"mask": [[1] * 6] * 4}, TypeError, "mask.*list"),
    "mask elsewhere": ({"mask": torch.ones(4, 6, device="meta")}, ValueError, "mask is on meta"),
    "labels of another shape": ({"labels": torch.ones(4, dtype=torch.long)}, ValueError, r"labels.*\[4, 6\].*\[4\]"),
    "label too large": ({"labels": labels(11)}, ValueError, r"labels.*\[0, 11\).*11"),
    "label negative": ({"labels": labels(-1)}, ValueError, "labels.*-100.*-1"),
    "float labels": ({"labels": torch.ones(4, 6)}, ValueError, "labels.*float32"),
    "labels a list": ({"labels": [1]}, TypeError, "labels.*list"),
}
ATTENTION = {
    "three dimensions": ({"q_s": torch.randn(3, 5, 4)}, ValueError, "q_s.*4 dimensions"),
    "q and k differ": ({"k_s": torch.randn(2, 3, 6, 4)}, ValueError, "k_s.*q_s"),
    "teacher's q and k differ": ({"k_t": torch.randn(2, 3, 5, 4)}, ValueError, "k_t.*q_t"),
    "head counts differ": ({"q_t": torch.randn(2, 4, 5, 8), "k_t": torch.randn(2, 4, 5, 8)}, ValueError, "heads"),
    "tokens differ": ({"q_t": torch.randn(2, 3, 6, 8), "k_t": torch.randn(2, 3, 6, 8)}, ValueError, "q_t.*tokens"),
    "batch differs": ({"q_t": torch.randn(1, 3, 5, 8), "k_t": torch.randn(1, 3, 5, 8)}, ValueError, "q_t.*batch"),
    "no features": ({"q_s": torch.ones(2, 3, 5, 0), "k_s": torch.ones(2, 3, 5, 0)}, ValueError, "q_s.*head size"),
    "integer": ({"k_t": torch.ones(2, 3, 5, 8, dtype=torch.int32)}, ValueError, "k_t.*int32"),
    "no tensor": ({"q_t": None}, TypeError, "q_t.*NoneType"),
    "teacher's q requires grad": ({"q_t": grad(2, 3, 5, 8)}, ValueError, "q_t requires grad"),
    "teacher's k requires grad": ({"k_t": grad(2, 3, 5, 8)}, ValueError, "k_t requires grad"),
    "another device": ({"k_t": torch.ones(2, 3, 5, 8, device="meta")}, ValueError, "k_t is on meta"),
    "mask of another shape": ({"mask": torch.ones(2, 3)}, ValueError, r"mask.*\[2, 5\].*\[2, 3\]"),
    "four-dimensional mask": ({"mask": torch.ones(2, 1, 1, 5)}, ValueError, "mask"),
    "scale NaN": ({"scale_s": float("nan")}, ValueError, "scale_s"),
    "scale a word": ({"scale_t": "x"}, TypeError, "scale_t.*str"),
}
MAPS = {
    "three dimensions": ({"student_scores": torch.randn(3, 5, 5)}, ValueError, "student_scores.*4 dimensions"),
    "rectangular": ({"teacher_scores": torch.randn(2, 3, 5, 6)}, ValueError, r"teacher_scores.*square.*\[2, 3, 5, 6\]"),
    "head counts differ": ({"teacher_scores": torch.randn(2, 4, 5, 5)}, ValueError, "heads.*head_reduction.*2, 4, 5"),
    "tokens differ": ({"teacher_scores": torch.randn(2, 3, 6, 6)}, ValueError, "teacher_scores.*tokens"),
    "batch differs": ({"teacher_scores": torch.randn(1, 3, 5, 5)}, ValueError, "teacher_scores.*batch"),
    "no heads": (
        {"student_scores": torch.ones(2, 0, 5, 5), "head_reduction": "sum"},
        ValueError,
        "student_scores.*at least one head",
    ),
    "integer": ({"student_scores": torch.ones(2, 3, 5, 5, dtype=torch.int32)}, ValueError, "student_scores.*int32"),
    "no tensor": ({"teacher_scores": None}, TypeError, "teacher_scores.*NoneType"),
    "teacher requires grad": ({"teacher_scores": grad(2, 3, 5, 5)}, ValueError, "teacher_scores requires grad"),
    "another device": ({"teacher_scores": torch.ones(2, 3, 5, 5, device="meta")}, ValueError, "teacher_scores is on"),
    "mask of another shape": ({"mask": torch.ones(2, 3)}, ValueError, r"mask.*\[2, 5\].*\[2, 3\]"),
    "mask over entries": ({"mask": torch.ones(2, 1, 5, 5)}, ValueError, "mask"),
    "head reduction": ({"head_reduction": "max"}, ValueError, "head_reduction.*None, 'sum', 'mean'.*'max'"),
}
LAYERS = {
    "widths differ": ({"teacher": torch.randn(2, 5, 24)}, ValueError, "teacher.*width"),
    "tokens differ": ({"teacher": torch.randn(2, 6, 12)}, ValueError, "tokens"),
    "layers differ": ({"student": [torch.randn(2, 5, 12)] * 2}, ValueError, "layers.*2 and 1"),
    "no layers": ({"student": [], "teacher": []}, ValueError, "student.*at least one layer"),
    "two dimensions": ({"student": torch.randn(5, 12)}, ValueError, "student.*3 dimensions"),
    "no features": (
        {"student": torch.ones(2, 5, 0), "teacher": torch.ones(2, 5, 0)},
        ValueError,
        "at least one feature",
    ),
    "no tensor": ({"student": "hidden"}, TypeError, "student.*str"),
    "integer": ({"student": torch.ones(2, 5, 12, dtype=torch.long)}, ValueError, "student.*int64"),
    "teacher requires grad": ({"teacher": grad(2, 5, 12)}, ValueError, "teacher requires grad"),
    "another device": ({"teacher": torch.ones(2, 5, 12, device="meta")}, ValueError, "teacher is on meta"),
    "mask of another shape": ({"mask": torch.ones(2, 4)}, ValueError, "mask"),
}
# What the losses on logits share.
LOGITS = {name: row for name, row in KD.items() if not {"student_logits", "teacher_logits"} & set(row[0])}
LINEAR = {
    "rows differ": ({"teacher_hidden": torch.randn(4, 5, 7)}, ValueError, r"teacher_hidden.*\[4, 6\].*\[4, 5, 7\]"),
    "no features": ({"student_hidden": torch.ones(4, 6, 0)}, ValueError, "student_hidden.*features"),
    "no tensor": ({"teacher_weight": None}, TypeError, "teacher_weight.*NoneType"),
    "integer hidden": ({"student_hidden": torch.ones(4, 6, 5, dtype=torch.int8)}, ValueError, "student_hidden.*int8"),
    "weight transposed": ({"student_weight": torch.ones(5, 11)}, ValueError, r"student_weight.*\[V, 5\].*\[5, 11\]"),
    "weight with one dimension": ({"teacher_weight": torch.ones(11)}, ValueError, r"teacher_weight.*\[V, 7\]"),
    "no classes": ({"student_weight": torch.ones(0, 5)}, ValueError, "student_weight"),
    "vocabularies differ": ({"teacher_weight": torch.ones(12, 7)}, ValueError, "teacher_weight.*vocabulary.*11.*12"),
    "bias too short": ({"student_bias": torch.ones(10)}, ValueError, r"student_bias.*\[11\].*\[10\]"),
    "bias an integer": ({"teacher_bias": torch.ones(11).long()}, ValueError, "teacher_bias.*int64"),
    "teacher requires grad": ({"teacher_hidden": grad(4, 6, 7)}, ValueError, "teacher_hidden requires grad"),
    "teacher's weight requires grad": ({"teacher_weight": grad(11, 7)}, ValueError, "teacher_weight requires grad"),
    "teacher's bias requires grad": ({"teacher_bias": grad(11)}, ValueError, "teacher_bias requires grad"),
    "weight elsewhere": ({"student_weight": torch.ones(11, 5, device="meta")}, ValueError, "student_weight is on meta"),
}
TOPK = {
    "rows differ": ({"teacher_values": torch.randn(4, 5, 3)}, ValueError, "teacher_values.*student_logits"),
    "no values": ({"teacher_values": torch.randn(4, 6, 0)}, ValueError, "teacher_values.*1 <= K <= 11"),
    "more values than classes": ({"teacher_values": torch.randn(4, 6, 12)}, ValueError, "teacher_values.*K <= 11"),
    "no classes": ({"student_logits": torch.ones(4, 6, 0)}, ValueError, "student_logits.*classes"),
    "teacher requires grad": ({"teacher_values": grad(4, 6, 3)}, ValueError, "teacher_values requires grad"),
    "indices of another shape": (
        {"teacher_indices": torch.ones(4, 6, 2).long()},
        ValueError,
        "teacher_indices.*values",
    ),
    "float indices": ({"teacher_indices": torch.ones(4, 6, 3)}, ValueError, "teacher_indices.*float32"),
    "small indices": ({"teacher_indices": torch.ones(4, 6, 3).short()}, ValueError, "teacher_indices.*int16"),
    "indices a list": ({"teacher_indices": [1]}, TypeError, "teacher_indices.*list"),
    "index too large": ({"teacher_indices": torch.full((4, 6, 3), 11)}, ValueError, r"teacher_indices.*\[0, 11\).*11"),
    "index negative": ({"teacher_indices": torch.full((4, 6, 3), -1)}, ValueError, "teacher_indices.*-1"),
    "tail": ({"tail": "drop"}, ValueError, "tail.*'renormalize', 'bucket'.*'drop'"),
    "reverse_kl without tail": ({"kind": "reverse_kl"}, ValueError, 'reverse_kl.*tail="bucket"'),
    "logits as log-probabilities": (
        {"tail": "bucket", "teacher_values": torch.ones(4, 6, 3)},
        ValueError,
        "teacher_values.*log-probabilities.*8.155",
    ),
}
BOUNDS = {
    "q without batch": ({"q_s": torch.randn(3, 5, 4), "k_s": torch.randn(3, 5, 4)}, ValueError, "q_s.*4 dimensions"),
    "packed with a batch": ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "q_s.*3 dimensions.*cu_seqlens"),
    "max_seqlen alone": ({"max_seqlen": 5}, ValueError, "max_seqlen needs cu_seqlens"),
}


def packed(width: int, **change) -> dict:
    """Ten tokens of three heads, and one thing wrong with the bounds of their sequences."""
    tensors = dict(zip(("q_s", "k_s", "q_t", "k_t"), (torch.randn(10, 3, width) for _ in range(4)), strict=True))
    return {**tensors, "cu_seqlens": torch.tensor([0, 4, 10]), **change}


PACKED = {
    "mask beside bounds": (packed(4, mask=torch.ones(10)), ValueError, "mask must be None.*cu_seqlens"),
    "bounds a list": (packed(4, cu_seqlens=[0, 10]), TypeError, "cu_seqlens.*list"),
    "bounds of floats": (packed(4, cu_seqlens=torch.tensor([0.0, 10.0])), ValueError, "cu_seqlens.*float32"),
    "bounds of two dimensions": (packed(4, cu_seqlens=torch.zeros(1, 2).int()), ValueError, "cu_seqlens.*shape"),
    "no bounds": (packed(4, cu_seqlens=torch.zeros(0).int()), ValueError, r"cu_seqlens.*\[0\]"),
    "bounds fall": (packed(4, cu_seqlens=torch.tensor([0, 7, 4])), ValueError, r"cu_seqlens.*never fall.*\[0, 7, 4\]"),
    "bounds start late": (packed(4, cu_seqlens=torch.tensor([1, 10])), ValueError, "cu_seqlens.*start at 0"),
    "bounds too far": (packed(4, cu_seqlens=torch.tensor([0, 11])), ValueError, "cu_seqlens.*10 tokens.*11"),
    "bounds elsewhere": (
        packed(4, cu_seqlens=torch.zeros(2, device="meta").int()),
        ValueError,
        "cu_seqlens is on meta",
    ),
    "max_seqlen too small": (packed(4, max_seqlen=5), ValueError, "max_seqlen.*6.*5"),
    "max_seqlen a float": (packed(4, max_seqlen=6.0), ValueError, "max_seqlen.*6.0"),
    "packed tokens differ": (packed(4, q_t=torch.randn(9, 3, 4), k_t=torch.randn(9, 3, 4)), ValueError, "q_t.*tokens"),
}
OPTIONS = {
    "kind": ({"kind": "jsd"}, ValueError, "kind.*'kl', 'reverse_kl'.*'jsd'"),
    "head_reduction": ({"head_reduction": "max"}, ValueError, "head_reduction.*None, 'sum', 'mean'.*'max'"),
    "reduced and mapped": ({"head_reduction": "sum", "head_map": [0, 1, 2]}, ValueError, "head_reduction.*head_map"),
    "reduced with lse": ({"head_reduction": "sum", "lse_s": torch.zeros(2, 3, 5)}, ValueError, "head_reduction.*lse_s"),
    "head_map a tensor": ({"head_map": torch.tensor([0, 1, 2])}, TypeError, "head_map must be a list"),
    "head_map too short": ({"head_map": [0, 1]}, ValueError, "head_map.*student's 3.*got 2"),
    "head_map beyond": ({"head_map": [0, 1, 3]}, ValueError, r"head_map.*\[0, 3\).*3"),
    "causal a number": ({"causal": 1}, TypeError, "causal.*int"),
    "key heads do not divide": ({"k_s": torch.randn(2, 2, 5, 4)}, ValueError, "k_s.*divides"),
    "no key heads": ({"k_s": torch.randn(2, 0, 5, 4)}, ValueError, "k_s.*at least one head"),
    "bias of another shape": ({"bias_s": torch.zeros(2, 5, 5)}, ValueError, r"bias_s.*\[2, 3, 5, 5\].*\[2, 5, 5\]"),
    "bias of five dimensions": ({"bias_t": torch.zeros(1, 1, 1, 5, 5)}, ValueError, "bias_t.*broadcastable"),
    "bias requires grad": ({"bias_t": grad(5, 5)}, ValueError, "bias_t requires grad"),
    "bias of integers": ({"bias_s": torch.zeros(5, 5).int()}, ValueError, "bias_s.*int32"),
    "bias elsewhere": ({"bias_s": torch.zeros(5, 5, device="meta")}, ValueError, "bias_s is on meta"),
    "lse of another shape": ({"lse_s": torch.zeros(2, 3)}, ValueError, r"lse_s.*\[2, 3, 5\].*\[2, 3\]"),
    "lse in 16 bits": ({"lse_t": torch.zeros(2, 3, 5).half()}, ValueError, "lse_t.*float32.*float16"),
    "lse a number": ({"lse_t": 1.0}, TypeError, "lse_t.*float"),
}
MISTAKES = {
    "kd_loss": KD,
    "linear_kd_loss": LOGITS | LINEAR,
    "topk_kd_loss": LOGITS | TOPK,
    "attention_kl": ATTENTION
    | BOUNDS
    | PACKED
    | OPTIONS
    | {
        "T = 0": ({"temperature": 0}, ValueError, "temperature.*> 0"),
        "T NaN": ({"temperature": float("nan")}, ValueError, "temperature"),
        "reduction": ({"reduction": "mean"}, ValueError, "reduction.*'batchmean', 'sum', 'none'.*'mean'"),
    },
    "attention_mse": ATTENTION
    | BOUNDS
    | PACKED
    | {"on": ({"on": "logits"}, ValueError, "on must be one of 'scores', 'probs'.*'logits'")},
    "attention_map_mse": MAPS,
    "attention_map_kl": MAPS
    | {
        "T = 0": ({"temperature": 0}, ValueError, "temperature.*> 0"),
        "reduction": ({"reduction": "mean"}, ValueError, "reduction.*'batchmean', 'sum', 'none'.*'mean'"),
    },
    "relation_kl": {
        "two dimensions": ({"student": torch.randn(5, 12)}, ValueError, "student.*3 dimensions"),
        "batch differs": ({"teacher": torch.randn(1, 5, 24)}, ValueError, "batch"),
        "tokens differ": ({"teacher": torch.randn(2, 6, 24)}, ValueError, "tokens"),
        "heads do not divide": ({"num_heads": 5}, ValueError, "num_heads.*5.*12"),
        "heads do not divide the teacher": ({"teacher": torch.randn(2, 5, 20)}, ValueError, "num_heads.*teacher.*20"),
        "no heads": ({"num_heads": 0}, ValueError, "num_heads.*0"),
        "heads a float": ({"num_heads": 3.0}, ValueError, "num_heads.*3.0"),
        "heads a truth value": ({"num_heads": True}, ValueError, "num_heads"),
        "no features": ({"student": torch.ones(2, 5, 0)}, ValueError, "num_heads.*student"),
        "teacher requires grad": ({"teacher": grad(2, 5, 24)}, ValueError, "teacher requires grad"),
        "another device": ({"teacher": torch.ones(2, 5, 24, device="meta")}, ValueError, "teacher is on meta"),
        "mask of another shape": ({"mask": torch.ones(5, 2)}, ValueError, "mask"),
        "reduction": ({"reduction": "mean"}, ValueError, "reduction"),
        "integer": ({"teacher": torch.ones(2, 5, 24, dtype=torch.int8)}, ValueError, "teacher.*int8"),
        "packed with a batch": ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "student.*2 dimensions"),
        "max_seqlen alone": ({"max_seqlen": 5}, ValueError, "max_seqlen needs cu_seqlens"),
    },
    "hidden_cosine": LAYERS,
    "moment_mse": LAYERS
    | {
        "weight NaN": ({"mean_weight": float("nan")}, ValueError, "mean_weight.*nan"),
        "weight a word": ({"variance_weight": "x"}, TypeError, "variance_weight.*str"),
        "variance": ({"variance": "abs"}, ValueError, "variance must be one of 'absolute', 'squared'.*'abs'"),
    },
    "gram_mse": {
        "over": ({"over": "batch"}, ValueError, "over must be one of 'hidden', 'token'.*'batch'"),
        "two dimensions": ({"s1": torch.randn(5, 12)}, ValueError, "s1.*3 dimensions"),
        "batch differs": ({"t1": torch.randn(1, 5, 12)}, ValueError, "t1.*batch"),
        "tokens differ": ({"s1": torch.randn(2, 6, 12)}, ValueError, "s1.*tokens"),
        "teacher wider over hidden": ({"t1": torch.randn(2, 5, 24)}, ValueError, "t1.*width of s1"),
        "factors differ over token": ({"s1": torch.randn(2, 5, 24), "over": "token"}, ValueError, "s1.*width of s0"),
        "teacher wider, one layer": (
            {"t0": torch.randn(2, 5, 24), "s1": None, "t1": None},
            ValueError,
            "t0.*width of s0",
        ),
        "no features": ({"s0": torch.ones(2, 5, 0)}, ValueError, "s0.*at least one feature"),
        "no tensor": ({"s0": None}, TypeError, "s0.*NoneType"),
        "integer": ({"t0": torch.ones(2, 5, 12, dtype=torch.int32)}, ValueError, "t0.*int32"),
        "teacher requires grad": ({"t1": grad(2, 5, 12)}, ValueError, "t1 requires grad"),
        "another device": ({"t0": torch.ones(2, 5, 12, device="meta")}, ValueError, "t0 is on meta"),
        "mask of another shape": ({"mask": torch.ones(2, 4)}, ValueError, "mask"),
    },
    "hidden_mse": LAYERS
    | {
        "widths differ": ({"teacher": torch.randn(2, 5, 24)}, ValueError, "teacher.*weight"),
        "weight transposed": (
            {"teacher": torch.ones(2, 5, 24), "weight": torch.ones(12, 24)},
            ValueError,
            r"weight.*\[24, 12\]",
        ),
        "weight with one dimension": ({"weight": torch.ones(12)}, ValueError, "weight.*2 dimensions"),
        "too many weights": ({"weight": [torch.ones(12, 12)] * 3}, ValueError, "weight.*3"),
        "bias alone": ({"bias": torch.ones(12)}, ValueError, "bias needs weight"),
        "bias too short": ({"weight": torch.ones(12, 12), "bias": torch.ones(11)}, ValueError, r"bias.*\[12\].*11"),
        "normalize": ({"normalize": "l1"}, ValueError, "normalize.*'l2', 'layer_norm'.*'l1'"),
    },
}
ROWS = [pytest.param(op, *row, id=f"{op}: {name}") for op, rows in MISTAKES.items() for name, row in rows.items()]


@pytest.mark.parametrize(("op", "change", "kind", "words"), ROWS)
def test_bad_input(op, change, kind, words):
    good = GOOD[op]
    getattr(functional, op)(**good)
    with pytest.raises(kind, match=words) as raised:
        getattr(functional, op)(**{**good, **change})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("op", OPS)
def test_unknown_option(op):
    with pytest.raises(TypeError, match="temprature"):
        getattr(functional, op)(**GOOD[op], temprature=2.0)


@pytest.mark.parametrize("op", OPS)
def test_ops_protect_memory_when_called_directly(op):
    """Behind the public functions: a mask too small for the tensors raises in C++ and reads nothing beyond it."""
    case = next(case for case in of(op) if case.mask is not None)
    function, args, _ = recorded(case)[0]
    small = [a[:1, :1].contiguous() if torch.is_tensor(a) and a.dtype == torch.bool else a for a in args]
    with torch.no_grad(), pytest.raises(RuntimeError, match="mask"):
        function(*small)
