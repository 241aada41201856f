"""`quantize(model)`: packed weights in place of linears and word embeddings, and the padding-free encoder in front.

Which scheme a layer gets is decided by `plan` and nowhere else: quantize() follows it, and loading a checkpoint follows
it again on the empty model, from the same few settings in config.json.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import _load
from . import architectures, encoder, tied
from .importance import mean_squares
from .modules import Packed, QuantEmbedding, QuantLinear
from .pack import check_weight
from .packed import ROW_BY_ROW
from .scheme import NAMED, Scheme, as_scheme

# Tables are read row by row, to look a word up or to rank it: 8 bits a row lose nothing that a task would notice.
# Beside an encoder of 3 or 2 bits that would be half of the model, and 4 bits cost it a thousandth of mean cosine.
TABLE, SMALL_TABLE = Scheme(bits=8), NAMED["int4"]


def quantize(
    model: nn.Module,
    scheme: Scheme | str = "int8",
    *,
    bits_per_layer: Mapping[str, int | str | Scheme] | Sequence[int | str | Scheme] | None = None,
    skip: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Quantises a transformers encoder in place, for inference: no calibration data, padding-free, any batch of texts.

    Linears of the encoder get `scheme`; the word embedding and a vocabulary head 8 bits, or 4 beside fewer than 4; the
    position embedding 8; task heads, norms and the smallest embeddings stay as they are. BERT, RoBERTa, XLM-R,
    CamemBERT, ELECTRA, DistilBERT and ALBERT (and what is made of them, such as MiniLM) then run on packed tokens; any
    other architecture runs layer by layer on the quantised linears. `kdkernels.explain(model)` tells which, and why.

    Args:
        model: a transformers model, with or without a head, or a module that holds some, as sentence-transformers do;
            weights in float32, bfloat16 or float16.
        scheme: a `Scheme` or its name: "int8", "int4", "int3", "int2".
        bits_per_layer: another scheme for some of these, as a `Scheme`, its name or its bits (4 is "int4"): a mapping
            from part of a module's name ("encoder.layer.0", "output.dense"), of which the longest that fits counts;
            or a sequence with one for each block of the encoder.
        skip: parts of names of modules that stay as they are.
        progress: called with (modules packed so far, modules to pack) after each.

    Returns: the model, in eval mode and frozen: no parameter requires a gradient. `model.save_pretrained(folder)` and,
        after `import kdkernels`, `AutoModel.from_pretrained(folder)` work.
    Raises: TypeError or ValueError naming the argument: an unknown scheme or number of bits, a name in bits_per_layer
        or skip that no module has, a model that is quantised already or has nothing to quantise, a weight that is not
        finite. The model is as it was then.
    """
    settings = settle(model, scheme, bits_per_layer, skip)
    shared = tied.find(model, settings.layers)
    _pack(model.eval(), settings.layers, shared, progress)
    return finish(model, settings, shared)


@dataclass(frozen=True)
class Settings:
    """The arguments of `quantize`, checked, and the plan that they make."""

    scheme: Scheme
    own: dict[str, Scheme]
    skip: list[str]
    layers: dict[str, Scheme]


def settle(model: nn.Module, scheme, bits_per_layer, skip) -> Settings:
    """Checks the arguments of `quantize`, and plans."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_kdkernels_qat"):
        raise ValueError("model is prepared for training already: convert(model) makes it a quantised one")
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ValueError("model is quantised already")
    scheme, skip = as_scheme(scheme), _names("skip", skip)
    own = _own_schemes(model, bits_per_layer)
    for part in skip:
        if not any(fits(name, part) for name, _ in model.named_modules()):
            raise ValueError(f"skip names {part!r}, but no module of the model has that in its name")
    layers = plan(model, scheme, own, skip)
    if "" in layers:
        raise ValueError("model must hold the linears to quantise, got a Linear itself: see kdkernels.quant.pack")
    if not layers:
        raise ValueError(f"model has no linear layer to quantise that is not in skip ({type(model).__name__})")
    for part in own:
        if not any(fits(name, part) for name in layers):
            raise ValueError(f"bits_per_layer names {part!r}, but nothing that is to be quantised has that in its name")
    for name, chosen in layers.items():
        if isinstance(model.get_submodule(name), nn.Embedding) and chosen.group not in ROW_BY_ROW:
            raise ValueError(f"bits_per_layer gives {name} {chosen}; an embedding's group is one of {ROW_BY_ROW}")
        try:
            check_weight(model.get_submodule(name).weight)
        except ValueError as error:
            raise ValueError(f"{name} can't be quantised: {error}") from None
    return Settings(scheme, own, skip, layers)


def finish(model: nn.Module, settings: Settings, shared: Collection[str] = ()) -> nn.Module:
    """Freezes the model, puts the padding-free encoder in front, and tells transformers that it is quantised; `shared`
    as in `KdkernelsConfig`.
    """
    encoder.attach_all(model.requires_grad_(False))
    tied.forget(model)
    for module in model.modules():
        if isinstance(module, Packed):
            _ = module.weight  # laid out now, so that torch.compile and torch.export find nothing to do but call
        if isinstance(module, PreTrainedModel):
            from .integration import mark  # not before there is a model of transformers: it imports all its quantisers

            mark(module, settings.scheme, settings.own, settings.skip, shared)
    return model


def plan(model: nn.Module, scheme: Scheme, own: Mapping[str, Scheme], skip: Sequence[str]) -> dict[str, Scheme]:
    """{name: scheme} of all modules that are to be replaced."""
    bases = [name for name, module in model.named_modules() if architectures.is_base(module)]
    vocabulary = {getattr(model.get_submodule(base).config, "vocab_size", None) for base in bases}
    positions = {
        f"{name}.{table}".removeprefix(".")
        for name in bases
        for table in architectures.position_tables(model.get_submodule(name))
    }
    table = replace(SMALL_TABLE if scheme.bits < 4 else TABLE, activation_bits=scheme.activation_bits)
    matrices, layers = architectures.read_as_matrices(model), {}
    for name, module in model.named_modules():
        if name in matrices or any(fits(name, part) for part in skip):
            continue
        if type(module) is nn.Embedding:  # one of a class made from it may scale what it looks up
            chosen = table if module.num_embeddings in vocabulary else TABLE if name in positions else None
        elif type(module) is not nn.Linear:  # torch.nn.MultiheadAttention has one whose weight it reads itself
            continue
        elif not bases or any(inside(name, base) for base in bases):
            chosen = scheme
        else:
            chosen = table if module.out_features in vocabulary else None
        if chosen is not None:
            part = max((part for part in own if fits(name, part)), key=len, default=None)
            layers[name] = chosen if part is None else own[part]
    return layers


def lay_out(model: nn.Module, layers: Mapping[str, Scheme]) -> None:
    """Puts an empty quantised module, to be loaded into, in place of each named one."""
    for name, scheme in layers.items():
        module = model.get_submodule(name)
        kind = QuantLinear if isinstance(module, nn.Linear) else QuantEmbedding
        model.set_submodule(name, kind.like(module, scheme))


def _pack(
    model: nn.Module,
    layers: Mapping[str, Scheme],
    shared: Mapping[str, str],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Puts a quantised module in place of each named one; those in `shared` borrow the weight of the table there."""
    linears = [name for name in layers if isinstance(model.get_submodule(name), nn.Linear)]
    importance = mean_squares(model, linears)
    ordered = sorted(layers, key=lambda name: name in shared)  # tables before who borrows from them
    for done, name in enumerate(ordered, 1):
        module, scheme = model.get_submodule(name), layers[name]
        lender = model.get_submodule(shared[name]) if name in shared else None
        if isinstance(module, nn.Linear):
            packed = QuantLinear.of(module, scheme, importance.get(name), lender)
        else:
            packed = QuantEmbedding.of(module, scheme, lender)
        model.set_submodule(name, packed)
        if progress is not None:
            progress(done, len(layers))


def explain(model: nn.Module) -> dict[str, str]:
    """{name of a module: how it runs, and why}, of base models and linears; "" is the model itself."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, encoder.PaddingFree):
            found[name] = _explain_packed(module)
        elif architectures.is_base(module):
            found[name] = f"{type(module).__name__}: layer by layer, since {encoder.why_not(module)}"
        elif isinstance(module, QuantLinear):
            device = next(module.buffers()).device
            how = ""
            if why := _load.unpacks(device):
                how = f", unpacked to bf16: {why}"
            elif not _load.serves("quant_linear", device):
                how = f", by the reference: no kernel serves {device.type} here"
            found[name] = f"quantised linear, {module.scheme}{how}"
        elif isinstance(module, nn.Linear):
            found[name] = f"torch linear, {str(module.weight.dtype).removeprefix('torch.')}: not quantised"
    return found


def _explain_packed(base: nn.Module) -> str:
    x = torch.empty(0, dtype=base.dtype, device=base.device)
    reason = encoder.why_not_fused(x, architectures.blocks(base), base.config)
    how = f"call by call, since {reason}" if reason else "all in one call"
    if base.config.output_attentions:
        return f"{type(base).__name__}: layer by layer, since its config sets output_attentions"
    return (
        f"{type(base).__name__}: padding-free encoder on packed tokens, blocks {how}; layer by layer on all tokens, "
        f"padding too, for {encoder.NOT_PACKED}"
    )


def inside(name: str, base: str) -> bool:
    return base == "" or name == base or name.startswith(base + ".")


def fits(name: str, part: str) -> bool:
    """Whether `part` is a run of whole components of the dotted name."""
    return f".{part}." in f".{name}."


def _names(argument: str, value) -> list[str]:
    names = not isinstance(value, str) and isinstance(value, Collection)
    if not names or not all(isinstance(name, str) and name for name in value):
        raise TypeError(f"{argument} must be a sequence of parts of module names, got {value!r}")
    return list(value)


def scheme_of(argument: str, value) -> Scheme:
    if isinstance(value, int) and not isinstance(value, bool):
        if f"int{value}" not in NAMED:
            raise ValueError(f"{argument} must give 8, 4, 3 or 2 bits, or a scheme; got {value}")
        value = f"int{value}"
    return as_scheme(value, argument)


def _own_schemes(model: nn.Module, bits_per_layer) -> dict[str, Scheme]:
    """bits_per_layer as {part of a name: scheme}."""
    if bits_per_layer is None:
        return {}
    if isinstance(bits_per_layer, Mapping):
        return {part: scheme_of("bits_per_layer", value) for part, value in bits_per_layer.items()}
    if not isinstance(bits_per_layer, Sequence) or isinstance(bits_per_layer, str):
        raise TypeError(
            "bits_per_layer must be a mapping from names, or a sequence with an entry for each block; got "
            f"{bits_per_layer!r}"
        )
    bases = [(name, module) for name, module in model.named_modules() if architectures.is_base(module)]
    if len(bases) != 1 or architectures.unsupported(bases[0][1]):
        raise ValueError("bits_per_layer must be a mapping from names: a sequence needs a model with one known encoder")
    blocks = architectures.blocks(bases[0][1])
    if len(bits_per_layer) != len(blocks):
        raise ValueError(f"bits_per_layer must have one entry for each of {len(blocks)} blocks, got {bits_per_layer!r}")
    names = {id(module): name for name, module in bases[0][1].named_modules()}
    own = {}
    for block, value in zip(blocks, bits_per_layer, strict=True):
        for linear in block.linears:
            chosen = scheme_of("bits_per_layer", value)
            if own.setdefault(names[id(linear)], chosen) != chosen:
                raise ValueError("bits_per_layer must give blocks that share their weights the same bits")
    return own
