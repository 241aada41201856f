"""The losses as practitioners write them in plain PyTorch: the eager peer, what torch.compile gets, and the yardstick
of accuracy.

Natural code with the functions of torch.nn.functional, full padded N x N maps and masks multiplied in, as in
TextBrewer, TinyBERT's and MiniLM's scripts; in the dtype of its inputs. Nothing is made slow on purpose: where two
ways of writing a loss are common, both stand here and the benches take the faster. Signatures are those of
`kdkernels.functional`.
"""

import sys

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from python_tests import steps

# What BERT-era code adds to the scores of padding: large for a softmax, and finite, so that 0 * log 0 stays 0.
PADDING = -1e4


def kd_loss(
    student_logits,
    teacher_logits,
    *,
    kind="kl",
    temperature=1.0,
    scale_t2=True,
    beta=0.5,
    mask=None,
    labels=None,
    alpha=1.0,
    ignore_index=-100,
    reduction="batchmean",
    log_target=True,
):
    """Log-softmax of both, then the formula; `log_target` says in which of two common ways the KL meets the teacher."""
    per_row = torch.is_tensor(temperature)
    divisor = temperature.unsqueeze(-1).to(student_logits.dtype) if per_row else temperature
    student, teacher = student_logits / divisor, teacher_logits / divisor
    soft_rows = _divergence(student, teacher, kind, beta, log_target)
    if scale_t2:
        soft_rows = soft_rows * temperature**2
    return _with_labels(soft_rows, student_logits, mask, labels, alpha, ignore_index, reduction)


def kd_loss_softmax_target(student_logits, teacher_logits, **options):
    """As the documentation of nn.KLDivLoss has it: the teacher as probabilities."""
    return kd_loss(student_logits, teacher_logits, **options, log_target=False)


def linear_kd_loss(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    *,
    student_bias=None,
    teacher_bias=None,
    **options,
):
    """Both heads, whole logits, and the loss on them; nothing of the teacher is kept for backward."""
    with torch.no_grad():
        teacher_logits = F.linear(teacher_hidden, teacher_weight, teacher_bias)
    return kd_loss(F.linear(student_hidden, student_weight, student_bias), teacher_logits, **options)


def linear_kd_loss_softmax_target(*tensors, **options):
    return linear_kd_loss(*tensors, **options, log_target=False)


def topk_kd_loss(
    student_logits,
    teacher_values,
    teacher_indices,
    *,
    tail="renormalize",
    kind="kl",
    temperature=1.0,
    scale_t2=True,
    beta=0.5,
    mask=None,
    labels=None,
    alpha=1.0,
    ignore_index=-100,
    reduction="batchmean",
):
    """As axolotl and NeMo-RL have it: the K log-probabilities gathered from the whole log-softmax; a rest, where one is
    needed, is what the K probabilities leave of 1."""
    divisor = temperature.unsqueeze(-1).to(student_logits.dtype) if torch.is_tensor(temperature) else temperature
    indices = teacher_indices.long()
    log_s = F.log_softmax(student_logits / divisor, -1).gather(-1, indices)
    log_t = F.log_softmax(teacher_values / divisor, -1) if tail == "renormalize" else teacher_values
    p_s, p_t = log_s.exp(), log_t.exp()
    if indices.shape[-1] < student_logits.shape[-1] and (tail == "bucket" or kind not in ("kl", "ce")):
        p_s = torch.cat([p_s, 1 - p_s.sum(-1, keepdim=True)], -1)
        p_t = torch.cat(
            [p_t, torch.zeros_like(p_t[..., :1]) if tail == "renormalize" else 1 - p_t.sum(-1, keepdim=True)], -1
        )
        log_s, log_t = (torch.cat([log, p[..., -1:].log()], -1) for log, p in ((log_s, p_s), (log_t, p_t)))
    if kind == "kl":
        rows = (p_t * (log_t - log_s)).sum(-1)
    elif kind == "ce":
        rows = -(p_t * log_s).sum(-1)
    elif kind == "reverse_kl":
        rows = (p_s * (log_s - log_t)).sum(-1)
    elif kind == "tv":
        rows = 0.5 * (p_s - p_t).abs().sum(-1)
    else:
        log_m = (beta * p_t + (1 - beta) * p_s).log()
        rows = (
            beta * F.kl_div(log_m, p_t, reduction="none") + (1 - beta) * F.kl_div(log_m, p_s, reduction="none")
        ).sum(-1)
    if scale_t2:
        rows = rows * temperature**2
    return _with_labels(rows, student_logits, mask, labels, alpha, ignore_index, reduction)


def attention_kl(
    q_s,
    k_s,
    q_t,
    k_t,
    mask=None,
    *,
    kind="kl",
    temperature=1.0,
    scale_s=None,
    scale_t=None,
    head_reduction=None,
    head_map=None,
    causal=False,
    bias_s=None,
    bias_t=None,
    lse_s=None,
    lse_t=None,
    cu_seqlens=None,
    max_seqlen=None,
    reduction="batchmean",
    log_target=True,
):
    """A log-sum-exp that is given is of no use to F.log_softmax."""
    total = q_s.shape[0]
    if cu_seqlens is not None:
        (q_s, k_s, q_t, k_t), mask = _padded(cu_seqlens, q_s, k_s, q_t, k_t)
    options = {"causal": causal, "head_reduction": head_reduction}
    student = _scores(q_s, k_s, scale_s, mask, temperature, bias=bias_s, **options)
    teacher = _scores(q_t, k_t, scale_t, mask, temperature, bias=bias_t, **options)
    if head_map is not None:
        teacher = teacher[:, head_map]
    rows = _divergence(student, teacher, kind, 0.5, log_target)
    loss = _reduce(rows, None if mask is None else mask[:, None, :].expand(rows.shape), reduction)
    if reduction != "none":
        return loss
    if cu_seqlens is not None:
        loss = loss.movedim(1, -1)[mask]
        loss = F.pad(loss, (0, 0, 0, total - loss.shape[0]))
    return loss if head_reduction is None else loss.squeeze(1)


def attention_kl_softmax_target(*tensors, **options):
    return attention_kl(*tensors, **options, log_target=False)


def attention_mse(
    q_s, k_s, q_t, k_t, mask=None, *, on="scores", scale_s=None, scale_t=None, cu_seqlens=None, max_seqlen=None
):
    if cu_seqlens is not None:
        (q_s, k_s, q_t, k_t), mask = _padded(cu_seqlens, q_s, k_s, q_t, k_t)
    student, teacher = _scores(q_s, k_s, scale_s, mask), _scores(q_t, k_t, scale_t, mask)
    if on == "probs":
        student, teacher = student.softmax(-1), teacher.softmax(-1)
    if mask is None:
        return F.mse_loss(student, teacher)
    real = (mask[:, None, :, None] & mask[:, None, None, :]).to(student.dtype)
    count = mask.sum(-1).square().sum() * student.shape[1]
    return (F.mse_loss(student, teacher, reduction="none") * real).sum() / count


def attention_map_mse(student_scores, teacher_scores, mask=None, *, head_reduction=None):
    student, teacher = (_reduce_heads(x, head_reduction) for x in (student_scores, teacher_scores))
    if mask is None:
        return F.mse_loss(student, teacher)
    real = (mask[:, None, :, None] & mask[:, None, None, :]).to(student.dtype)
    count = mask.sum(-1).square().sum() * student.shape[1]
    return (F.mse_loss(student, teacher, reduction="none") * real).sum() / count


def attention_map_kl(
    student_scores,
    teacher_scores,
    mask=None,
    *,
    temperature=1.0,
    head_reduction=None,
    reduction="batchmean",
    log_target=True,
):
    student, teacher = (
        _mask_keys(_reduce_heads(x, head_reduction) / temperature, mask) for x in (student_scores, teacher_scores)
    )
    rows = _divergence(student, teacher, "kl", 0.5, log_target)
    if head_reduction is not None:
        return _reduce(rows.squeeze(1), mask, reduction)
    return _reduce(rows, None if mask is None else mask[:, None, :].expand(rows.shape), reduction)


def attention_map_kl_softmax_target(*tensors, **options):
    return attention_map_kl(*tensors, **options, log_target=False)


def relation_kl(student, teacher, mask=None, *, num_heads, **options):
    s, t = _split_heads(student, num_heads), _split_heads(teacher, num_heads)
    return attention_kl(s, s, t, t, mask, **options)


def relation_kl_softmax_target(*tensors, **options):
    return relation_kl(*tensors, **options, log_target=False)


def hidden_mse(student, teacher, mask=None, *, weight=None, bias=None, normalize=None):
    students, teachers = ([x] if torch.is_tensor(x) else x for x in (student, teacher))
    weights, biases = (x if isinstance(x, list) else [x] * len(students) for x in (weight, bias))
    total = 0.0
    for s, t, w, b in zip(students, teachers, weights, biases, strict=True):
        if w is not None:
            s = F.linear(s, w, b)
        if normalize == "l2":
            s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
        elif normalize == "layer_norm":
            s, t = F.layer_norm(s, s.shape[-1:], eps=1e-12), F.layer_norm(t, t.shape[-1:], eps=1e-12)
        if mask is None:
            total = total + F.mse_loss(s, t)
        else:
            squares = F.mse_loss(s, t, reduction="none") * mask.unsqueeze(-1)
            total = total + squares.sum() / (mask.sum() * t.shape[-1])
    return total


def tinybert_step(**tensors):
    return steps.tinybert_step(sys.modules[__name__])(**tensors)


def hidden_cosine(student, teacher, mask=None):
    """The mean of 1 - cosine_similarity; with a mask multiplied in, as the other losses."""
    total = 0.0
    for s, t in _pairs(student, teacher):
        rows = 1 - F.cosine_similarity(s, t, dim=-1)
        total = total + _reduce(rows, mask, "batchmean")
    return total


def hidden_cosine_embedding_loss(student, teacher, mask=None):
    """As DistilBERT's script and TextBrewer have it: real rows picked out, then the embedding loss against ones."""
    total = 0.0
    for s, t in _pairs(student, teacher):
        if mask is None:
            s, t = s.flatten(0, 1), t.flatten(0, 1)
        else:
            rows = mask.unsqueeze(-1).expand_as(s)
            s, t = (x.masked_select(rows).view(-1, x.shape[-1]) for x in (s, t))
        total = total + F.cosine_embedding_loss(s, t, s.new_ones(s.shape[0]))
    return total


def moment_mse(student, teacher, mask=None, *, mean_weight=1.0, variance_weight=1.0, variance="absolute"):
    """Mean and mean square around it, as MobileBERT's code computes them."""
    return _moment_mse(student, teacher, mask, mean_weight, variance_weight, variance, _moments)


def moment_mse_var_mean(student, teacher, mask=None, *, mean_weight=1.0, variance_weight=1.0, variance="absolute"):
    return _moment_mse(student, teacher, mask, mean_weight, variance_weight, variance, _var_mean)


def gram_mse(s0, s1, t0, t1, mask=None, *, over="hidden"):
    """TextBrewer's fsp and mmd: whole Gram matrices, then their mean squared difference."""
    s1, t1 = s0 if s1 is None else s1, t0 if t1 is None else t1
    if over == "token":
        student, teacher = s0 @ s1.mT / s0.shape[2], t0 @ t1.mT / t0.shape[2]
        if mask is None:
            return F.mse_loss(student, teacher)
        real = (mask[:, :, None] & mask[:, None, :]).to(student.dtype)
        return (F.mse_loss(student, teacher, reduction="none") * real).sum() / mask.sum(-1).square().sum()
    if mask is None:
        return F.mse_loss(s0.mT @ s1 / s0.shape[1], t0.mT @ t1 / t0.shape[1])
    count = mask.sum(-1)[:, None, None]
    student, teacher = (a.mT @ (b * mask.unsqueeze(-1)) / count.clamp_min(1) for a, b in ((s0, s1), (t0, t1)))
    return F.mse_loss(student, teacher, reduction="sum") / ((count > 0).sum() * student[0].numel())


VARIANTS = {
    "kd_loss": (kd_loss, kd_loss_softmax_target),
    "linear_kd_loss": (linear_kd_loss, linear_kd_loss_softmax_target),
    "topk_kd_loss": (topk_kd_loss,),
    "attention_kl": (attention_kl, attention_kl_softmax_target),
    "attention_mse": (attention_mse,),
    "attention_map_mse": (attention_map_mse,),
    "attention_map_kl": (attention_map_kl, attention_map_kl_softmax_target),
    "relation_kl": (relation_kl, relation_kl_softmax_target),
    "hidden_mse": (hidden_mse,),
    "hidden_cosine": (hidden_cosine, hidden_cosine_embedding_loss),
    "moment_mse": (moment_mse, moment_mse_var_mean),
    "gram_mse": (gram_mse,),
    "tinybert_step": (tinybert_step,),
}


def _with_labels(soft_rows, student_logits, mask, labels, alpha, ignore_index, reduction):
    soft = _reduce(soft_rows, mask, reduction, student_logits.shape[-1])
    if labels is None:
        return soft
    if mask is not None:
        labels = labels.masked_fill(~mask, ignore_index)
    hard = F.cross_entropy(
        student_logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=ignore_index,
        reduction="mean" if reduction in ("mean", "batchmean") else reduction,
    )
    return alpha * soft + (1 - alpha) * (hard.view(labels.shape) if reduction == "none" else hard)


def _pairs(student, teacher):
    return [(student, teacher)] if torch.is_tensor(student) else zip(student, teacher, strict=True)


def _moment_mse(student, teacher, mask, mean_weight, variance_weight, variance, moments):
    total = 0.0
    for s, t in _pairs(student, teacher):
        (mean_s, var_s), (mean_t, var_t) = moments(s), moments(t)
        spread = (var_s - var_t).abs() if variance == "absolute" else (var_s - var_t) ** 2
        total = total + _reduce(mean_weight * (mean_s - mean_t) ** 2 + variance_weight * spread, mask, "batchmean")
    return total


def _moments(x):
    mean = x.mean(-1, keepdim=True)
    return mean.squeeze(-1), (x - mean).square().mean(-1)


def _var_mean(x):
    variance, mean = torch.var_mean(x, -1, correction=0)
    return mean, variance


def _divergence(student, teacher, kind, beta, log_target):
    """One value per row from logits that are already divided by the temperature."""
    log_s = F.log_softmax(student, -1)
    if kind == "ce":
        return -(F.softmax(teacher, -1) * log_s).sum(-1)
    if kind == "kl" and not log_target:
        return F.kl_div(log_s, F.softmax(teacher, -1), reduction="none").sum(-1)
    log_t = F.log_softmax(teacher, -1)
    if kind == "kl":
        return F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
    if kind == "reverse_kl":
        return F.kl_div(log_t, log_s, log_target=True, reduction="none").sum(-1)
    p_s, p_t = log_s.exp(), log_t.exp()
    if kind == "tv":
        return 0.5 * (p_s - p_t).abs().sum(-1)
    log_m = (beta * p_t + (1 - beta) * p_s).log()
    to_mixture = [F.kl_div(log_m, log_p, log_target=True, reduction="none").sum(-1) for log_p in (log_t, log_s)]
    return beta * to_mixture[0] + (1 - beta) * to_mixture[1]


def _scores(q, k, scale, mask, temperature=1.0, *, bias=None, causal=False, head_reduction=None):
    """[B, H, N, N]; padding keys get a large negative score, as transformers' extended attention mask did it."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2) * (scale / temperature)
    if bias is not None:
        scores = scores + bias[..., : q.shape[2], : q.shape[2]].to(scores.dtype) / temperature
    scores = _reduce_heads(scores, head_reduction)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), PADDING)
    return _mask_keys(scores, mask)


def _mask_keys(scores, mask):
    return scores if mask is None else scores.masked_fill(~mask[:, None, None, :], PADDING)


def _reduce_heads(scores, head_reduction):
    if head_reduction is None:
        return scores
    return scores.sum(1, keepdim=True) if head_reduction == "sum" else scores.mean(1, keepdim=True)


def _padded(cu_seqlens, *packed):
    """Packed tensors [tokens, H, d] padded to [B, H, N, d], and their mask; tokens behind the last sequence go."""
    lengths = cu_seqlens.diff().tolist()
    padded = [pad_sequence(x[: sum(lengths)].split(lengths), batch_first=True).transpose(1, 2) for x in packed]
    return padded, torch.arange(max(lengths), device=cu_seqlens.device) < cu_seqlens.diff()[:, None]


def _split_heads(x, num_heads):
    """[..., N, W] -> [B, num_heads, N, d], packed [tokens, num_heads, d]."""
    heads = x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)
    return heads.transpose(1, 2) if x.dim() == 3 else heads


def _reduce(rows, mask, reduction, classes=1):
    if mask is not None:
        rows = rows * mask
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / ((rows.numel() if mask is None else mask.sum()) * (classes if reduction == "mean" else 1))
