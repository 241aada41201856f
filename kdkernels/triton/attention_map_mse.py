"""attention_map_mse on CUDA; the rows are in _attention_map.py. Nothing is kept for backward."""

from . import _attention_map
from ._common import register


def attention_map_mse(student, teacher, mask, head_reduction):
    return _attention_map.forward(student, teacher, mask, head_reduction)[0]


def attention_map_mse_backward(grad, student, teacher, mask, head_reduction):
    return _attention_map.backward(grad, student, teacher, mask, head_reduction)


register("attention_map_mse", attention_map_mse)
register("attention_map_mse_backward", attention_map_mse_backward)
