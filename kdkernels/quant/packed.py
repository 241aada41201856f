"""`PackedWeight`: a quantised weight as one run of bytes; csrc/core/packed.h describes the format byte by byte."""

import struct
import zlib
from dataclasses import dataclass
from functools import cached_property

import torch

from .. import _load
from .scheme import BITS, GROUPS, RUN, Scheme

MAGIC, VERSION = b"KDQW", 2
_HEADER = struct.Struct("<4sHBBBBHIqqq24x")
_CHECKSUM = slice(12, 16)
_ALIGN = 64
MAX_COLUMNS = 32768
ROW_BY_ROW = ("channel", "block")  # groups that lie within a row


@dataclass(frozen=True)
class Parts:
    """The numbers of a packed weight, each as the scheme shares them; `expand` gives them the weight's shape."""

    codes: torch.Tensor  # uint8 [rows, columns]
    scales: torch.Tensor  # float32, flat; what bfloat16 holds (`storable`)
    zeros: torch.Tensor | None  # uint8, flat; None: the middle code, or in `steps`
    steps: torch.Tensor | None  # uint8 [rows, blocks]: step | z << (8 - bits)


class PackedWeight:
    """A weight [out features, in features] in 8 to 2 bits.

    It is kept once: as the kernels of its device read it (`prepared`), or where none do, as `blob`. The CPU's kernels
    lose nothing, so there `blob` is made again for whoever asks. Where a GPU's products are torch's, `blob` has the
    weight in bfloat16 (`unpacked`) beside it. Immutable: threads may share it.

    Args:
        blob: a flat uint8 tensor as `pack` made it, for instance out of a safetensors file.
        prepare: whether to lay it out for products, here and now; a table that is only looked up has no use for that.

    Raises: TypeError or ValueError if the blob is not a packed weight, is of another version, cut off, or damaged.
    """

    _is_hf_initialized = True  # transformers draws no random values for it where it stands for a module's weight

    def __init__(self, blob: torch.Tensor, *, prepare: bool = True):
        self.scheme, self.shape = _read_header(blob)
        self.device, self._prepare = blob.device, prepare
        self._blob = blob = blob.detach().contiguous()
        self._header = blob[:_ALIGN].clone()
        served = prepare and _load.serves("quant_linear", self.device)
        unpacks = served and _load.unpacks(self.device) != ""
        self.prepared = torch.ops.kdkernels.quant_prepare(blob) if served and not unpacks else None
        self._by_row = None if prepare else self._read_by_row()
        self.unpacked = self.dequantize(torch.bfloat16) if unpacks else None
        if self.prepared is not None and self.device.type == "cpu":
            self._blob = None

    @property
    def blob(self) -> torch.Tensor:
        """The weight as csrc/core/packed.h describes it, the same on every device."""
        return torch.ops.kdkernels.quant_restore(self.prepared, self._header) if self._blob is None else self._blob

    @property
    def nbytes(self) -> int:
        """Bytes of the blob: what it takes on disk."""
        return blob_bytes(self.scheme, *self.shape)

    @property
    def layout(self) -> int:
        """Scheme and group size in one number, as `packed_scheme` of csrc/core/packed.h reads them."""
        scheme = self.scheme
        group = GROUPS.index(scheme.group)
        return scheme.bits | group << 4 | int(scheme.symmetric) << 6 | (scheme.group_size or 1) << 8

    def to(self, device) -> "PackedWeight":
        """The same weight on another device."""
        if torch.device(device) == self.device:
            return self
        return PackedWeight(self.blob.to(device), prepare=self._prepare)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the codes stand for, [out features, in features]."""
        values, scales = self.factors
        return (values.to(torch.float64) * scales).to(dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of `dequantize()`, [*ids.shape, in features], float32: an embedding. No other row is unpacked.

        Raises ValueError where rows share their scales.
        """
        if self.scheme.group not in ROW_BY_ROW:
            raise ValueError(f"rows needs a scheme whose group is one of {ROW_BY_ROW}, got {self.scheme}")
        flat = ids.flatten()
        chosen = {  # index_select takes no negative ids, which an index would count from the end
            name: None if part is None else part.index_select(0, flat)
            for name, part in (self._by_row or self._read_by_row()).items()
        }
        if self.scheme.bits == 8 and self.scheme.symmetric and self.scheme.group == "channel":
            codes = chosen["codes"].bitwise_xor_(128).view(torch.int8)[:, : self.shape[1]]
            return codes.to(torch.float32).mul_(chosen["scales"]).view(*ids.shape, self.shape[1])
        values, scales = _factors(_parts(chosen, self.scheme, self.shape[1]), self.scheme, flat.numel(), self.shape[1])
        return (values.to(torch.float32) * scales).view(*ids.shape, self.shape[1])

    def _read_by_row(self) -> dict[str, torch.Tensor | None] | None:
        """The sections as [rows, ...]; None where rows share their scales.

        Tables read theirs when they are made, and not within torch.compile: where it has to derive their width of 1
        from sizes that it doesn't know, Inductor (torch 2.13) reads beyond the scales.
        """
        if self.scheme.group not in ROW_BY_ROW:
            return None
        stored = _read_sections(self.blob, self.scheme, self.shape)
        return {name: None if part is None else part.view(self.shape[0], -1) for name, part in stored.items()}

    @cached_property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight / scale as int32, scale as float32), both with the weight's shape or broadcast to it."""
        return _factors(unpack_blob(self.blob, self.scheme, self.shape), self.scheme, *self.shape)

    def __getstate__(self):
        return self.blob, self._prepare

    def __setstate__(self, state):
        self.__init__(state[0], prepare=state[1])

    def __repr__(self) -> str:
        return f"PackedWeight(shape={tuple(self.shape)}, {self.scheme}, {self.nbytes} bytes, {self.device})"


def storable(scales: torch.Tensor) -> torch.Tensor:
    """The nearest scales that can be stored, which are finite, as float32."""
    return scales.clamp_max(torch.finfo(torch.bfloat16).max).to(torch.bfloat16).float()


def spread(values: torch.Tensor, scheme: Scheme, rows: int, columns: int) -> torch.Tensor:
    """A value per group to [rows, columns], or what broadcasts to it."""
    if scheme.group == "in":
        return values.repeat_interleave(scheme.group_size)[:columns]
    if scheme.group == "out":
        return values.repeat_interleave(scheme.group_size)[:rows, None]
    if scheme.group == "block" and not scheme.two_level:
        return values.view(rows, _blocks(scheme, columns)).repeat_interleave(scheme.group_size, 1)[:, :columns]
    return values[:, None]


def num_scales(scheme: Scheme, rows: int, columns: int) -> int:
    if scheme.group == "out":
        return -(-rows // scheme.group_size)
    if scheme.group == "in":
        return _blocks(scheme, columns)
    return rows * (_blocks(scheme, columns) if scheme.group == "block" and not scheme.two_level else 1)


def _blocks(scheme: Scheme, columns: int) -> int:
    return -(-columns // scheme.group_size)


def _sections(scheme: Scheme, rows: int, columns: int) -> dict[str, int]:
    """Bytes of each section, in order."""
    scales = num_scales(scheme, rows, columns)
    sizes = {"codes": rows * -(-columns // RUN) * 4 * scheme.bits, "scales": 2 * scales}
    if scheme.two_level:
        sizes["steps"] = rows * _blocks(scheme, columns)
    elif not scheme.symmetric:
        sizes["zeros"] = scales
    return sizes


def blob_bytes(scheme: Scheme, rows: int, columns: int) -> int:
    """The size of a blob."""
    return _ALIGN + sum(map(_padded, _sections(scheme, rows, columns).values()))


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def pack_blob(scheme: Scheme, parts: Parts) -> torch.Tensor:
    """Header and sections as one uint8 tensor."""
    rows, columns = parts.codes.shape
    header = _HEADER.pack(
        MAGIC, VERSION, scheme.bits, GROUPS.index(scheme.group), scheme.symmetric, scheme.activation_bits or 0, 0, 0,
        rows, columns, scheme.group_size or 1,
    )  # fmt: skip
    sizes = _sections(scheme, rows, columns)
    blob = torch.zeros(_ALIGN + sum(map(_padded, sizes.values())), dtype=torch.uint8)
    blob[:_ALIGN] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    at = _ALIGN
    for name, size in sizes.items():
        data = _pack_codes(parts.codes, scheme.bits) if name == "codes" else getattr(parts, name)
        data = data.to(torch.bfloat16) if name == "scales" else data
        blob[at : at + size] = data.contiguous().cpu().view(torch.uint8).flatten()
        at += _padded(size)
    blob[_CHECKSUM] = torch.frombuffer(bytearray(struct.pack("<I", _checksum(blob))), dtype=torch.uint8)
    return blob


def unpack_blob(blob: torch.Tensor, scheme: Scheme, shape: torch.Size) -> Parts:
    return _parts(_read_sections(blob, scheme, shape), scheme, shape[1])


def _read_sections(blob: torch.Tensor, scheme: Scheme, shape: torch.Size) -> dict[str, torch.Tensor | None]:
    """The sections as they are stored, by their names in `Parts`: views, of one dimension."""
    at, found = _ALIGN, {"zeros": None, "steps": None}
    for name, size in _sections(scheme, *shape).items():
        found[name] = blob[at : at + size]
        at += _padded(size)
    found["scales"] = found["scales"].clone().view(torch.bfloat16).float()  # a copy is aligned
    return found


def _parts(stored: dict[str, torch.Tensor | None], scheme: Scheme, columns: int) -> Parts:
    row_bytes = -(-columns // RUN) * 4 * scheme.bits
    codes = _unpack_codes(stored["codes"].view(-1, row_bytes), scheme.bits)[:, :columns]
    steps = stored["steps"]
    if steps is not None:
        steps = steps.view(-1, _blocks(scheme, columns))
    return Parts(codes, stored["scales"].flatten(), stored["zeros"], steps)


def _factors(parts: Parts, scheme: Scheme, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """weight / scale as int32, and scale."""
    codes, middle = parts.codes.to(torch.int32), 1 << (scheme.bits - 1)
    scales = spread(parts.scales, scheme, rows, columns)
    if parts.steps is not None:
        both = parts.steps.to(torch.int32).repeat_interleave(scheme.group_size, 1)[:, :columns]
        step, z = both & ((1 << (8 - scheme.bits)) - 1), both >> (8 - scheme.bits)
        return step * codes - (step * (z + middle) >> 1), scales
    if parts.zeros is not None:
        return codes - spread(parts.zeros.flatten().to(torch.int32), scheme, rows, columns), scales
    return codes - middle, scales


def _pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % RUN)).view(rows, -1, RUN)
    if bits == 8:
        return padded
    fields = padded if bits != 3 else padded & 3
    packed = _fold(fields, 4 if bits == 4 else 2)
    return packed if bits != 3 else torch.cat([packed, _fold(padded >> 2, 1)], -1)


def _fold(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., 32] of small codes -> [..., 4 * bits] bytes: byte i has code i lowest, then code i + 4 * bits."""
    parts = codes.unflatten(-1, (8 // bits, 4 * bits)).unbind(-2)
    packed = parts[0].clone()
    for place, part in enumerate(parts[1:], 1):
        packed |= part << (place * bits)
    return packed


def _unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    runs = packed.unflatten(-1, (-1, 4 * bits))
    if bits == 8:
        codes = runs
    elif bits == 3:
        codes = _unfold(runs[..., :8], 2) | _unfold(runs[..., 8:], 1) << 2
    else:
        codes = _unfold(runs, bits)
    return codes.flatten(-2)


def _unfold(packed: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.cat([packed >> (place * bits) & ((1 << bits) - 1) for place in range(8 // bits)], -1)


def _checksum(blob: torch.Tensor) -> int:
    data = memoryview(blob.cpu().contiguous().numpy())
    return zlib.crc32(data[16:], zlib.crc32(b"\0\0\0\0", zlib.crc32(data[:12])))


def _read_header(blob: torch.Tensor) -> tuple[Scheme, torch.Size]:
    if not isinstance(blob, torch.Tensor):
        raise TypeError(f"blob must be a tensor, got {type(blob).__name__}")
    if blob.dtype != torch.uint8 or blob.dim() != 1:
        raise ValueError(f"blob must be a flat uint8 tensor, got {blob.dtype} of shape {list(blob.shape)}")
    raw = bytes(blob[:_ALIGN].tolist())
    if len(raw) < _ALIGN or raw[:4] != MAGIC:
        raise ValueError(f"blob is not a packed weight: it begins with {raw[:4]!r} and not with {MAGIC!r}")
    _, version, bits, group, symmetric, activation_bits, _, checksum, rows, columns, size = _HEADER.unpack(raw)
    if version != VERSION:
        raise ValueError(f"blob is of version {version} of the packed format; this kdkernels reads version {VERSION}")
    known = bits in BITS and group < len(GROUPS) and symmetric <= 1 and activation_bits in (0, 8)
    if not known or rows < 1 or not 1 <= columns <= MAX_COLUMNS or size < 1:
        raise ValueError("blob is damaged: its header names no scheme and shape that exist")
    group_size = None if GROUPS[group] == "channel" else size
    try:
        scheme = Scheme(bits, GROUPS[group], group_size, bool(symmetric), activation_bits or None)
    except ValueError as error:
        raise ValueError(f"blob is damaged: {error}") from None
    expected = blob_bytes(scheme, rows, columns)
    if blob.numel() != expected:
        raise ValueError(f"blob is cut off or damaged: its header says {expected} bytes, it has {blob.numel()}")
    if _checksum(blob) != checksum:
        raise ValueError("blob is damaged: its checksum does not match")
    return scheme, torch.Size((rows, columns))
