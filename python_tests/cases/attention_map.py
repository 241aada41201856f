"""Rows of the losses on attention maps that are given as scores."""

from ..case import Call, Case, Target
from ._common import KIB, case_of


def maps(op, name, why, tokens=41, *, batch=2, heads=3, heads_t=None, **given) -> Case:
    shape = {"batch": batch, "heads": heads, "heads_t": heads_t or heads, "tokens": tokens}
    return case_of(op, name, why, shape, given)


_SHAPES = [
    dict(name="plain", why="rows that are no whole vectors"),
    dict(name="one_token", why="a map of one entry", tokens=1),
    dict(name="n16", why="rows of whole vectors", tokens=16),
    dict(name="n17", why="one more", tokens=17),
    dict(name="n200", why="several blocks of rows", tokens=200, heads=2, mask=(200, 33)),
    dict(name="one_head", why="1 batch, 1 head", batch=1, heads=1, tokens=129),
    dict(name="mask_lengths", why="sequences of 1 token and all padding", batch=4, mask=(41, 1, 0, 17)),
    dict(name="mask_left", why="padding before the tokens", batch=4, tokens=70, mask="left"),
    dict(name="mask_holes", why="real keys need not be a prefix", batch=3, tokens=70, mask="holes"),
    dict(name="peaked", why="nearly one-hot maps", spread=8.0),
    dict(name="near", why="student close to teacher: the difference cancels", near=1e-2),
    dict(name="nearer", why="closer", near=1e-4, mask=(41, 23)),
    dict(name="transposed", why="[B, N, H, N] in memory", layout="transposed", mask=(41, 9)),
    dict(name="sliced", why="maps cut from longer rows", layout="sliced"),
    dict(name="strided", why="no two keys are neighbours", layout="strided", mask="holes"),
    dict(name="expanded", why="a teacher broadcast with stride 0", layout="expanded"),
    dict(name="sum", why="heads summed first", head_reduction="sum"),
    dict(name="sum_unlike", why="the teacher has more heads", heads_t=5, head_reduction="sum", mask=(41, 9)),
    dict(name="mean", why="heads averaged first", head_reduction="mean", mask="holes"),
    dict(name="mean_unlike", why="means over 3 and 4 heads", heads_t=4, head_reduction="mean", mask=(41, 9)),
    dict(name="mean_near", why="means that agree", head_reduction="mean", near=1e-2),
]  # fmt: skip

ATTENTION_MAP_MSE = [maps("attention_map_mse", **row) for row in _SHAPES]

ATTENTION_MAP_KL = [maps("attention_map_kl", **row) for row in _SHAPES] + [
    maps("attention_map_kl", "temperature", "divides the scores, no T^2", temperature=2.5),
    maps("attention_map_kl", "none", "a value per (batch, head, query)", reduction="none", mask=(41, 9)),
    maps("attention_map_kl", "none_holes", "the same with holes", reduction="none", mask="holes"),
    maps(
        "attention_map_kl",
        "none_mean",
        "a value per (batch, query)",
        reduction="none",
        head_reduction="mean",
        heads_t=2,
        temperature=0.7,
        mask=(41, 9),
    ),
    maps("attention_map_kl", "total", "no division", reduction="sum", mask=(41, 9)),
]


def _scalars(call: Call) -> int:
    """Nothing beside the gradient."""
    return 4 * KIB


def _rows_16_bytes(call: Call) -> int:
    """16 bytes a row beside the gradient."""
    scores = call.student["student_scores"]
    return 16 * (scores.numel() // scores.shape[-1]) + 4 * KIB


_BERT = dict(tokens=256, batch=8, heads=12)

CPU = [
    (
        maps("attention_map_mse", "n256_half", "half of the tokens are padding", **_BERT, mask="half"),
        Target(eager=8, compile=2, memory=_scalars),
    ),
    (
        maps("attention_map_mse", "n256_full", "a mask that is all real", **_BERT, mask=(256,) * 8),
        Target(eager=4, compile=1.2, memory=_scalars),
    ),
    (
        maps("attention_map_kl", "n256_half", "half of the tokens are padding", **_BERT, mask="half"),
        Target(eager=12, compile=3.5, memory=_rows_16_bytes),
    ),
    (
        maps("attention_map_kl", "n256_full", "a mask that is all real", **_BERT, mask=(256,) * 8),
        Target(eager=8, compile=2, memory=_rows_16_bytes),
    ),
]

CUDA = [
    (maps(op, "b32_n512_bf16", "BERT-base's maps", 512, batch=32, heads=12), Target())
    for op in ("attention_map_mse", "attention_map_kl")
]
