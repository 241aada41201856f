"""Liger-Kernel's losses, where the package is installed. On logits its KLDiv and JSD take log-probabilities, so the
log-softmax is torch's. From hidden states its JSD has both heads fused, its KLDiv (releases after 0.8.2) the student's
alone: the teacher's probabilities are torch's."""

import importlib.util

import torch
import torch.nn.functional as F

from python_tests.case import Case


def peer(case: Case):
    """A function with the signature of `kdkernels.functional`, or None where Liger has no such loss or is not
    installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    function = _PEERS.get((case.op, case.options.get("kind", "kl")))
    if function is _linear_kl and importlib.util.find_spec("liger_kernel.transformers.fused_linear_kl_div") is None:
        return None
    return function


def _kl(student_logits, teacher_logits, *, temperature=1.0, kind="kl"):
    from liger_kernel.transformers import LigerKLDIVLoss

    student, teacher = (F.log_softmax(x / temperature, -1) for x in (student_logits, teacher_logits))
    return LigerKLDIVLoss(reduction="batchmean", log_target=True)(student, teacher) * temperature**2


def _jsd(student_logits, teacher_logits, *, temperature=1.0, beta=0.5, kind="jsd"):
    from liger_kernel.transformers import LigerJSD

    student, teacher = (F.log_softmax(x / temperature, -1) for x in (student_logits, teacher_logits))
    return LigerJSD(beta=beta)(student, teacher) * temperature**2


def _linear_kl(student_hidden, student_weight, teacher_hidden, teacher_weight, *, temperature=1.0, kind="kl"):
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    with torch.no_grad():
        target = F.softmax(F.linear(teacher_hidden, teacher_weight) / temperature, -1)
    return LigerFusedLinearKLDivLoss(temperature=temperature)(student_hidden, student_weight, target) * temperature**2


def _linear_jsd(
    student_hidden, student_weight, teacher_hidden, teacher_weight, *, temperature=1.0, beta=0.5, kind="jsd"
):
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=beta, temperature=temperature)
    return loss(student_hidden, student_weight, teacher_hidden, teacher_weight) * temperature**2


_PEERS = {
    ("kd_loss", "kl"): _kl,
    ("kd_loss", "jsd"): _jsd,
    ("linear_kd_loss", "kl"): _linear_kl,
    ("linear_kd_loss", "jsd"): _linear_jsd,
}
