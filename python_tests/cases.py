"""The one table of cases: tests check every row of `CASES`, benches time every row of `BENCHES`.

Small odd shapes on purpose: 1 token, 1 class, one more or less than a vector or a tile, head sizes 6, 8, 12, 26 and
80. The bench rows and their targets are the project's goals, stated once, here.
"""

from dataclasses import replace

import torch

from .case import OPS, Call, Case, Target

BFLOAT16 = (torch.bfloat16, torch.bfloat16)
KIB = 1024


def _case(op, name, why, shape, given) -> Case:
    """`given`: fields of Case by name; whatever else it holds are options of the op."""
    of_case = {key: given.pop(key) for key in ("mask", "layout", "spread", "near") if key in given}
    return Case(op, name, why, shape, given, **of_case)


def kd(name, why, lead=(5,), classes=129, *, labels=False, row_temperature=False, **given) -> Case:
    shape = {"lead": lead, "classes": classes, "labels": labels, "row_temperature": row_temperature}
    return _case("kd_loss", name, why, shape, given)


def attention(op, name, why, tokens=41, d_s=8, d_t=12, *, batch=2, heads=3, **given) -> Case:
    shape = {"batch": batch, "heads": heads, "tokens": tokens, "d_s": d_s, "d_t": d_t}
    return _case(op, name, why, shape, given)


def relation(name, why, tokens=41, w_s=24, w_t=36, *, batch=2, num_heads=3, **given) -> Case:
    shape = {"batch": batch, "tokens": tokens, "w_s": w_s, "w_t": w_t}
    return _case("relation_kl", name, why, shape, {"num_heads": num_heads, **given})


def hidden(name, why, tokens=41, d_s=80, d_t=None, *, batch=2, layers=None, weights=0, bias=False, **given) -> Case:
    shape = {"batch": batch, "tokens": tokens, "d_s": d_s, "d_t": d_t or d_s}
    return _case("hidden_mse", name, why, {**shape, "layers": layers, "weights": weights, "bias": bias}, given)


KD_LOSS = [
    kd("kl", "the plain loss; 129 classes is one more than a multiple of every vector width"),
    kd("kl_t4", "Hinton's usual temperature", temperature=4.0),
    kd("kl_t_half", "T < 1 widens the logits", temperature=0.5),
    kd("kl_no_t2", "T without T^2", temperature=3.0, scale_t2=False),
    kd("ce", "soft targets as TextBrewer's kd_ce_loss", kind="ce", temperature=4.0, scale_t2=False),
    kd("reverse_kl", "the gradient needs a row sum of its own", kind="reverse_kl", temperature=2.0),
    kd("jsd", "two divergences against the mixture", kind="jsd", temperature=2.0),
    kd("jsd_0.1", "an unequal mixture tells beta from 1 - beta", kind="jsd", beta=0.1),
    kd("jsd_0.9", "the other side of it", kind="jsd", beta=0.9, temperature=2.0),
    kd("jsd_0", "beta = 0: the mixture is the student and the divergence is 0", kind="jsd", beta=0.0),
    kd("jsd_1", "beta = 1: the mixture is the teacher and the divergence is 0", kind="jsd", beta=1.0),
    kd("tv", "absolute values: the gradient has jumps", kind="tv", temperature=2.0),
    kd("one_class", "every distribution over one class is the same", classes=1),
    kd("two_classes", "a sentence classifier's head", lead=(33,), classes=2, temperature=2.0),
    kd("scalar_lead", "logits [V] are one row", lead=(), classes=41),
    kd("one_row", "1 token", lead=(1, 1), classes=41),
    kd("deep_lead", "four leading dimensions", lead=(2, 1, 3, 2), classes=26),
    kd("vocabulary", "BERT's vocabulary: long sums", lead=(3,), classes=30522, temperature=4.0),
    kd("vocabulary_reverse_kl", "long sums, row aux", lead=(2,), classes=30522, kind="reverse_kl"),
    kd("vocabulary_jsd", "long sums in the mixture", lead=(2,), classes=30522, kind="jsd"),
    kd("mask_holes", "real rows need not be a prefix", lead=(3, 7), mask="holes", temperature=2.0),
    kd("mask_lengths", "padding at the end, one sequence all padding", lead=(3, 7), mask=(7, 0, 2), kind="ce"),
    kd("labels", "soft and hard term, each over its own rows", lead=(3, 7), labels=True, alpha=0.3, temperature=2.0),
    kd("labels_masked", "ignored labels inside the mask", lead=(3, 7), labels=True, alpha=0.7, mask="holes"),
    kd("labels_jsd", "beside a kind with a row aux", lead=(9,), labels=True, alpha=0.5, kind="jsd", temperature=3.0),
    kd("labels_tv", "the same with jumps", lead=(9,), labels=True, alpha=0.4, kind="tv"),
    kd("labels_sum", "the hard term under sum", lead=(9,), labels=True, alpha=0.5, reduction="sum"),
    kd("labels_none", "the hard term per row", lead=(3, 7), labels=True, alpha=0.5, reduction="none", mask="holes"),
    kd("labels_mean", "mean counts classes in the soft term only", lead=(9,), labels=True, alpha=0.5, reduction="mean"),
    kd("row_t", "a temperature per row and its own T^2 (flsw)", lead=(3, 7), row_temperature=True),
    kd("row_t_labels", "hard term at T = 1", lead=(3, 7), row_temperature=True, labels=True, alpha=0.5, mask="holes"),
    kd("row_t_reverse_kl", "T and aux per row", lead=(9,), row_temperature=True, kind="reverse_kl", scale_t2=False),
    kd("none", "a value per row", lead=(3, 7), reduction="none", temperature=2.0),
    kd("none_masked", "masked rows are 0", lead=(3, 7), reduction="none", mask="holes", kind="tv"),
    kd("sum", "no division", lead=(3, 7), reduction="sum", mask="holes"),
    kd("mean", "real rows x classes", lead=(3, 7), reduction="mean", mask="holes"),
    kd("saturated", "probabilities underflow in fp32", spread=60.0),
    kd("saturated_jsd", "both probabilities underflow (Liger #1453)", spread=60.0, kind="jsd"),
    kd("saturated_reverse_kl", "log of an underflowed teacher", spread=60.0, kind="reverse_kl"),
    kd("near", "p_s - p_t cancels near convergence", near=1e-3),
    kd("transposed", "[N, B, V] read as [B, N, V]", lead=(3, 7), layout="transposed", mask="holes"),
    kd("sliced", "a slice of padded logits", lead=(3, 7), layout="sliced"),
    kd("strided", "no two classes are neighbours", lead=(3, 7), layout="strided", kind="jsd"),
    kd("expanded", "a teacher broadcast with stride 0", lead=(3, 7), layout="expanded"),
]  # fmt: skip

_SHAPES = [
    dict(name="plain", why="student and teacher heads of different size"),
    dict(name="one_token", why="a map of one entry", tokens=1),
    dict(name="tile_edge", why="129 tokens: one more than a tile", tokens=129, d_s=26, d_t=80),
    dict(name="d6", why="a head smaller than a vector", tokens=41, d_s=6, d_t=6),
    dict(name="d26", why="TinyBERT's 312 / 12 beside BERT's 64", tokens=70, d_s=26, d_t=64),
    dict(name="d80", why="a head that is no power of two", tokens=65, d_s=80, d_t=12),
    dict(name="one_head", why="1 batch, 1 head", batch=1, heads=1, tokens=129),
    dict(name="mask_lengths", why="sequences of 1 token and all padding", batch=4, mask=(41, 1, 0, 17)),
    dict(name="mask_holes", why="real keys need not be a prefix", batch=3, tokens=70, mask="holes"),
    dict(name="mask_long", why="padding that spans whole tiles", tokens=200, d_s=12, d_t=8, mask=(200, 33)),
    dict(name="peaked", why="nearly one-hot maps", spread=3.0),
    dict(name="near", why="student close to teacher: the difference cancels", d_s=26, d_t=26, near=1e-2),
    dict(name="nearer", why="closer: what a Gram identity alone would lose", d_s=26, d_t=26, near=1e-4, mask=(41, 23)),
    dict(name="transposed", why="[B, N, H, d] in memory, as models hold it", layout="transposed", mask=(41, 9)),
    dict(name="sliced", why="heads cut from a packed projection", layout="sliced"),
    dict(name="strided", why="no two features are neighbours", layout="strided"),
    dict(name="expanded", why="a teacher broadcast with stride 0", layout="expanded"),
    dict(name="scaled", why="own scales instead of 1 / sqrt(d)", scale_s=0.7, scale_t=0.2),
]  # fmt: skip

ATTENTION_KL = [attention("attention_kl", **row) for row in _SHAPES] + [
    attention("attention_kl", "temperature", "divides the scores, no T^2", temperature=2.5),
    attention("attention_kl", "none", "a value per (batch, head, query)", reduction="none", mask=(41, 9)),
    attention("attention_kl", "none_holes", "the same with holes, backward per row", reduction="none", mask="holes"),
    attention("attention_kl", "sum", "no division", reduction="sum", mask=(41, 9)),
]

ATTENTION_MSE = [
    attention("attention_mse", **{**row, "name": f"{on}_{row['name']}"}, on=on)
    for on in ("scores", "probs")
    for row in _SHAPES
]

RELATION_KL = [
    relation("plain", "widths that differ, heads of 8 and 12"),
    relation("one_token", "a map of one entry", tokens=1),
    relation("one_head", "the whole width is one head", num_heads=1, w_s=26, w_t=80),
    relation("d6", "a head smaller than a vector", num_heads=4, w_s=24, w_t=32, tokens=129),
    relation("d26", "TinyBERT's 312 re-split beside BERT's 768", num_heads=12, w_s=312, w_t=768, tokens=33),
    relation("d80", "a head that is no power of two", num_heads=2, w_s=160, w_t=12, tokens=65),
    relation("mask_lengths", "a padded batch with a sequence of 1 and one all padding", batch=4, mask=(41, 1, 0, 17)),
    relation("mask_holes", "real tokens need not be a prefix", batch=3, tokens=70, mask="holes"),
    relation("mask_long", "padding that spans whole tiles", tokens=200, mask=(200, 33)),
    relation("near", "student close to teacher", w_s=24, w_t=24, near=1e-2),
    relation("peaked", "each token sees itself", spread=2.0),
    relation("transposed", "[N, B, W] seen as [B, N, W]", layout="transposed", mask=(41, 9)),
    relation("sliced", "values cut from a packed projection", layout="sliced"),
    relation("strided", "no two features are neighbours", layout="strided"),
    relation("expanded", "a teacher broadcast with stride 0", layout="expanded"),
    relation("none", "a value per (batch, head, token)", reduction="none", mask=(41, 9)),
    relation("none_holes", "the same with holes, backward per row", reduction="none", mask="holes"),
    relation("sum", "no division", reduction="sum"),
]

HIDDEN_MSE = [
    hidden("plain", "one layer"),
    hidden("one_token", "1 token, 1 feature", batch=1, tokens=1, d_s=1),
    hidden("odd", "a width that is no multiple of a vector", tokens=3, d_s=129),
    hidden("layers", "a list of layers in one call", layers=3, d_s=41),
    hidden("one_layer_list", "a list of one", layers=1),
    hidden("mask_lengths", "a padded batch, one sequence all padding", layers=2, batch=4, mask=(41, 1, 0, 17)),
    hidden("mask_holes", "real tokens need not be a prefix", mask="holes"),
    hidden("projected", "TinyBERT's projection", d_s=26, d_t=41, weights=1),
    hidden("projected_bias", "with a bias and padding", d_s=41, d_t=26, weights=1, bias=True, mask=(41, 9)),
    hidden(
        "projected_shared",
        "one projection for all layers: its gradient sums",
        layers=3,
        d_s=26,
        d_t=80,
        weights=1,
        bias=True,
    ),
    hidden("projected_each", "one projection per layer", layers=3, d_s=26, d_t=80, weights=3, bias=True, mask="holes"),
    hidden("projected_wide", "sums over many tokens", tokens=129, d_s=129, d_t=200, weights=1),
    hidden("l2", "PKD", normalize="l2", layers=2, mask=(41, 9)),
    hidden("l2_projected", "PKD after a projection", normalize="l2", d_s=26, d_t=41, weights=1, bias=True),
    hidden("layer_norm", "MobileBERT", normalize="layer_norm", layers=2, mask="holes"),
    hidden(
        "layer_norm_projected",
        "after a projection per layer",
        normalize="layer_norm",
        d_s=26,
        d_t=41,
        layers=2,
        weights=2,
    ),
    hidden("near", "student close to teacher", near=1e-4),
    hidden("transposed", "[N, B, D] seen as [B, N, D]", layout="transposed", mask=(41, 9)),
    hidden("sliced", "a slice of a wider state", layout="sliced", layers=2),
    hidden("strided", "no two features are neighbours", layout="strided"),
    hidden(
        "strided_projected",
        "the same into a projection",
        layout="strided",
        d_s=26,
        d_t=41,
        weights=1,
        bias=True,
        layers=2,
    ),
    hidden("expanded", "a teacher broadcast with stride 0", layout="expanded"),
]

CASES = KD_LOSS + ATTENTION_KL + ATTENTION_MSE + RELATION_KL + HIDDEN_MSE


def _rows_32_bytes(call: Call) -> int:
    """32 bytes a row beside the gradient, and a page for scalars."""
    logits = call.student["student_logits"]
    return 32 * (logits.numel() // logits.shape[-1]) + 4 * KIB


def _linear_in_tokens(call: Call) -> int:
    """Twice the student's and teacher's tensors in fp32: linear in N, and far below any N x N map."""
    return 2 * 4 * sum(x.numel() for x in call.leaves + call.teachers)


def _independent_of_tokens(call: Call) -> int:
    """Four Gram matrices of (d_s + d_t)^2 floats per head beside the gradients, whatever N is."""
    batch, heads, _, d_s = call.student["q_s"].shape
    return 4 * 4 * batch * heads * (d_s + call.teacher["q_t"].shape[-1]) ** 2 + 4 * KIB


_PADDED = ("uniform", 64, 256)

# The case and its target; each stands once more with bfloat16 inputs, which must be no slower.
_CPU = [
    (
        kd("kl_512x30522", "a BERT vocabulary", (512,), 30522, temperature=4.0),
        Target(eager=8, compile=3, memory=_rows_32_bytes),
    ),
    (
        kd("ce_512x30522", "the same as soft cross-entropy", (512,), 30522, kind="ce", temperature=4.0),
        Target(eager=8, compile=3, memory=_rows_32_bytes),
    ),
    (
        kd("kl_4096x2", "a classifier's head: call overhead", (4096,), 2, temperature=4.0),
        Target(eager=1, compile=1),
    ),
    (
        attention("attention_kl", "n256_padded", "a BERT batch", 256, 32, 64, batch=8, heads=12, mask=_PADDED),
        Target(eager=10, compile=4, memory=_linear_in_tokens),
    ),
    (
        attention("attention_kl", "n2048", "a long document", 2048, 32, 64, batch=1, heads=12),
        Target(eager=6, compile=2.5, memory=_linear_in_tokens),
    ),
    (
        relation("n256_padded", "MiniLM's relations", 256, 384, 768, batch=8, num_heads=12, mask=_PADDED),
        Target(eager=10, compile=4, memory=_linear_in_tokens),
    ),
    (
        attention("attention_mse", "scores_n512", "TinyBERT4, BERT", 512, 26, 64, batch=4, heads=12, on="scores"),
        Target(eager=12, compile=5, memory=_independent_of_tokens),
    ),
    (
        attention("attention_mse", "probs_n512", "TinyBERT4, BERT", 512, 26, 64, batch=4, heads=12, on="probs"),
        Target(eager=6, compile=2.5, memory=_linear_in_tokens),
    ),
    (
        hidden("6x8x256x384_projected", "MiniLM-L6, BERT", 256, 384, 768, batch=8, layers=6, weights=1, bias=True),
        Target(eager=1.5, compile=1.2),
    ),
    (
        hidden("12x8x256x768_half", "half of the tokens are padding", 256, 768, batch=8, layers=12, mask="half"),
        Target(eager=4, compile=2),
    ),
]

_CUDA = [
    (
        kd("kl_8192x128256_bf16", "a Llama vocabulary", (8192,), 128256),
        Target(eager=6, compile=1.4, liger=4, memory=_rows_32_bytes),
    ),
    (
        kd("jsd_8192x128256_bf16", "the same, beside Liger's JSD", (8192,), 128256, kind="jsd"),
        Target(eager=6, compile=1.4, liger=4, memory=_rows_32_bytes),
    ),
    (
        attention("attention_kl", "b32_n512_bf16", "BERT-base", 512, 64, 64, batch=32, heads=12),
        Target(eager=10, compile=2.5, memory=_linear_in_tokens),
    ),
    (
        attention("attention_kl", "b4_n4096_bf16", "a long context", 4096, 64, 64, batch=4, heads=12),
        Target(eager=30, memory=_linear_in_tokens),
    ),
    (
        attention("attention_mse", "scores_b32_n512_bf16", "BERT-base", 512, 64, 64, batch=32, heads=12, on="scores"),
        Target(eager=12, memory=_independent_of_tokens),
    ),
]

BENCHES = [
    *(replace(case, target=target) for case, target in _CPU),
    *(replace(case, name=f"{case.name}_bf16", dtypes=BFLOAT16, target=Target(float32=1)) for case, _ in _CPU),
    *(replace(case, dtypes=BFLOAT16, device="cuda", target=target) for case, target in _CUDA),
]


def of(*ops: str, table: list[Case] = CASES) -> list[Case]:
    """The rows of some ops, in the table's order."""
    unknown = set(ops) - set(OPS)
    if unknown:
        raise ValueError(f"unknown op {', '.join(sorted(unknown))}; the table has {', '.join(OPS)}")
    return [case for case in table if case.op in (ops or OPS)]
