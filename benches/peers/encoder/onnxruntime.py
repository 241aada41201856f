"""ONNX Runtime, dynamic int8 per channel, after its own optimiser for BERT where that knows the graph."""

import logging
from pathlib import Path

import torch

from .export import onnx


def int8(model, folder: Path):
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    path = folder / "onnxruntime_int8.onnx"
    if not path.is_file():
        logging.getLogger().setLevel(logging.ERROR)
        config = model.config
        fused = optimizer.optimize_model(
            str(onnx(model, folder)),
            model_type="bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
        )
        between = folder / "onnxruntime_fp32.onnx"
        fused.save_model_to_file(str(between), use_external_data_format=True)
        partial = folder / "partial_int8.onnx"
        quantize_dynamic(between, partial, per_channel=True, weight_type=QuantType.QInt8)
        partial.rename(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def encode(input_ids, attention_mask):
        given = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return torch.from_numpy(session.run(["last_hidden_state"], given)[0])

    return encode
