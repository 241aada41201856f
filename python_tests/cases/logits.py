"""Rows of the losses on logits."""

from ..case import Call, Case, Target
from ._common import KIB, case_of


def kd(name, why, lead=(5,), classes=129, *, labels=False, row_temperature=False, **given) -> Case:
    shape = {"lead": lead, "classes": classes, "labels": labels, "row_temperature": row_temperature}
    return case_of("kd_loss", name, why, shape, given)


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


def _rows_32_bytes(call: Call) -> int:
    """32 bytes a row beside the gradient, and a page for scalars."""
    logits = call.student["student_logits"]
    return 32 * (logits.numel() // logits.shape[-1]) + 4 * KIB


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
]

CUDA = [
    (
        kd("kl_8192x128256_bf16", "a Llama vocabulary", (8192,), 128256),
        Target(eager=6, compile=1.4, liger=4, memory=_rows_32_bytes),
    ),
    (
        kd("jsd_8192x128256_bf16", "the same, beside Liger's JSD", (8192,), 128256, kind="jsd"),
        Target(eager=6, compile=1.4, liger=4, memory=_rows_32_bytes),
    ),
]
