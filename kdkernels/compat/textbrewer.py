"""TextBrewer's losses (arXiv 2002.12620) under its names, signatures and numbers, on the fused kernels.

    from kdkernels.compat import textbrewer as losses    # instead of: from textbrewer import losses
    losses.install()                                     # or: TextBrewer's own distillers use these from now on

The numbers are those of the package on PyPI (0.2.1.post1), its habits included: kd_ce_loss has no T^2; without a mask
the attention losses take every entry <= -0.001 for padding; their softmaxes run over padded keys too. What differs is
what no caller can want:

* No real token or no row: 0 with zero gradients, where TextBrewer divides 0 by 0.
* NaN and infinities in padded tokens, and -inf in padded scores, do not matter; TextBrewer multiplies them by 0.
* Counts are exact in every dtype. TextBrewer counts in the student's: in float16 sums past 65504 are inf, and the loss
  is silently 0.
* A hidden state of zeros has no direction and its unit vector is 0, where TextBrewer's pkd_loss is NaN.
* The loss is float32, not rounded to the inputs' dtype, and so is the arithmetic.
* No masked_select, so no host sync on a GPU, and all of it compiles.

`mask` is [batch, length], bool or 0 and 1. As everywhere in this package a teacher that requires grad is an error.
"""

import math

import torch
import torch.nn.functional as F

from .. import _checks
from ..functional import attention_map_mse, gram_mse, hidden_cosine, hidden_mse, kd_loss

# Scores at or below this are padding to TextBrewer where no mask says so. Its authors meant the -10000 of BERT's
# extended mask; every negative score is below it as well.
PADDING = -1e-3


def kd_mse_loss(logits_S, logits_T, temperature=1):
    """Mean over all entries of (logits_S / T - logits_T / T)^2.

    Args:
        logits_S, logits_T: [..., classes].
        temperature: a number, or a tensor with one per row, [...].
    """
    if isinstance(temperature, torch.Tensor) and temperature.dim():
        rows = temperature.unsqueeze(-1)
        return _mean_square(logits_S / rows, logits_T / rows)
    return _mean_square(logits_S, logits_T) / temperature**2


def kd_ce_loss(logits_S, logits_T, temperature=1):
    """Mean over rows of -sum_v softmax(logits_T / T) log_softmax(logits_S / T); no T^2.

    Args:
        logits_S, logits_T: [..., classes]. -inf is a class of probability 0.
        temperature: a number, or a tensor with one per row, [...].
    """
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.expand(logits_S.shape[:-1])
    return kd_loss(logits_S, logits_T, kind="ce", temperature=temperature, scale_t2=False)


def att_mse_loss(attention_S, attention_T, mask=None):
    """Mean squared difference of two attention maps, over real queries and keys.

    Without a mask entries <= -0.001 become 0 in each map, real negative scores too, and have no gradient: to compare
    raw scores give the mask, or use `kdkernels.functional.attention_map_mse`.

    Args:
        attention_S, attention_T: [batch, heads, length, length].
        mask: [batch, length].
    """
    if mask is None:
        return _mean_square(_without_padding(attention_S), _without_padding(attention_T))
    return attention_map_mse(attention_S, attention_T, mask)


def att_mse_sum_loss(attention_S, attention_T, mask=None):
    """As att_mse_loss of maps that are summed over heads.

    Args:
        attention_S, attention_T: [batch, heads, length, length], or [batch, length, length] as they are.
        mask: [batch, length].
    """
    attention_S, attention_T = _with_heads(attention_S, attention_T)
    if mask is None:
        return _mean_square(_without_padding(attention_S.sum(1)), _without_padding(attention_T.sum(1)))
    return attention_map_mse(attention_S, attention_T, mask, head_reduction="sum")


def att_ce_loss(attention_S, attention_T, mask=None):
    """Cross-entropy of attention maps, mean over real (batch, head, query): -sum_j p_T log p_S over real keys j.

    The softmaxes run over all keys, so that scores whose padding the model has not lowered give part of their
    probability to it. Without a mask, keys whose teacher score is <= -0.001 are left out of the sum, real ones too;
    `kdkernels.functional.attention_map_kl` leaves padding out before the softmax.

    Args:
        attention_S, attention_T: scores before the softmax, [batch, heads, length, length].
        mask: [batch, length].
    """
    if mask is None:
        return _cross_entropy(attention_S, attention_T, attention_T > PADDING)
    real = _checks.mask(mask, attention_S.shape[::2], attention_S, "[batch, length]")
    return _cross_entropy(attention_S, attention_T, real[:, None, None, :], real[:, None, :])


def att_ce_mean_loss(attention_S, attention_T, mask=None):
    """As att_ce_loss of scores that are averaged over heads.

    Args:
        attention_S, attention_T: scores, [batch, heads, length, length], or [batch, length, length] as they are.
        mask: [batch, length].
    """
    attention_S, attention_T = (x.mean(1, keepdim=True) for x in _with_heads(attention_S, attention_T))
    return att_ce_loss(attention_S, attention_T, mask)


def hid_mse_loss(state_S, state_T, mask=None):
    """Mean squared error over real tokens x hidden size.

    Args:
        state_S, state_T: [batch, length, hidden].
        mask: [batch, length].
    """
    return _mean_square(state_S, state_T) if mask is None else hidden_mse(state_S, state_T, mask)


def cos_loss(state_S, state_T, mask=None):
    """Mean of 1 - cos over real tokens (DistilBERT).

    Args:
        state_S, state_T: [batch, length, hidden].
        mask: [batch, length].
    """
    return hidden_cosine(_rows(state_S), _rows(state_T)) if mask is None else hidden_cosine(state_S, state_T, mask)


def pkd_loss(state_S, state_T, mask=None):
    """Mean over the batch of |s / |s| - t / |t||^2 at position 0 (PKD), summed over the hidden size.

    Args:
        state_S, state_T: [batch, length, hidden] or [batch, hidden].
        mask: not used.
    """
    first_S, first_T = (x[:, 0] if x.dim() == 3 else x for x in (state_S, state_T))
    return hidden_mse(_rows(first_S), _rows(first_T), normalize="l2") * first_S.shape[-1]


def fsp_loss(state_S, state_T, mask=None):
    """Mean over batch x hidden x hidden of (S_0^T S_1 / length - T_0^T T_1 / length)^2, length = real tokens.

    Sequences without a real token are left out of the mean.

    Args:
        state_S, state_T: two states each, [batch, length, hidden].
        mask: [batch, length].
    """
    return gram_mse(*state_S, *state_T, mask, over="hidden")


def mmd_loss(state_S, state_T, mask=None):
    """Mean over pairs of real tokens of (S_0 S_1^T / d_S - T_0 T_1^T / d_T)^2, d the hidden sizes.

    With a mask the package on PyPI divides by the padded length instead of d_S and d_T, which its repository has
    corrected since. That number is kept here; the corrected one is `kdkernels.functional.gram_mse(..., over="token")`.

    Args:
        state_S, state_T: two states each, [batch, length, hidden]; student and teacher may differ in hidden size.
        mask: [batch, length].
    """
    (s0, s1), (t0, t1) = state_S, state_T
    if mask is None:
        return gram_mse(s0, s1, t0, t1, over="token")
    length, d_s, d_t = s0.shape[1], s0.shape[2], t0.shape[2]
    if d_s != d_t:  # gram_mse divides each side by its own size: the teacher is scaled to the student's
        t0 = t0.to(torch.promote_types(t0.dtype, torch.float32)) * (d_t / d_s)
    return gram_mse(s0, s1, t0, t1, mask, over="token") * (d_s / max(length, 1)) ** 2


KD_LOSS_MAP = {"mse": kd_mse_loss, "ce": kd_ce_loss}
MATCH_LOSS_MAP = {
    "attention_mse_sum": att_mse_sum_loss,
    "attention_mse": att_mse_loss,
    "attention_ce_mean": att_ce_mean_loss,
    "attention_ce": att_ce_loss,
    "hidden_mse": hid_mse_loss,
    "cos": cos_loss,
    "pkd": pkd_loss,
    "gram": fsp_loss,
    "fsp": fsp_loss,
    "mmd": mmd_loss,
    "nst": mmd_loss,
}


def install() -> None:
    """Registers these losses with TextBrewer, under its own keys and by its own `register_new`.

    Distillers that are made afterwards use them for `kd_loss_type` and `intermediate_matches`. Needs textbrewer.
    """
    from textbrewer import register_new

    for kind, losses in (("kd_loss", KD_LOSS_MAP), ("match_Loss", MATCH_LOSS_MAP)):
        for name, loss in losses.items():
            register_new(kind, name, loss)


def _rows(x):
    """[..., D] as [1, rows, D]."""
    return x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])


def _mean_square(student, teacher):
    """Over all entries of tensors of any shape."""
    return hidden_mse(_rows(student), _rows(teacher))


def _without_padding(scores):
    return F.threshold(scores, PADDING, 0.0)


def _with_heads(*maps):
    return (x if x.dim() == 4 else x.unsqueeze(1) for x in maps)


def _cross_entropy(student, teacher, keys, rows=None):
    """-sum of p_T log p_S over `keys`, with softmaxes over all keys, mean over `rows` (None: all).

    With q the teacher's distribution over `keys` alone and m its mass there, this is m times the cross-entropy of q and
    p_S; and the KL of q from p_T is -log m.
    """
    lead = student.shape[:-1]
    kept = teacher.masked_fill(~keys, -torch.inf)
    counted = keys.any(-1).expand(lead) if rows is None else rows.expand(lead)
    given = {"mask": counted, "scale_t2": False, "reduction": "none"}
    mass = torch.exp(-kd_loss(teacher, kept, kind="kl", **given))
    total = (mass * kd_loss(student, kept, kind="ce", **given)).sum()
    return total / (math.prod(lead) if rows is None else counted.sum().clamp_min(1))
