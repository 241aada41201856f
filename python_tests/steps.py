"""All losses of one training step of a published system, written once for any library of losses.

`STEPS[name](losses)` is a function of tensors by name, as the losses themselves are; `losses` is any module that has
the losses of `kdkernels.functional` under their names: that package, the reference, or the eager peer. Benches time
steps as one more row of the table, since what a user waits for is the sum.
"""


def tinybert_step(losses):
    """TinyBERT (arXiv 1909.10351): scores of every student layer, every hidden state through one projection, and soft
    cross-entropy of the logits over rows x classes at T = 1, as its script reduces it.

    q_s, k_s, q_t, k_t are lists of a layer each, student and teacher of a hidden state each.
    """

    def step(q_s, k_s, q_t, k_t, student, teacher, weight, bias, student_logits, teacher_logits, mask=None):
        scores = sum(losses.attention_mse(*layer, mask, on="scores") for layer in zip(q_s, k_s, q_t, k_t, strict=True))
        hidden = losses.hidden_mse(student, teacher, mask, weight=weight, bias=bias)
        prediction = losses.kd_loss(student_logits, teacher_logits, kind="ce", scale_t2=False, reduction="mean")
        return scores + hidden + prediction

    return step


STEPS = {"tinybert_step": tinybert_step}


def loss_of(library, name: str):
    """The function `name` of a library of losses, be it one loss or the sum of a step's."""
    return STEPS[name](library) if name in STEPS else getattr(library, name)
