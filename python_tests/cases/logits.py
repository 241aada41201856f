"""Rows of the losses on logits."""

import torch

from ..case import Call, Case, Target
from ._common import KIB, case_of


def kd(name, why, lead=(5,), classes=129, *, labels=False, row_temperature=False, **given) -> Case:
    shape = {"lead": lead, "classes": classes, "labels": labels, "row_temperature": row_temperature}
    return case_of("kd_loss", name, why, shape, given)


def topk(
    name, why, lead=(5,), classes=129, *, named=7, indices=torch.int64, labels=False, row_temperature=False, **given
):
    shape = {"lead": lead, "classes": classes, "labels": labels, "row_temperature": row_temperature}
    return case_of("topk_kd_loss", name, why, {**shape, "named": named, "indices": indices}, given)


def linear(
    name, why, lead=(5,), classes=129, d_s=12, d_t=26, *, bias=False, labels=False, row_temperature=False, **given
):
    shape = {"lead": lead, "classes": classes, "labels": labels, "row_temperature": row_temperature}
    return case_of("linear_kd_loss", name, why, {**shape, "d_s": d_s, "d_t": d_t, "bias": bias}, given)


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
    kd("eight_classes", "whole vectors of rows", lead=(3, 16), classes=8, mask=(16, 9, 0), labels=True, alpha=0.5),
    kd("eight_classes_strided", "the same rows apart", lead=(3, 16), classes=8, layout="sliced", row_temperature=True),
    kd("sixty_four_classes", "the most that go by lanes", lead=(37,), classes=64, kind="jsd", reduction="none"),
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


LINEAR_KD_LOSS = [
    linear("kl", "the plain loss from hidden states of two widths"),
    linear("bias", "heads with a bias, as BERT's decoder", bias=True, temperature=2.0),
    linear("ce", "soft targets", kind="ce", temperature=4.0, scale_t2=False),
    linear("reverse_kl", "the gradient needs a row sum of its own", kind="reverse_kl", temperature=2.0),
    linear("jsd", "two sweeps over a row of the chunk", kind="jsd", beta=0.3),
    linear("tv", "jumps", kind="tv", temperature=2.0, bias=True),
    linear("same_width", "a student as wide as its teacher", lead=(3, 7), d_s=12, d_t=12, mask="holes"),
    linear("wide", "more features than a panel of classes", lead=(3,), classes=41, d_s=1100, d_t=64),
    linear("one_class", "every distribution over one class is the same", classes=1),
    linear("one_feature", "outer products", d_s=1, d_t=1),
    linear("scalar_lead", "one hidden state [D]", lead=(), classes=41),
    linear("deep_lead", "four leading dimensions", lead=(2, 1, 3, 2), classes=26),
    linear("panels", "three panels of classes, the last one short", lead=(5, 7), classes=2500, bias=True, mask="holes"),
    linear("vocabulary", "BERT's vocabulary", lead=(3,), classes=30522, temperature=2.0),
    linear("chunks", "more rows than a chunk has: the last chunk is short", (259,), 30522, d_s=2, d_t=3, bias=True),
    linear("mask_holes", "padded rows are not computed", lead=(3, 7), mask="holes", temperature=2.0),
    linear("mask_lengths", "one sequence all padding", lead=(3, 7), mask=(7, 0, 2), kind="ce", bias=True),
    linear("labels", "soft and hard term", lead=(3, 7), labels=True, alpha=0.3, temperature=2.0),
    linear("labels_masked", "ignored labels in the mask", lead=(3, 7), labels=True, alpha=0.7, mask="holes", bias=True),
    linear("labels_none", "the hard term per row", lead=(3, 7), labels=True, alpha=0.5, reduction="none", mask="holes"),
    linear("labels_alone", "alpha = 0: the hard term alone", lead=(3, 7), labels=True, alpha=0.0),
    linear("row_t", "a temperature per row", lead=(3, 7), row_temperature=True, mask="holes"),
    linear("none", "an upstream gradient per row", lead=(3, 7), reduction="none", bias=True),
    linear("none_masked", "masked rows are 0", lead=(3, 7), reduction="none", mask="holes", kind="jsd"),
    linear("sum", "no division", lead=(3, 7), reduction="sum", mask="holes"),
    linear("mean", "real rows x classes", lead=(3, 7), reduction="mean", mask="holes"),
    linear("saturated", "probabilities underflow", spread=60.0),
    linear("transposed", "[N, B, D] as [B, N, D], weights by columns", lead=(3, 7), layout="transposed", mask="holes"),
    linear("sliced", "slices of wider tensors", lead=(3, 7), layout="sliced", bias=True),
    linear("strided", "no two features are neighbours", lead=(3, 7), layout="strided"),
    linear("expanded", "a teacher broadcast with stride 0", lead=(3, 7), layout="expanded"),
]  # fmt: skip


TOPK_KD_LOSS = [
    topk("kl", "the teacher's K classes renormalised against the whole vocabulary"),
    topk("kl_t4", "a temperature on both sides", temperature=4.0),
    topk("ce", "the same gradient, the entropy stays", kind="ce", temperature=2.0, scale_t2=False),
    topk("jsd", "the student's mass elsewhere meets no teacher", kind="jsd", temperature=2.0),
    topk("jsd_0.9", "an unequal mixture", kind="jsd", beta=0.9),
    topk("tv", "half of the mass elsewhere", kind="tv", temperature=2.0),
    topk("bucket", "one outcome for all other classes", tail="bucket"),
    topk("bucket_t4", "log-probabilities at T", tail="bucket", temperature=4.0),
    topk("bucket_ce", "the bucket's own cross-entropy", tail="bucket", kind="ce", temperature=2.0),
    topk("bucket_reverse_kl", "finite, since the bucket has mass", tail="bucket", kind="reverse_kl", temperature=2.0),
    topk("bucket_jsd", "the mixture of two buckets", tail="bucket", kind="jsd", beta=0.1),
    topk("bucket_tv", "jumps in the bucket", tail="bucket", kind="tv"),
    topk("one_named", "K = 1: hard labels with a tail", named=1, tail="bucket"),
    topk("one_named_renormalize", "K = 1: the cross-entropy of one class", named=1),
    topk("all_named", "K = V: the dense loss, no rest", classes=41, named=41, temperature=2.0),
    topk("all_named_bucket", "K = V: the bucket is empty", classes=41, named=41, tail="bucket"),
    topk("one_class", "every distribution over one class is the same", classes=1, named=1),
    topk("two_classes", "one named, one rest", lead=(33,), classes=2, named=1, tail="bucket"),
    topk("scalar_lead", "logits [V] are one row", lead=(), classes=41),
    topk("deep_lead", "four leading dimensions", lead=(2, 1, 3, 2), classes=26),
    topk("int32", "indices as they are cached", indices=torch.int32, lead=(3, 7), mask="holes"),
    topk("vocabulary", "BERT's vocabulary, several chunks", lead=(3,), classes=30522, named=64, temperature=4.0),
    topk("vocabulary_bucket", "a heavy tail", lead=(3,), classes=30522, named=64, tail="bucket", temperature=2.0),
    topk("many_named", "more than a chunk of named classes", lead=(2,), classes=5000, named=2500, tail="bucket"),
    topk("mask_holes", "real rows need not be a prefix", lead=(3, 7), mask="holes", temperature=2.0),
    topk("mask_lengths", "one sequence all padding", lead=(3, 7), mask=(7, 0, 2), tail="bucket"),
    topk("labels", "the hard term sees every class", lead=(3, 7), labels=True, alpha=0.3, temperature=2.0),
    topk("labels_bucket", "beside a bucket", lead=(3, 7), labels=True, alpha=0.7, mask="holes", tail="bucket"),
    topk("labels_none", "the hard term per row", lead=(3, 7), labels=True, alpha=0.5, reduction="none", mask="holes"),
    topk("labels_all_named", "no rest under the hard term", classes=41, named=41, labels=True, alpha=0.5),
    topk("labels_saturated", "named logits far above the rest", labels=True, alpha=0.5, spread=60.0, named=1),
    topk("row_t", "a temperature per row", lead=(3, 7), row_temperature=True, mask="holes"),
    topk("row_t_bucket", "the row's own T", lead=(3, 7), row_temperature=True, tail="bucket", labels=True),
    topk("none", "a value per row", lead=(3, 7), reduction="none", temperature=2.0),
    topk("sum", "no division", lead=(3, 7), reduction="sum", mask="holes"),
    topk("mean", "real rows x classes of the vocabulary", lead=(3, 7), reduction="mean", mask="holes"),
    topk("saturated", "the rest underflows beside the named", spread=60.0),
    topk("near", "p_s - p_t cancels near convergence", near=1e-3, tail="bucket"),
    topk("transposed", "[N, B, V] read as [B, N, V]", lead=(3, 7), layout="transposed", mask="holes"),
    topk("sliced", "a slice of padded logits", lead=(3, 7), layout="sliced", tail="bucket"),
    topk("strided", "no two classes are neighbours", lead=(3, 7), layout="strided", kind="jsd"),
    topk("expanded", "values broadcast with stride 0", lead=(3, 7), layout="expanded"),
]  # fmt: skip


def _rows_32_bytes(call: Call) -> int:
    """32 bytes a row beside the gradient, and a page for scalars."""
    logits = call.student["student_logits"]
    return 32 * (logits.numel() // logits.shape[-1]) + 4 * KIB


def _outcomes(call: Call) -> int:
    """Both sides' K + 1 outcomes, their gradient and 48 bytes a row beside the gradient, and a page for scalars."""
    values = call.teacher["teacher_values"]
    rows = values.numel() // values.shape[-1]
    return rows * (12 * (values.shape[-1] + 1) + 48) + 4 * KIB


CPU = [
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
        topk("kl_512x30522_k64", "a cached teacher", (512,), 30522, named=64, temperature=2.0),
        Target(eager=4, compile=2, memory=_outcomes),
    ),
    (
        linear("kl_1024x384x30522", "the head of a half-width student", (1024,), 30522, 384, 768, temperature=2.0),
        Target(eager=1.3, compile=1.1, memory=lambda call: 64 << 20),
    ),
]

CUDA = [
    (
        kd("kl_8192x128256_bf16", "a Llama vocabulary", (8192,), 128256),
        Target(eager=6, compile=1.4, liger=4, share=85, memory=_rows_32_bytes),
    ),
    (
        kd("jsd_8192x128256_bf16", "the same, beside Liger's JSD", (8192,), 128256, kind="jsd"),
        Target(eager=6, compile=1.4, liger=4, memory=_rows_32_bytes),
    ),
    (
        topk("topk_8192x128256_k64_bf16", "a cached teacher of a Llama vocabulary", (8192,), 128256, named=64),
        Target(eager=5, compile=2, memory=_outcomes),
    ),
    *(
        (
            linear(f"{kind}_8192x384x30522_bf16", "a half-width student's head", (8192,), 30522, 384, 768, kind=kind),
            Target(liger=goal, memory=lambda call: 64 << 20),
        )
        for kind, goal in (("kl", 1.15), ("jsd", 4))
    ),
]
