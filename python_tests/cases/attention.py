"""Rows of the losses on attention maps and relations."""

from ..case import Call, Case, Target
from ._common import KIB, case_of


def attention(op, name, why, tokens=41, d_s=8, d_t=12, *, batch=2, heads=3, **given) -> Case:
    shape = {"batch": batch, "heads": heads, "tokens": tokens, "d_s": d_s, "d_t": d_t}
    return case_of(op, name, why, shape, given)


def relation(name, why, tokens=41, w_s=24, w_t=36, *, batch=2, num_heads=3, **given) -> Case:
    shape = {"batch": batch, "tokens": tokens, "w_s": w_s, "w_t": w_t}
    return case_of("relation_kl", name, why, shape, {"num_heads": num_heads, **given})


_SHAPES = [
    dict(name="plain", why="student and teacher heads of different size"),
    dict(name="one_token", why="a map of one entry", tokens=1),
    dict(name="tile_edge", why="129 tokens: one more than a tile", tokens=129, d_s=26, d_t=80),
    dict(name="d6", why="a head smaller than a vector", tokens=41, d_s=6, d_t=6),
    dict(name="d26", why="TinyBERT's 312 / 12 beside BERT's 64", tokens=70, d_s=26, d_t=64),
    dict(name="d80", why="a head that is no power of two", tokens=65, d_s=80, d_t=12),
    dict(name="d48", why="three vectors across, and blocks that add up", batch=1, tokens=200, d_s=48, d_t=40),
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


def _linear_in_tokens(call: Call) -> int:
    """Twice the student's and teacher's tensors in fp32: linear in N, and far below any N x N map."""
    return 2 * 4 * sum(x.numel() for x in call.leaves + call.teachers)


def _independent_of_tokens(call: Call) -> int:
    """Four Gram matrices of (d_s + d_t)^2 floats per head beside the gradients, whatever N is."""
    batch, heads, _, d_s = call.student["q_s"].shape
    return 4 * 4 * batch * heads * (d_s + call.teacher["q_t"].shape[-1]) ** 2 + 4 * KIB


_PADDED = ("uniform", 64, 256)

CPU = [
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
]

CUDA = [
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
