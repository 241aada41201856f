"""The objectives of published systems as their official code reduces them, restated in plain torch, and the calls that
give the same numbers and gradients.

The reductions differ from system to system, which is the most reported mistake in reimplementations: a mean over rows x
classes, over sequences instead of tokens, or over padding too. Each test shows the factor, or the call without one.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kdkernels.functional import (
    attention_kl,
    attention_map_kl,
    attention_mse,
    hidden_cosine,
    hidden_mse,
    kd_loss,
    moment_mse,
    relation_kl,
)

from .case import Call
from .tolerance import beside

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str),
]

B, H, N, C = 3, 4, 17, 11
LENGTHS = torch.tensor([17, 9, 2])
MASK = torch.arange(N) < LENGTHS[:, None]


def make(seed, dtype, student, teacher, **other) -> Call:
    """Random tensors of the shapes given by name; a list of shapes gives a list of tensors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape):
        return [draw(x) for x in shape] if isinstance(shape, list) else torch.randn(shape, generator=generator)

    sides = ({name: draw(shape) for name, shape in side.items()} for side in (student, teacher))
    return Call(*sides, other).map(lambda x: x.to(dtype))


def check(dtype, official, ours, student, teacher, **other):
    assert beside(official, ours, lambda seed: make(seed, dtype, student, teacher, **other)) == []


def queries_and_keys(d_s, d_t):
    return dict.fromkeys(("q_s", "k_s"), (B, H, N, d_s)), dict.fromkeys(("q_t", "k_t"), (B, H, N, d_t))


class TestHinton:
    """Also CoFi (T = 2) and FastBERT's branches (T = 1): KL, mean over rows; beside it the labels' cross-entropy."""

    @pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
    def test_soft_and_hard(self, dtype, temperature):
        def official(student_logits, teacher_logits, labels):
            log_p, q = (student_logits / temperature).log_softmax(-1), (teacher_logits / temperature).softmax(-1)
            soft = F.kl_div(log_p, q, reduction="batchmean") * temperature**2
            return 0.9 * soft + 0.1 * F.cross_entropy(student_logits, labels)

        labels = torch.randint(C, (7,), generator=torch.Generator().manual_seed(0))
        ours = partial(kd_loss, temperature=temperature, alpha=0.9)
        check(dtype, official, ours, {"student_logits": (7, C)}, {"teacher_logits": (7, C)}, labels=labels)


class TestTinyBert:
    """Scores and states are means over padding too, and the prediction's mean is over rows x classes."""

    @staticmethod
    def attention(q_s, k_s, q_t, k_t, mask):
        def scores(q, k):
            x = q @ k.mT / math.sqrt(q.shape[-1]) + (1 - mask[:, None, None, :].to(q.dtype)) * -1e4
            return torch.where(x <= -1e2, torch.zeros_like(x), x)

        return F.mse_loss(scores(q_s, k_s), scores(q_t, k_t))

    def test_attention(self, dtype):
        """Zeroed scores of padded keys are what keys of zeros give: nothing to mask, and padded queries count."""

        def ours(q_s, k_s, q_t, k_t, mask):
            real = mask[:, None, :, None]
            return attention_mse(q_s, k_s * real, q_t, k_t * real)

        check(dtype, self.attention, ours, *queries_and_keys(26, 64), mask=MASK)

    def test_attention_of_real_queries(self, dtype):
        """The mask leaves padded queries out and divides by the pairs that count instead of B h N^2."""
        factor = LENGTHS.square().sum().item() / (B * N * N)

        def official(q_s, k_s, q_t, k_t, mask):
            real = mask[:, None, :, None]
            return self.attention(q_s * real, k_s, q_t * real, k_t, mask)

        def ours(*args, **kwargs):
            return factor * attention_mse(*args, **kwargs)

        check(dtype, official, ours, *queries_and_keys(26, 64), mask=MASK)

    def test_hidden(self, dtype):
        """All states, the embeddings' too, through one `fit_dense`, padding included."""

        def official(student, teacher, weight, bias):
            return sum(F.mse_loss(F.linear(s, weight, bias), t) for s, t in zip(student, teacher, strict=True))

        student = {"student": [(B, N, 12)] * 5, "weight": (24, 12), "bias": (24,)}
        check(dtype, official, hidden_mse, student, {"teacher": [(B, N, 24)] * 5})

    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_prediction(self, dtype, temperature):
        def official(student_logits, teacher_logits):
            likelihood = (student_logits / temperature).log_softmax(-1)
            return (-(teacher_logits / temperature).softmax(-1) * likelihood).mean()

        ours = partial(kd_loss, kind="ce", temperature=temperature, scale_t2=False, reduction="mean")
        check(dtype, official, ours, {"student_logits": (7, C)}, {"teacher_logits": (7, C)})


class TestMiniLm:
    """Each sequence is cropped to its length, and the mean is over sequences, not over all tokens."""

    @staticmethod
    def transfer(a_s, b_s, a_t, b_t, mask):
        """Mean over sequences of 1 / (heads |x|) sum KL(softmax(a_t b_t^T / sqrt d) || the student's)."""
        total = 0.0
        for i, length in enumerate(mask.sum(-1).tolist()):
            s, t = (
                a[i, :, :length] @ b[i, :, :length].mT / math.sqrt(a.shape[-1]) for a, b in ((a_s, b_s), (a_t, b_t))
            )
            total = total + F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="sum") / (a_s.shape[1] * length)
        return total / len(mask)

    @staticmethod
    def per_sequence(rows, mask):
        """The mean over sequences, from one value per (sequence, head, token)."""
        return (rows.sum((1, 2)) / (rows.shape[1] * mask.sum(-1))).mean()

    def test_attention(self, dtype):
        def ours(a_s, b_s, a_t, b_t, mask):
            return self.per_sequence(attention_kl(a_s, b_s, a_t, b_t, mask, reduction="none"), mask)

        check(dtype, self.transfer, ours, **self._heads(), mask=MASK)

    def test_mean_over_tokens(self, dtype):
        """The default reduction weighs each sequence by its length; for equal lengths both are the same number."""
        weights = (LENGTHS / LENGTHS.sum()).tolist()

        def official(a_s, b_s, a_t, b_t, mask):
            each = [[x[i : i + 1] for x in (a_s, b_s, a_t, b_t, mask)] for i in range(B)]
            return sum(weight * self.transfer(*one) for weight, one in zip(weights, each, strict=True))

        def ours(a_s, b_s, a_t, b_t, mask):
            return attention_kl(a_s, b_s, a_t, b_t, mask)

        check(dtype, official, ours, **self._heads(), mask=MASK)
        check(dtype, self.transfer, ours, **self._heads(), mask=torch.ones_like(MASK))

    def test_v1(self, dtype):
        """Attention and value relation of the last layer, teacher and student with as many heads."""

        def heads(x):
            return x.unflatten(-1, (H, -1)).transpose(1, 2)

        def official(student, teacher, mask):
            (q_s, k_s, v_s), (q_t, k_t, v_t) = (map(heads, x) for x in (student, teacher))
            return self.transfer(q_s, k_s, q_t, k_t, mask) + self.transfer(v_s, v_s, v_t, v_t, mask)

        def ours(student, teacher, mask):
            q_s, k_s, q_t, k_t = (heads(x) for x in student[:2] + teacher[:2])
            attention = attention_kl(q_s, k_s, q_t, k_t, mask, reduction="none")
            relation = relation_kl(student[2], teacher[2], mask, num_heads=H, reduction="none")
            return self.per_sequence(attention, mask) + self.per_sequence(relation, mask)

        check(dtype, official, ours, {"student": [(B, N, 24)] * 3}, {"teacher": [(B, N, 48)] * 3}, mask=MASK)

    def test_v2(self, dtype):
        """Query, key and value relations with heads re-split, a third of the weight each (the paper: 1 each)."""
        relation_heads = 6

        def official(student, teacher, mask):
            split = [
                [x.unflatten(-1, (relation_heads, -1)).transpose(1, 2) for x in side] for side in (student, teacher)
            ]
            return sum(self.transfer(s, s, t, t, mask) / 3 for s, t in zip(*split, strict=True))

        def ours(student, teacher, mask):
            each = [
                relation_kl(s, t, mask, num_heads=relation_heads, reduction="none")
                for s, t in zip(student, teacher, strict=True)
            ]
            return sum(self.per_sequence(rows, mask) for rows in each) / 3

        check(dtype, official, ours, {"student": [(B, N, 24)] * 3}, {"teacher": [(B, N, 48)] * 3}, mask=MASK)

    @staticmethod
    def _heads():
        return dict(
            student=dict.fromkeys(("a_s", "b_s"), (B, H, N, 8)), teacher=dict.fromkeys(("a_t", "b_t"), (B, H, N, 16))
        )


class TestPkd:
    """nn.KLDivLoss("mean") divides by rows x classes, and the patience term by B (k - 1) H."""

    @pytest.mark.parametrize("alpha", [0.2, 0.7])
    def test_logits(self, dtype, alpha):
        temperature = 10

        def official(student_logits, teacher_logits, labels):
            log_p, q = (student_logits / temperature).log_softmax(-1), (teacher_logits / temperature).softmax(-1)
            soft = F.kl_div(log_p, q, reduction="none").mean() * temperature**2
            return alpha * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)

        ours = partial(kd_loss, temperature=temperature, alpha=alpha, reduction="mean")
        labels = torch.randint(C, (7,), generator=torch.Generator().manual_seed(0))
        check(dtype, official, ours, {"student_logits": (7, C)}, {"teacher_logits": (7, C)}, labels=labels)

    def test_patience(self, dtype):
        """[CLS] of k - 1 layers as [B, k - 1, H]. TextBrewer sums over H and over layers: (k - 1) H times this."""

        def official(student, teacher):
            return F.mse_loss(F.normalize(student, dim=-1), F.normalize(teacher, dim=-1))

        def by_layers(student, teacher):
            cls = [[x[:, i : i + 1] for i in range(x.shape[1])] for x in (student, teacher)]
            return hidden_mse(*cls, normalize="l2") / student.shape[1]

        shapes = {"student": (B, 5, 24)}, {"teacher": (B, 5, 24)}
        check(dtype, official, partial(hidden_mse, normalize="l2"), *shapes)
        check(dtype, official, by_layers, *shapes)


class TestDistilBert:
    """Everything over attended tokens; KL is a mean over them, times T^2."""

    def test_objective(self, dtype):
        """5 KL + 2 MLM + 1 cosine; one call serves the first two: 7 (5/7 KL + 2/7 MLM)."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.where(
            MASK & (torch.rand(B, N, generator=generator) < 0.3), torch.randint(C, (B, N), generator=generator), -100
        )
        kl, mlm, cosine, temperature = 5.0, 2.0, 1.0, 2.0

        def official(student_logits, teacher_logits, student, teacher, mask, labels):
            s, t = (x[mask] / temperature for x in (student_logits, teacher_logits))
            soft = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean") * temperature**2
            hard = F.cross_entropy(student_logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
            s, t = student[mask], teacher[mask]
            return kl * soft + mlm * hard + cosine * F.cosine_embedding_loss(s, t, torch.ones(len(s)))

        def ours(student_logits, teacher_logits, student, teacher, mask, labels):
            share = kl / (kl + mlm)
            both = kd_loss(
                student_logits, teacher_logits, temperature=temperature, mask=mask, labels=labels, alpha=share
            )
            return (kl + mlm) * both + cosine * hidden_cosine(student, teacher, mask)

        shapes = (
            {"student_logits": (B, N, C), "student": (B, N, 24)},
            {"teacher_logits": (B, N, C), "teacher": (B, N, 24)},
        )
        check(dtype, official, ours, *shapes, mask=MASK, labels=labels)


class TestMobileBert:
    """Means over padding too, each divided by the layers; weights 100, 1, 5000 and 5.

    The official code takes the mean and variance over all teacher layers at once, which is a slip: of the layer, here.
    """

    LAYERS = 3

    def test_feature_maps(self, dtype):
        def official(student, teacher):
            each = [
                F.mse_loss(*(F.layer_norm(x, x.shape[-1:], eps=1e-12) for x in pair))
                for pair in zip(student, teacher, strict=True)
            ]
            return 100 * sum(each) / self.LAYERS

        def ours(student, teacher):
            return 100 * hidden_mse(student, teacher, normalize="layer_norm") / self.LAYERS

        check(dtype, official, ours, {"student": [(B, N, 24)] * self.LAYERS}, {"teacher": [(B, N, 24)] * self.LAYERS})

    def test_mean_and_variance(self, dtype):
        def official(student, teacher):
            total = 0.0
            for s, t in zip(student, teacher, strict=True):
                mean_s, mean_t = s.mean(-1, keepdim=True), t.mean(-1, keepdim=True)
                variances = [(x - mean).square().mean(-1) for x, mean in ((s, mean_s), (t, mean_t))]
                total = total + 5000 * F.mse_loss(mean_s, mean_t) + 5 * F.l1_loss(*variances)
            return total / self.LAYERS

        def ours(student, teacher):
            return moment_mse(student, teacher, mean_weight=5000, variance_weight=5) / self.LAYERS

        check(dtype, official, ours, {"student": [(B, N, 24)] * self.LAYERS}, {"teacher": [(B, N, 24)] * self.LAYERS})

    def test_attention(self, dtype):
        """Cross-entropy of maps whose padded keys are -6, not minus infinity, so they keep a little probability."""
        check(dtype, self.attention, partial(kd_loss, kind="ce"), *self._maps())

    def test_attention_as_kl(self, dtype):
        """KL lacks the teacher's entropy, which has no gradient."""

        def ours(student_logits, teacher_logits):
            entropy = torch.special.entr(teacher_logits.float().softmax(-1)).sum(-1).mean()
            return attention_map_kl(student_logits, teacher_logits) + entropy

        check(dtype, self.attention, ours, *self._maps())

    def test_masked_language_model(self, dtype):
        """Half of the target one-hot, half the teacher's distribution, at the masked tokens."""
        labels = torch.where(MASK, 3, -100)

        def official(student_logits, teacher_logits, labels):
            chosen = labels != -100
            s, t, y = student_logits[chosen], teacher_logits[chosen], labels[chosen]
            target = 0.5 * F.one_hot(y, s.shape[-1]).to(s.dtype) + 0.5 * t.softmax(-1)
            return -(target * s.log_softmax(-1)).sum(-1).mean()

        def ours(student_logits, teacher_logits, labels):
            return kd_loss(student_logits, teacher_logits, kind="ce", mask=labels != -100, labels=labels, alpha=0.5)

        check(dtype, official, ours, {"student_logits": (B, N, C)}, {"teacher_logits": (B, N, C)}, labels=labels)

    @staticmethod
    def attention(student_logits, teacher_logits):
        return -(teacher_logits.softmax(-1) * student_logits.log_softmax(-1)).sum(-1).mean()

    @staticmethod
    def _maps():
        return {"student_logits": (B, H, N, N)}, {"teacher_logits": (B, H, N, N)}


class TestTorchtune:
    """Means over tokens whose label is not ignored, in float32, at T = 1. ForwardKLLoss is a cross-entropy."""

    @staticmethod
    def forward(student_logits, teacher_logits, labels):
        student, teacher = TestTorchtune.upcast(student_logits, teacher_logits)
        rows = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
        return rows[labels != -100].sum() / (labels != -100).sum()

    @staticmethod
    def reverse(student_logits, teacher_logits, labels):
        student, teacher = (x.log_softmax(-1) for x in TestTorchtune.upcast(student_logits, teacher_logits))
        rows = (student.exp() * (student - teacher)).sum(-1)
        return rows[labels != -100].sum() / (labels != -100).sum()

    @staticmethod
    def upcast(*logits):
        return (x.to(torch.promote_types(x.dtype, torch.float32)) for x in logits)

    @staticmethod
    def ours(kind, reduction="batchmean"):
        def loss(student_logits, teacher_logits, labels):
            return kd_loss(student_logits, teacher_logits, kind=kind, mask=labels != -100, reduction=reduction)

        return loss

    def check(self, dtype, official, ours):
        labels = torch.where(MASK, 1, -100)
        check(dtype, official, ours, {"student_logits": (B, N, C)}, {"teacher_logits": (B, N, C)}, labels=labels)

    def test_forward(self, dtype):
        self.check(dtype, self.forward, self.ours("ce"))

    def test_reverse(self, dtype):
        self.check(dtype, self.reverse, self.ours("reverse_kl"))

    @pytest.mark.parametrize("ratio", [0.5, 0.2])
    def test_symmetric(self, dtype, ratio):
        def mix(forward, reverse):
            return lambda **given: ratio * forward(**given) + (1 - ratio) * reverse(**given)

        ours = mix(self.ours("ce"), self.ours("reverse_kl"))
        self.check(dtype, mix(self.forward, self.reverse), ours)

    def test_chunked(self, dtype):
        """Chunks of tokens are summed and divided once, by all tokens that count: ours needs no chunks."""

        def official(student_logits, teacher_logits, labels):
            chunks = zip(*(x.chunk(4, dim=1) for x in (student_logits, teacher_logits, labels)), strict=True)
            sums = [self.forward(s, t, y) * (y != -100).sum() for s, t, y in chunks]
            return sum(sums) / (labels != -100).sum()

        self.check(dtype, official, self.ours("ce"))


class TestGkd:
    """TRL's generalised JSD: beta weighs the teacher in the mixture and in the sum; mean over labelled tokens."""

    @pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
    def test_jsd(self, dtype, beta):
        def official(student_logits, teacher_logits, labels):
            s, t = (x[labels != -100].log_softmax(-1) for x in (student_logits, teacher_logits))
            m = torch.logsumexp(torch.stack((s + math.log(1 - beta), t + math.log(beta))), 0)
            of_teacher, of_student = (F.kl_div(m, x, reduction="none", log_target=True) for x in (t, s))
            return (beta * of_teacher + (1 - beta) * of_student).sum() / (labels != -100).sum()

        def ours(student_logits, teacher_logits, labels):
            return kd_loss(student_logits, teacher_logits, kind="jsd", beta=beta, mask=labels != -100)

        labels = torch.where(MASK, 1, -100)
        check(dtype, official, ours, {"student_logits": (B, N, C)}, {"teacher_logits": (B, N, C)}, labels=labels)
