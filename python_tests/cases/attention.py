"""Rows of the losses on attention maps and relations."""

from ..case import Call, Case, Target
from ._common import KIB, case_of

_SHAPE_KEYS = ("heads_t", "kv_s", "kv_t", "bias_s", "bias_t", "lse", "packed")


def attention(op, name, why, tokens=41, d_s=8, d_t=12, *, batch=2, heads=3, **given) -> Case:
    """`given`: what python_tests.case says of a shape, fields of Case, and options of the op."""
    shape = {"batch": batch, "heads": heads, "tokens": tokens, "d_s": d_s, "d_t": d_t}
    shape |= {key: given.pop(key) for key in _SHAPE_KEYS if key in given}
    return case_of(op, name, why, shape, given)


def relation(name, why, tokens=41, w_s=24, w_t=36, *, batch=2, num_heads=3, **given) -> Case:
    shape = {"batch": batch, "tokens": tokens, "w_s": w_s, "w_t": w_t}
    shape |= {key: given.pop(key) for key in ("packed",) if key in given}
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

_PACKED = [
    dict(name="packed", why="sequences one behind the other, one empty, one of a token", tokens=63,
         packed=(22, 0, 1, 40)),
    dict(name="packed_long", why="one more than a tile, and tokens behind the last", tokens=140, packed=(65, 70),
         max_seqlen=70),
]  # fmt: skip

ATTENTION_KL = [attention("attention_kl", **row) for row in _SHAPES + _PACKED] + [
    attention("attention_kl", "temperature", "divides the scores, no T^2", temperature=2.5),
    attention("attention_kl", "none", "a value per (batch, head, query)", reduction="none", mask=(41, 9)),
    attention("attention_kl", "none_holes", "the same with holes, backward per row", reduction="none", mask="holes"),
    attention("attention_kl", "sum", "no division", reduction="sum", mask=(41, 9)),
    attention("attention_kl", "reverse", "KL(student || teacher)", kind="reverse_kl", temperature=1.5),
    attention("attention_kl", "reverse_near", "the same near the teacher", kind="reverse_kl", d_t=8, near=1e-2),
    attention("attention_kl", "reverse_none", "its rows", kind="reverse_kl", reduction="none", mask="holes"),
    attention("attention_kl", "head_sum", "other numbers of heads", heads=4, heads_t=3, head_reduction="sum", d_s=6),
    attention("attention_kl", "head_mean", "MiniLM from TextBrewer's attention_ce_mean", heads_t=2, mask=(41, 9),
              head_reduction="mean", kind="reverse_kl", temperature=0.1),
    attention("attention_kl", "head_mean_none", "a row for all heads", head_reduction="mean", reduction="none",
              mask="holes", temperature=0.1),
    attention("attention_kl", "head_map", "a teacher's head for each", heads_t=5, head_map=[4, 0, 4]),
    attention("attention_kl", "causal", "queries see the past", 129, causal=True),
    attention("attention_kl", "causal_holes", "the same with holes and rows", 70, batch=3, causal=True, mask="holes",
              reduction="none"),
    attention("attention_kl", "bias", "a bias per head of one, broadcast of the other", bias_s=(3, 41, 41),
              bias_t=(2, 1, 1, 41), mask=(41, 9), temperature=2.0),
    attention("attention_kl", "bias_long", "one more than a tile, in the past", 129, heads=2, bias_s=(129, 129),
              causal=True, kind="reverse_kl"),
    attention("attention_kl", "bias_head_sum", "summed over heads with the scores", bias_s=(3, 41, 41),
              bias_t=(2, 1, 41, 41), head_reduction="sum", temperature=3.0),
    attention("attention_kl", "grouped", "heads share keys, other heads in the teacher", heads=4, kv_s=2, kv_t=1),
    attention("attention_kl", "grouped_mapped", "and explicit heads", 70, heads=4, kv_s=2, heads_t=6, kv_t=3,
              head_map=[5, 0, 1, 5], mask=(70, 30)),
    attention("attention_kl", "grouped_joined", "keys that a sum over heads meets twice", 70, 12, 24, heads=4, kv_s=2,
              heads_t=2, kv_t=1, head_reduction="mean", mask=(70, 30)),
    attention("attention_kl", "grouped_causal_none", "rows, in the past", heads=4, kv_s=1, causal=True,
              reduction="none", mask=(41, 9), layout="transposed"),
    attention("attention_kl", "lse", "what the models' own attention left", lse=True, mask=(41, 9), temperature=1.5),
    attention("attention_kl", "lse_reverse", "the same in the past", 70, lse=True, kind="reverse_kl", causal=True),
    attention("attention_kl", "packed_none", "rows of packed sequences", 63, packed=(22, 1, 36), reduction="none"),
    attention("attention_kl", "packed_all", "packed, grouped, biased, in the past", 63, heads=4, kv_s=2, causal=True,
              packed=(22, 1, 36), max_seqlen=40, bias_s=(3, 1, 40, 40), layout="sliced"),
    attention("attention_kl", "packed_joined", "packed rows for all heads", 63, packed=(22, 1, 36), heads_t=2,
              head_reduction="sum", reduction="none", kind="reverse_kl"),
]  # fmt: skip

ATTENTION_MSE = [
    attention("attention_mse", **{**row, "name": f"{on}_{row['name']}"}, on=on)
    for on in ("scores", "probs")
    for row in _SHAPES + _PACKED
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
    relation("packed", "sequences one behind the other", tokens=63, packed=(22, 0, 1, 40)),
    relation("packed_none", "rows, one more than a tile, tokens behind", 140, packed=(65, 70), max_seqlen=70,
             reduction="none"),
]  # fmt: skip


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
        attention("attention_mse", "scores_n4096", "the same, long", 4096, 26, 64, batch=1, heads=12, on="scores"),
        Target(eager=60, compile=20, memory=_independent_of_tokens),
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
    (relation("b32_n512_bf16", "MiniLM's relations", 512, 384, 768, batch=32, num_heads=12), Target()),
]
