"""MiniLMv2: self-attention relations of one layer (Wang et al., arXiv 2012.15828).

    sum over a in (q, k, v) of KL(softmax(R_t) || softmax(R_s)),   R = a a^T / sqrt(d_r), heads re-split into relation
    heads

The paper distils the last layer of base teachers and layer 21 of 24 of BERT-large (`teacher_layer: 20`, counted from
0), with 48 or 64 relation heads. Student and teacher may differ in width and in head count; `relation_heads` divides
both widths.
"""

from functools import partial

from transformers import PreTrainedConfig

from ..distill import Match, Recipe, Stage, take_layers


def minilm(teacher: PreTrainedConfig, *, layers=None, relation_heads=None, teacher_layer=-1) -> Recipe:
    """layers: as in hinton. relation_heads: default 48 where it divides the width (as the paper), else the teacher's
    own heads.
    """
    layers = max(teacher.num_hidden_layers // 2, 1) if layers is None else layers
    heads = relation_heads or (48 if teacher.hidden_size % 48 == 0 else teacher.num_attention_heads)
    relations = Match("relation_kl", "qkv.-1", f"qkv.{teacher_layer}", options={"num_heads": heads})
    return Recipe(
        name="minilm",
        surgery=[partial(take_layers, layers=layers)],
        stages=[
            Stage(
                "relations", [relations], training={"learning_rate": 6e-4, "weight_decay": 0.01, "adam_epsilon": 1e-6}
            )
        ],
    )
