"""OpenVINO: int8 by NNCF (static, its preset for transformers, calibrated on random tokens), and bfloat16."""

from pathlib import Path

import torch

from .export import onnx

CALIBRATION, LENGTH = 20, 64


def _compile(model, **properties):
    import numpy
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(model, "CPU", settings | properties)
    requests = {}  # one per shape: a request keeps its buffers

    def encode(input_ids, attention_mask):
        request = requests.setdefault(input_ids.shape, None) or compiled.create_infer_request()
        requests[input_ids.shape] = request
        given = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        found = request.infer(given, share_inputs=True, share_outputs=True)
        return torch.from_numpy(numpy.asarray(found[0]))

    return encode


def bfloat16(model, folder: Path):
    import openvino

    return _compile(openvino.Core().read_model(onnx(model, folder)), INFERENCE_PRECISION_HINT="bf16")


def int8(model, folder: Path):
    import nncf
    import openvino

    path = folder / "openvino_int8.xml"
    if not path.is_file():
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, model.config.vocab_size, (CALIBRATION, 1, LENGTH), generator=generator).numpy()
        examples = [{"input_ids": row, "attention_mask": row * 0 + 1} for row in ids]
        quantised = nncf.quantize(
            openvino.Core().read_model(onnx(model, folder)),
            nncf.Dataset(examples),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=CALIBRATION,
        )
        partial = folder / "partial_int8.xml"
        openvino.save_model(quantised, partial, compress_to_fp16=False)
        partial.with_suffix(".bin").rename(path.with_suffix(".bin"))
        partial.rename(path)
    return _compile(openvino.Core().read_model(path))
