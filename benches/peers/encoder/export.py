"""The model as an ONNX file with a free batch and length, which ONNX Runtime and OpenVINO start from."""

import logging
import warnings
from pathlib import Path

import torch
from torch import nn


class _LastHidden(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def onnx(model: nn.Module, folder: Path) -> Path:
    """Path of the file; its weights lie beside it. Made where it is not there yet."""
    import onnxscript  # noqa: F401  torch's exporter needs it and says so less clearly

    path = folder / "model.onnx"
    if not path.is_file():
        ids = torch.randint(1000, 2000, (2, 16))
        free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
        partial = folder / "partial"
        partial.mkdir(exist_ok=True)
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _LastHidden(model),
                (ids, torch.ones_like(ids)),
                partial / path.name,
                dynamo=True,
                external_data=True,
                verbose=False,
                input_names=["input_ids", "attention_mask"],
                output_names=["last_hidden_state"],
                dynamic_shapes={"input_ids": free, "attention_mask": free},
            )
        for file in sorted(partial.iterdir(), key=lambda file: file.name == path.name):
            file.rename(folder / file.name)
        partial.rmdir()
    return path
