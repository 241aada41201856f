"""Rows of whole training steps: the losses of one step added up, timed only."""

from ..case import Case, Target
from ._common import case_of

# The lengths of SST-2's 6,920 training sentences in BERT's word pieces with [CLS] and [SEP], at the quantiles 1/32,
# 3/32 ... 31/32: mean 25. TinyBERT's script pads every batch to one length, by default 128.
SST2_LENGTHS = (8, 11, 13, 15, 18, 19, 21, 23, 25, 27, 29, 31, 34, 37, 41, 49)


def tinybert(name, why, *, batch, tokens, layers=4, heads=12, d_s=26, d_t=64, classes=2, **given) -> Case:
    shape = dict(batch=batch, tokens=tokens, layers=layers, heads=heads, d_s=d_s, d_t=d_t, classes=classes)
    return case_of("tinybert_step", name, why, shape, given)


CPU = [
    (
        tinybert("b16_n128_sst2", "TinyBERT4, BERT: 4 maps, 5 states, logits", batch=16, tokens=128, mask=SST2_LENGTHS),
        Target(eager=6, compile=2),
    ),
]

CUDA = [
    (
        tinybert("b64_n128_sst2_bf16", "as on the CPU, more sentences", batch=64, tokens=128, mask=4 * SST2_LENGTHS),
        Target(),
    ),
]
