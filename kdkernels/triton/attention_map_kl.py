"""attention_map_kl on CUDA; the rows are in _attention_map.py. 16 bytes a row are kept for backward."""

from . import _attention_map
from ._common import register


def attention_map_kl(student, teacher, mask, temperature, head_reduction, reduction):
    return _attention_map.forward(student, teacher, mask, head_reduction, temperature, True, reduction)


def attention_map_kl_backward(grad, student, teacher, mask, stats, temperature, head_reduction, reduction):
    return _attention_map.backward(grad, student, teacher, mask, head_reduction, stats, temperature, True, reduction)


register("attention_map_kl", attention_map_kl)
register("attention_map_kl_backward", attention_map_kl_backward)
