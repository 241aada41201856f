"""Rows of the losses on hidden states."""

from ..case import Case, Target
from ._common import KIB, case_of


def hidden(name, why, tokens=41, d_s=80, d_t=None, *, batch=2, layers=None, weights=0, bias=False, **given) -> Case:
    return _layers("hidden_mse", name, why, batch, tokens, d_s, d_t or d_s, layers, given, weights=weights, bias=bias)


def cosine(name, why, tokens=41, d=80, *, batch=2, layers=None, **given) -> Case:
    return _layers("hidden_cosine", name, why, batch, tokens, d, d, layers, given)


def moment(name, why, tokens=41, d=80, *, batch=2, layers=None, **given) -> Case:
    return _layers("moment_mse", name, why, batch, tokens, d, d, layers, given)


def gram(name, why, tokens=41, d_s=24, d_t=None, *, batch=2, same=False, d_s1=None, d_t1=None, **given) -> Case:
    d_t = d_t or d_s
    shape = {"batch": batch, "tokens": tokens, "d_s": d_s, "d_t": d_t, "d_s1": d_s1 or d_s, "d_t1": d_t1 or d_t}
    return case_of("gram_mse", name, why, {**shape, "same": same}, given)


def _layers(op, name, why, batch, tokens, d_s, d_t, layers, given, **shape) -> Case:
    shape = {"batch": batch, "tokens": tokens, "d_s": d_s, "d_t": d_t, "layers": layers, **shape}
    return case_of(op, name, why, shape, given)


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
    hidden("projected_48", "three vectors across, and sums over several steps", tokens=200, d_s=48, d_t=40, weights=1),
    hidden(
        "projected_deep", "several blocks of rows and steps of K", tokens=300, d_s=608, d_t=70, weights=1, bias=True
    ),
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

# Rows that hidden_cosine and moment_mse share.
_TOKENWISE = [
    dict(name="plain", why="one layer"),
    dict(name="one_token", why="1 token", batch=1, tokens=1, d=8),
    dict(name="odd", why="a width that is no multiple of a vector", tokens=3, d=129),
    dict(name="long", why="a row of more than one chunk of sums", tokens=3, d=2100),
    dict(name="layers", why="a list of layers in one call", layers=3, d=41),
    dict(name="one_layer_list", why="a list of one", layers=1),
    dict(name="mask_lengths", why="a padded batch, one sequence all padding", layers=2, batch=4, mask=(41, 1, 0, 17)),
    dict(name="mask_holes", why="real tokens need not be a prefix", mask="holes"),
    dict(name="near", why="student close to teacher", near=1e-4),
    dict(name="transposed", why="[N, B, D] seen as [B, N, D]", layout="transposed", mask=(41, 9)),
    dict(name="sliced", why="a slice of a wider state", layout="sliced", layers=2),
    dict(name="strided", why="no two features are neighbours", layout="strided"),
    dict(name="expanded", why="a teacher broadcast with stride 0", layout="expanded"),
]

HIDDEN_COSINE = [cosine(**row) for row in _TOKENWISE]

MOMENT_MSE = [moment(**row) for row in _TOKENWISE] + [
    moment("one_feature", "a variance of 0", tokens=5, d=1),
    moment("squared", "the variances' difference squared", variance="squared", layers=2, mask=(41, 9)),
    moment("weights", "MobileBERT's weights", mean_weight=5000.0, variance_weight=5.0, mask="holes"),
]

_GRAMS = [
    dict(name="plain", why="two layers of one width"),
    dict(name="same", why="one layer with itself: symmetric", same=True),
    dict(name="one_token", why="1 token", batch=1, tokens=1, d_s=8),
    dict(name="block_edge", why="one row more than a block of tiles", tokens=257, d_s=26, same=True),
    dict(name="block_edge_two", why="two blocks of rows of two layers", tokens=300, d_s=12),
    dict(name="wide", why="one feature more than a block", tokens=5, d_s=257, same=True),
    dict(name="odd", why="a width that is no multiple of a vector", tokens=70, d_s=41),
    dict(name="mask_lengths", why="a padded batch, one sequence all padding", batch=4, mask=(41, 1, 0, 17)),
    dict(name="mask_lengths_same", why="the same, symmetric", batch=4, mask=(41, 1, 0, 17), same=True),
    dict(name="mask_holes", why="real tokens need not be a prefix", tokens=210, d_s=16, mask="holes", same=True),
    dict(name="near", why="student close to teacher: the difference cancels", near=1e-3, same=True),
    dict(name="transposed", why="[N, B, D] seen as [B, N, D]", layout="transposed", mask=(41, 9)),
    dict(name="sliced", why="a slice of a wider state", layout="sliced", same=True),
    dict(name="strided", why="no two features are neighbours", layout="strided"),
    dict(name="expanded", why="a teacher broadcast with stride 0", layout="expanded"),
]  # fmt: skip

GRAM_MSE = [
    gram(**{**row, "name": f"{over}_{row['name']}"}, over=over) for over in ("hidden", "token") for row in _GRAMS
] + [
    gram("hidden_widths", "two layers of unlike width", d_s=24, d_s1=41, d_t1=41, mask=(41, 9), over="hidden"),
    gram("hidden_blocks", "more blocks of one factor than of the other", 9, 12, d_s1=260, d_t1=260, over="hidden"),
    gram("token_widths", "student and teacher of unlike width", d_s=26, d_t=64, mask=(41, 9), over="token"),
    gram("token_widths_same", "the same, symmetric", d_s=26, d_t=64, same=True, over="token"),
    gram("token_whole", "so many sequences that each is a block", 290, 12, 40, batch=8, same=True, over="token"),
    gram("token_whole_two", "the same of two layers, with holes", 270, 12, batch=8, mask="holes", over="token"),
    gram("token_deep", "more features than are packed at once", 40, 420, 140, same=True, over="token"),
    gram("hidden_deep", "more tokens than are packed at once", 420, 12, mask="holes", over="hidden"),
]

CPU = [
    (
        hidden("6x8x256x384_projected", "MiniLM-L6, BERT", 256, 384, 768, batch=8, layers=6, weights=1, bias=True),
        Target(eager=1.5, compile=1.2),
    ),
    (
        hidden("12x8x256x768_half", "half of the tokens are padding", 256, 768, batch=8, layers=12, mask="half"),
        Target(eager=4, compile=2),
    ),
    (
        cosine("8x256x768", "the last hidden states of DistilBERT, BERT", 256, 768, batch=8),
        Target(eager=4, compile=1.3, memory=lambda _: KIB),
    ),
    (
        gram("nst_8x512x312x768", "TinyBERT and BERT, N 512", 512, 312, 768, batch=8, same=True, over="token"),
        # One float32 gradient that forward leaves for backward.
        Target(eager=3, compile=1.5, memory=lambda call: 4 * call.leaves[0].numel() + KIB),
    ),
    (
        moment("8x256x512", "MobileBERT's statistics transfer", 256, 512, batch=8),
        Target(eager=4, compile=1.3, memory=lambda call: 12 * 8 * 256 + KIB),
    ),
]

CUDA = [
    (hidden("12x32x512x768_bf16", "every layer of BERT", 512, 768, batch=32, layers=12), Target()),
    (
        hidden("6x32x512x384_projected_bf16", "MiniLM-L6, BERT", 512, 384, 768, batch=32, layers=6, weights=1),
        Target(),
    ),
    (cosine("64x512x1024_bf16", "the last hidden states of BERT-large", 512, 1024, batch=64), Target()),
    (gram("nst_32x512x312x768_bf16", "TinyBERT and BERT", 512, 312, 768, batch=32, same=True, over="token"), Target()),
    (moment("128x512x512_bf16", "MobileBERT's statistics transfer", 512, 512, batch=128), Target()),
]
