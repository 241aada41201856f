"""kdkernels as a quantisation method of transformers: `quantization_config` in config.json, and from_pretrained.

A checkpoint holds the packed weights as uint8 tensors, the rest as it was, and in its config the few settings that
`plan` needs to lay out the same modules again. A damaged or foreign file is an error and never a wrong model: packed
weights carry checksums, and the config a digest of all tensors, which counts where the model is loaded as it was saved.

Imported while transformers itself is being imported (see _register.py): what needs its models is imported when it runs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .scheme import Scheme

METHOD = "kdkernels"
FORMAT = 2  # 1 had position embeddings in float32, and word embeddings in 8 bits beside every scheme


@register_quantization_config(METHOD)
class KdkernelsConfig(QuantizationConfigMixin):
    """`quantization_config` of a config.json that save_pretrained wrote.

    Args:
        scheme: of the encoder's linears; the fields of a `Scheme`.
        bits_per_layer: {part of a module's name: fields of its Scheme}.
        skip: parts of names of modules that were left as they were.
        digest: SHA-256 over names, dtypes and bytes of all tensors.
        format: the version of these settings.
    """

    def __init__(self, scheme, bits_per_layer: Mapping = (), skip: Sequence[str] = (), digest="", format=FORMAT, **_):
        if format != FORMAT:
            raise ValueError(f"quantization_config has format {format!r}; this version of kdkernels reads {FORMAT}")
        self.quant_method = METHOD
        self.scheme, self.bits_per_layer, self.skip = scheme, dict(bits_per_layer), list(skip)
        self.digest, self.format = digest, format


@register_quantizer(METHOD)
class KdkernelsQuantizer(HfQuantizer):
    """Lays out empty quantised modules before the weights are read, checks what was read, attaches the encoder."""

    def _process_model_before_weight_loading(self, model, **_):
        from .quantize import lay_out, plan

        config = self.quantization_config
        own = {part: Scheme(**fields) for part, fields in config.bits_per_layer.items()}
        self._as_saved = type(model).__name__ in (model.config.architectures or ())
        lay_out(model, plan(model, Scheme(**config.scheme), own, config.skip))

    def _process_model_after_weight_loading(self, model, **_):
        from .encoder import attach_all
        from .modules import QuantEmbedding, QuantLinear

        for tensor in (*model.parameters(), *model.buffers()):
            if (
                tensor.device.type == "cpu"
            ):  # views of the mapped file, which would stay in memory beside what is laid out
                tensor.data = tensor.data.clone()
        expected, found = self.quantization_config.digest, digest(model)
        for name, module in model.named_modules():
            if isinstance(module, (QuantLinear, QuantEmbedding)):
                try:
                    module.weight  # noqa: B018  reads and checks it
                except ValueError as error:
                    raise ValueError(f"the checkpoint's {name}.packed is unusable: {error}") from None
        same_dtypes = expected.partition(":")[0] == found.partition(":")[0]
        if self._as_saved and same_dtypes and expected != found:
            raise ValueError("the checkpoint is damaged: its tensors do not have the digest that its config.json says")
        attach_all(model)
        return model

    def get_state_dict_and_metadata(self, model):
        model.config.quantization_config.digest = digest(model)  # config.json is written after this
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def mark(model, scheme: Scheme, own: Mapping[str, Scheme], skip: Sequence[str]) -> None:
    """Tells a quantised model of transformers that it is one, as from_pretrained would."""
    config = KdkernelsConfig(asdict(scheme), {part: asdict(chosen) for part, chosen in own.items()}, skip)
    model.hf_quantizer = KdkernelsQuantizer(config)
    model.is_quantized, model.quantization_method = True, METHOD
    model.config.quantization_config = config


def digest(model) -> str:
    """ "dtypes:SHA-256" of the tensors that a checkpoint holds."""
    sha, dtypes = hashlib.sha256(), set()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
    return f"{'+'.join(sorted(dtypes))}:{sha.hexdigest()}"
