"""TinyBERT in its three stages (Jiao et al., arXiv 1909.10351; constants of the authors' code).

    general   un-tuned teacher, plain text:      sum_m MSE(scores_s^m, scores_t^g(m)) + sum_i MSE(W h_s^i + b, h_t^g(i))
    task      fine-tuned teacher, task text:     the same, constant learning rate
    predict   fine-tuned teacher, task text:     CE(softmax(t), log softmax(s)), T = 1, no hard labels

g(m) = m N / M. One Linear (`fit`) projects all M + 1 hidden states, the embeddings' included, as in the authors' code.
Two constants differ from it on purpose: padded queries do not count, and the soft cross-entropy is a mean over rows,
not over rows x classes (multiply `predict`'s learning rate or weight to compensate). Give each stage its teacher under
`stages`.
"""

from functools import partial

from transformers import PreTrainedConfig

from ..distill import Match, Recipe, Stage, fresh
from ..distill.errors import DistillError


def tinybert(
    teacher: PreTrainedConfig, *, layers=4, hidden_size=312, intermediate_size=1200, general=True, task=True
) -> Recipe:
    """general, task: false leaves that stage out. Teacher layers must be a multiple of `layers`, heads are the
    teacher's.
    """
    if teacher.num_hidden_layers % layers:
        raise DistillError(
            f"tinybert: the teacher's {teacher.num_hidden_layers} layers are not a multiple of layers {layers}"
        )
    step = teacher.num_hidden_layers // layers
    hidden = Match(
        "hidden_mse",
        tuple(f"hidden.{i}" for i in range(layers + 1)),
        tuple(f"hidden.{i * step}" for i in range(layers + 1)),
        projection="fit",
    )
    scores = Match(
        "attention_mse",
        tuple(f"qk.{m}" for m in range(layers)),
        tuple(f"qk.{(m + 1) * step - 1}" for m in range(layers)),
        options={"on": "scores"},
    )
    predict = Match("kd_loss", "logits", options={"kind": "ce", "temperature": 1.0})
    stages = [
        Stage("general", [scores, hidden], training={"learning_rate": 5e-5, "epochs": 3}),
        Stage(
            "task", [scores, hidden], training={"learning_rate": 5e-5, "epochs": 10, "lr_scheduler_type": "constant"}
        ),
        Stage("predict", [predict], training={"learning_rate": 3e-5, "epochs": 3}),
    ]
    return Recipe(
        name="tinybert",
        head=True,
        surgery=[
            partial(fresh, num_hidden_layers=layers, hidden_size=hidden_size, intermediate_size=intermediate_size)
        ],
        stages=[stage for stage, wanted in zip(stages, (general, task, True), strict=True) if wanted],
    )
