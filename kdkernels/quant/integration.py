"""kdkernels as a quantisation method of transformers: `quantization_config` in config.json, and from_pretrained.

A checkpoint holds the packed weights as uint8 tensors, the rest as it was, and in its config the few settings that
`plan` needs to lay out the same modules again. A damaged or foreign file is an error and never a wrong model, whatever
class and dtype it is loaded as: config.json has a digest of all tensors in the files, names included, and a second time
what decides the result and no tensor's shape tells; every packed weight has a checksum of its own, for those who take
tensors out of the files by themselves.

Imported while transformers itself is being imported (see _register.py): what needs its models is imported when it runs.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .scheme import Scheme

METHOD = "kdkernels"
# 1 had position embeddings in float32, and word embeddings in 8 bits beside every scheme; 2 had vocabulary heads twice;
# 3 had scales and biases in float32.
FORMAT = 4
# Of those that a model's config has, what decides what it computes while its tensors stay as they are.
DECISIVE = (
    "model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act", "hidden_activation",
    "activation", "layer_norm_eps", "norm_eps", "pad_token_id", "is_decoder", "num_hidden_groups", "inner_group_num",
    "local_attention", "global_attn_every_n_layers",
)  # fmt: skip


@register_quantization_config(METHOD)
class KdkernelsConfig(QuantizationConfigMixin):
    """`quantization_config` of a config.json that save_pretrained wrote.

    Args:
        scheme: of the encoder's linears; the fields of a `Scheme`.
        bits_per_layer: {part of a module's name: fields of its Scheme}.
        skip: parts of names of modules that were left as they were.
        tied: names of modules, such as vocabulary heads, whose weight is stored as the word embedding's alone.
        digest: SHA-256 over names, dtypes, shapes and bytes of all tensors in the files.
        decisive: the values of `DECISIVE` that the model's config had when it was saved.
        format: the version of these settings.
    """

    def __init__(
        self,
        scheme=None,
        bits_per_layer: Mapping = (),
        skip: Sequence[str] = (),
        tied: Collection[str] = (),
        digest="",
        decisive: Mapping = (),
        format=FORMAT,
        **_,
    ):
        if format != FORMAT:
            raise ValueError(
                f"quantization_config has format {format!r}; this version of kdkernels reads {FORMAT}: quantize the "
                "original model again"
            )
        self.quant_method = METHOD
        try:
            self.scheme, self.bits_per_layer, self.skip = scheme, dict(bits_per_layer), list(skip)
            self.tied, self.digest, self.decisive, self.format = sorted(tied), digest, dict(decisive), format
            for fields in (scheme, *self.bits_per_layer.values()):
                Scheme(**fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"quantization_config is damaged: {error}") from None


@register_quantizer(METHOD)
class KdkernelsQuantizer(HfQuantizer):
    """Checks the files, lays out empty quantised modules before the weights are read, attaches the encoder."""

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **_):
        from . import tied
        from .quantize import lay_out, plan

        if not self.pre_quantized:
            raise ValueError(
                "kdkernels quantises no model while it is loaded: load it without quantization_config, then call "
                "kdkernels.quantize(model)"
            )
        config = self.quantization_config
        own = {part: Scheme(**fields) for part, fields in config.bits_per_layer.items()}
        for name, saved in config.decisive.items():
            if (given := getattr(model.config, name, None)) != saved:
                raise ValueError(
                    f"config.json is damaged or another model's: its {name} is {given!r}, where the checkpoint was "
                    f"saved with {saved!r}"
                )
        self._stored = check(checkpoint_files, config.digest) if checkpoint_files is not None else []
        lay_out(model, plan(model, Scheme(**config.scheme), own, config.skip))
        tied.share(model, config.tied)
        self._tables = dict(tied.declared(model))
        tied.forget(model)

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model, **_):
        from transformers import PreTrainedModel

        from .encoder import attach_all
        from .modules import Packed

        self._supply(model)
        packed = {name: module for name, module in model.named_modules() if isinstance(module, Packed)}
        for module in packed.values():
            module.unfold()  # what transformers may have looked at while it was loading
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu":  # a view of the mapped file, which would stay in memory
                tensor.data = tensor.data.clone()
        for name, module in packed.items():
            try:
                _ = module.weight  # reads and checks it
            except ValueError as error:
                raise ValueError(f"the checkpoint's {name}.packed is unusable: {error}") from None
        attach_all(model.requires_grad_(False))
        for module in model.modules():
            if isinstance(module, PreTrainedModel):  # each can be saved by itself
                tell(module, self)
        return model

    def _supply(self, model) -> None:
        """Weights for what a model of the saved class does not have: fresh ones of transformers, packed, for a pooler;
        its table's for a vocabulary head. Left alone they are whatever memory holds. ValueError if more is missing.
        """
        from .modules import Packed, QuantLinear

        for name, module in list(model.named_modules()):
            if not isinstance(module, Packed) or not self._lacks(f"{name}.packed", module.packed):
                continue
            table = dict(model.named_modules()).get(self._tables.get(name))
            if isinstance(table, Packed) and table.scheme == module.scheme:
                module.borrow(table)
                if module.bias is not None and self._lacks(f"{name}.bias", module.bias):
                    module.bias.zero_()
            elif "pooler" in name:
                shape, device = (module.in_features, module.out_features), module.packed.device
                fresh = torch.nn.Linear(*shape, bias=module.bias is not None, device=device)
                model._init_weights(fresh)
                model.set_submodule(name, QuantLinear.of(fresh, module.scheme))
            else:
                raise ValueError(f"the checkpoint has no {name}.packed, which a model of its config.json needs")

    def _lacks(self, name: str, tensor: torch.Tensor | None) -> bool:
        """Whether the files have no such tensor, under its name here or in another class; transformers marks what it
        has read."""
        here = f".{name}"
        held = any(here.endswith(f".{stored}") or f".{stored}".endswith(here) for stored in self._stored)
        return tensor is not None and not held and not getattr(tensor, "_is_hf_initialized", False)

    def get_state_dict_and_metadata(self, model):
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        tensors = remove_tied_weights_from_state_dict(model.state_dict(), model)
        stored = revert_weight_conversion(model, dict(tensors))  # as save_pretrained will name them
        settings = model.config.quantization_config  # config.json is written after this
        settings.digest = digest(stored.items())
        settings.decisive = {name: getattr(model.config, name) for name in DECISIVE if hasattr(model.config, name)}
        return tensors, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def mark(model, scheme: Scheme, own: Mapping[str, Scheme], skip: Sequence[str], tied: Collection[str] = ()) -> None:
    """Tells a quantised model of transformers that it is one, as from_pretrained would."""
    config = KdkernelsConfig(asdict(scheme), {part: asdict(chosen) for part, chosen in own.items()}, skip, tied)
    tell(model, KdkernelsQuantizer(config))


def tell(model, quantizer: KdkernelsQuantizer) -> None:
    """Leaves with a model of transformers that the quantizer did it."""
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD
    model.config.quantization_config = quantizer.quantization_config


def check(files: Sequence[str], expected: str) -> list[str]:
    """The names of the tensors in the files; ValueError unless they are the tensors that were saved."""
    if other := [file for file in files if not str(file).endswith(".safetensors")]:
        raise ValueError(f"kdkernels reads checkpoints from safetensors only, got {Path(other[0]).name}")
    try:
        with ExitStack() as opened:
            readers = [opened.enter_context(safe_open(file, "pt")) for file in files]
            names = [name for reader in readers for name in reader.keys()]
            found = digest((name, reader.get_tensor(name)) for reader in readers for name in reader.keys())
    except SafetensorError as error:
        raise ValueError(f"the checkpoint's safetensors file is cut off or damaged: {error}") from None
    if found != expected:
        raise ValueError("the checkpoint is damaged: its tensors do not have the digest that its config.json says")
    return names


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over SHA-256s of the tensors, each with its name, dtype and shape, in the names' order."""
    found = {}
    for name, tensor in tensors:
        sha = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        found[name] = sha.digest()
    return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()
