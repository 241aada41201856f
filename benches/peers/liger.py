"""Liger-Kernel's KLDiv and JSD on logits, where the package is installed: it takes log-probabilities, so the
log-softmax is torch's."""

import importlib.util

import torch.nn.functional as F

from python_tests.case import Case


def peer(case: Case):
    """A function with the signature of `kdkernels.functional`, or None where Liger has no such loss or is not
    installed."""
    if case.op != "kd_loss" or importlib.util.find_spec("liger_kernel") is None:
        return None
    return {"kl": _kl, "jsd": _jsd}.get(case.options.get("kind", "kl"))


def _kl(student_logits, teacher_logits, *, temperature=1.0, kind="kl"):
    from liger_kernel.transformers import LigerKLDIVLoss

    student, teacher = (F.log_softmax(x / temperature, -1) for x in (student_logits, teacher_logits))
    return LigerKLDIVLoss(reduction="batchmean", log_target=True)(student, teacher) * temperature**2


def _jsd(student_logits, teacher_logits, *, temperature=1.0, beta=0.5, kind="jsd"):
    from liger_kernel.transformers import LigerJSD

    student, teacher = (F.log_softmax(x / temperature, -1) for x in (student_logits, teacher_logits))
    return LigerJSD(beta=beta)(student, teacher) * temperature**2
