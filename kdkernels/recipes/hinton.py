"""Knowledge distillation from logits (Hinton et al., arXiv 1503.02531).

    alpha T^2 KL(softmax(t/T) || softmax(s/T)) + (1 - alpha) CE(s, y)

in one kernel. The student is every other layer of the teacher unless `layers` says otherwise; alpha = 1 needs no
labels.
"""

from functools import partial

from transformers import PreTrainedConfig

from ..distill import Match, Recipe, Stage, take_layers


def hinton(teacher: PreTrainedConfig, *, layers=None, temperature=4.0, alpha=0.5) -> Recipe:
    """layers: how many of the teacher's layers, or which. temperature, alpha: numbers or schedules."""
    layers = max(teacher.num_hidden_layers // 2, 1) if layers is None else layers
    options = {"temperature": temperature} | ({"labels": True, "alpha": alpha} if alpha != 1 else {})
    return Recipe(
        name="hinton",
        head=True,
        surgery=[partial(take_layers, layers=layers)],
        stages=[
            Stage(
                "logits", [Match("kd_loss", "logits", options=options)], training={"learning_rate": 5e-5, "epochs": 3}
            )
        ],
    )
