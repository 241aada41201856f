"""Schemes and packed weights: the format byte by byte, the search, and blobs that are not what they should be."""

import copy
import pickle
import struct
import zlib

import pytest
import torch

from kdkernels.quant import NAMED, PackedWeight, Scheme, pack
from kdkernels.quant.pack import encode, find_ranges
from kdkernels.quant.packed import Parts, pack_blob, storable, unpack_blob

from .test_quant_linear import SCHEMES, name

pytestmark = pytest.mark.usefixtures("one_thread")


def weight(rows=37, columns=200, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


def with_checksum(blob: bytearray) -> torch.Tensor:
    blob[12:16] = bytes(4)
    blob[12:16] = struct.pack("<I", zlib.crc32(bytes(blob)))
    return torch.frombuffer(blob, dtype=torch.uint8)


def decode(blob: bytes) -> list[list[float]]:
    """The format as csrc/core/packed.h tells it, one weight at a time."""
    bits, group, symmetric = blob[6], blob[7], blob[8]
    rows, columns, size = struct.unpack_from("<qqq", blob, 16)
    two_level = group == 3 and bits < 8
    row_bytes, blocks = -(-columns // 32) * 4 * bits, -(-columns // size)
    count = {0: rows, 1: -(-rows // size), 2: blocks, 3: rows if two_level else rows * blocks}[group]
    codes_at = 64
    scales_at = codes_at + -(-rows * row_bytes // 64) * 64
    more_at = scales_at + -(-count * 2 // 64) * 64

    def code(n, k):
        run, i = codes_at + n * row_bytes + k // 32 * 4 * bits, k % 32
        if bits == 8:
            return blob[run + i]
        if bits == 4:
            return blob[run + i % 16] >> i // 16 * 4 & 15
        low = blob[run + i % 8] >> i // 8 * 2 & 3
        return low if bits == 2 else low | (blob[run + 8 + i % 4] >> i // 4 & 1) << 2

    def one(n, k):
        index = {0: n, 1: n // size, 2: k // size, 3: n if two_level else n * blocks + k // size}[group]
        (scale,) = struct.unpack("<f", bytes(2) + blob[scales_at + 2 * index : scales_at + 2 * index + 2])
        if two_level:
            byte = blob[more_at + n * blocks + k // size]
            step, z = byte & (1 << 8 - bits) - 1, byte >> 8 - bits
            return scale * (step * code(n, k) - (step * (z + 2 ** (bits - 1)) >> 1))
        return scale * (code(n, k) - (2 ** (bits - 1) if symmetric else blob[more_at + index]))

    return [[one(n, k) for k in range(columns)] for n in range(rows)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_format(scheme):
    packed = pack(weight(9, 70), scheme)
    blob = bytes(packed.blob.tolist())
    assert blob[:6] == b"KDQW\2\0" and len(blob) % 64 == 0
    decoded = torch.tensor(decode(blob), dtype=torch.float64)
    assert torch.equal(decoded.float(), packed.dequantize())
    assert packed.nbytes == len(blob) and packed.shape == (9, 70) and packed.scheme == scheme
    again = PackedWeight(packed.blob.clone())
    assert again.scheme == scheme and torch.equal(again.dequantize(), packed.dequantize())


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_codes_survive(bits):
    codes = torch.arange(5 * 97).remainder(2**bits).to(torch.uint8).view(5, 97)
    scheme = Scheme(bits)
    blob = pack_blob(scheme, Parts(codes, torch.ones(5), None, None))
    assert torch.equal(unpack_blob(blob, scheme, torch.Size((5, 97))).codes, codes)


def test_sizes():
    """Bits per weight of a large matrix, header and padding included."""
    bits = {name: 8 * pack(weight(256, 1024), name).nbytes / (256 * 1024) for name in NAMED}
    limits = {"int8": 8.02, "int4": 4.27, "int3": 3.27, "int2": 2.27}
    assert all(bits[name] <= limit for name, limit in limits.items()), bits


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.activation_bits], ids=name)
def test_search_beats_the_full_range(scheme):
    """The squared error is below that of minimum and maximum, or where nothing is to be won, equal; scales that can be
    stored, both."""
    w = weight(48, 256)
    packed = pack(w, scheme)
    error = (packed.dequantize() - w).square().mean()
    size = {"channel": (1, 256), "out": (6, 256), "in": (48, 10), "block": (1, 64)}[scheme.group]
    plain = 0.0
    for rows in w.split(size[0]):
        for part in rows.split(size[1], 1):
            levels = 2**scheme.bits - 1
            low, high = part.min().clamp_max(0), part.max().clamp_min(0)
            if scheme.symmetric:
                high = torch.maximum(-low, high)
                low, levels = -high, levels - 1
            step = storable((high - low) / levels)
            zero = (-low / step).round()
            plain += (((part / step + zero).round().clamp(0, levels) - zero) * step - part).square().sum()
    assert error <= 1.001 * plain / w.numel()


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.activation_bits], ids=name)
def test_rows(scheme):
    packed, ids = pack(weight(9, 70), scheme), torch.tensor([[8, 0, 3], [3, 3, 1]])
    if scheme.group in ("channel", "block"):
        assert torch.equal(packed.rows(ids), packed.dequantize()[ids])
        assert packed.rows(ids[:0]).shape == (0, 3, 70)
    else:
        with pytest.raises(ValueError, match="rows needs a scheme whose group is one of"):
            packed.rows(ids)


def test_importance_moves_the_error():
    w = weight(64, 256)
    counts = torch.ones(256)
    counts[::2] = 100.0
    plain, weighted = pack(w, "int3"), pack(w, "int3", importance=counts)
    errors = [((p.dequantize() - w)[:, ::2]).square().sum() for p in (plain, weighted)]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("scheme", list(NAMED))
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_extreme_weights(scheme, scale):
    w = weight(5, 64) * scale
    w[1], w[2], w[3, 5:] = 0.0, w[2].abs(), 0.0
    got = pack(w, scheme).dequantize()
    assert got.isfinite().all() and torch.equal(got[1], torch.zeros(64))
    if scale > 1e-38:
        error = (got.double() - w).norm() / w.double().norm()
        assert error < {"int8": 0.02, "int4": 0.2, "int3": 0.35, "int2": 0.7}[scheme]


@pytest.mark.parametrize("shape", [(9, 70), (70, 33), (16, 128)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_blobs_are_restored_to_the_bit(scheme, shape):
    """A weight is kept as the kernels read it, and the blob that it came from made again for whoever asks."""
    w = weight(*shape)
    kept, made = (encode(w, scheme, *find_ranges(w, scheme), prepare=prepare) for prepare in (False, True))
    assert kept.prepared is None and made.prepared is not None
    assert kept.blob is kept.blob and torch.equal(made.blob, kept.blob)


def test_a_blob_is_restored_with_its_own_header_alone():
    packed, other = pack(weight(), "int4"), pack(weight(), "int8")
    for header, message in (
        (other.blob[:64], "the packed weight that had this header"),
        (packed.blob[:63], "does not begin with KDQW"),
        (packed.blob[64:128], "does not begin with KDQW"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.kdkernels.quant_restore(packed.prepared, header.clone())


def test_copies():
    packed = pack(weight(), "int4")
    for other in (pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed), packed.to("cpu")):
        assert torch.equal(other.blob, packed.blob) and torch.equal(other.prepared, packed.prepared)
    assert "shape=(37, 200)" in repr(packed) and "bits=4" in repr(packed)


@pytest.mark.parametrize("scheme", list(NAMED))
def test_every_flipped_bit_is_noticed(scheme):
    blob = pack(weight(3, 40), scheme).blob
    for position in range(0, 8 * blob.numel(), 7):
        damaged = blob.clone()
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError, match="^blob is"):
            PackedWeight(damaged)


@pytest.mark.parametrize(
    ("blob", "error", "message"),
    [
        (b"KDQW", TypeError, "blob must be a tensor, got bytes"),
        (torch.zeros(64), ValueError, "flat uint8 tensor, got torch.float32"),
        (torch.zeros(8, 8, dtype=torch.uint8), ValueError, "flat uint8 tensor"),
        (torch.zeros(0, dtype=torch.uint8), ValueError, "not a packed weight"),
        (torch.zeros(640, dtype=torch.uint8), ValueError, "not a packed weight"),
    ],
)
def test_foreign_blobs(blob, error, message):
    with pytest.raises(error, match=message):
        PackedWeight(blob)


def test_truncated_and_future_blobs():
    blob = pack(weight(), "int4").blob
    for size in (1, 63, 64, 128, blob.numel() - 64, blob.numel() - 1):
        with pytest.raises(ValueError, match="not a packed weight|cut off"):
            PackedWeight(blob[:size])
    with pytest.raises(ValueError, match="cut off or damaged"):
        PackedWeight(torch.cat([blob, blob[:64]]))
    future = bytearray(blob.tolist())
    future[4] = 3
    with pytest.raises(ValueError, match="version 3 .* reads version 2"):
        PackedWeight(with_checksum(future))


@pytest.mark.parametrize("field", [6, 7, 8, 9, *range(16, 40)])
def test_the_op_reads_no_header_that_it_cannot_trust(field):
    """Headers with a matching checksum and senseless fields: Python and C++ both refuse."""
    for value in (0x7F, 0xFF):
        blob = bytearray(pack(weight(), "int4").blob.tolist())
        blob[field] = value
        damaged = with_checksum(blob)
        with pytest.raises(ValueError, match="^blob is"):
            PackedWeight(damaged)
        with pytest.raises(RuntimeError, match="packed "):
            torch.ops.kdkernels.quant_prepare(damaged)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"bits": 5}, ValueError, "bits must be one of 8, 4, 3, 2, got 5"),
        ({"bits": True}, ValueError, "bits must be"),
        ({"bits": 8.0}, ValueError, "bits must be .* got 8.0"),
        ({"activation_bits": 8.0}, ValueError, "activation_bits must be 8.*got 8.0"),
        ({"group": "row"}, ValueError, "group must be one of 'channel', 'out', 'in', 'block', got 'row'"),
        ({"group_size": 32}, ValueError, "group_size must be None with group 'channel', got 32"),
        ({"group": "block", "group_size": 48}, ValueError, "group_size must be a positive multiple of 32 .* got 48"),
        ({"group": "out", "group_size": 0}, ValueError, "group_size must be >= 1 and at most 1048576 .*, got 0"),
        ({"group": "in", "group_size": 1 << 40}, ValueError, "at most 32768 with group 'in', got 1099511627776"),
        ({"group": "in", "group_size": 2.0}, TypeError, "group_size must be an int or None, got float"),
        ({"symmetric": 1}, TypeError, "symmetric must be a bool, got int"),
        ({"activation_bits": 16}, ValueError, "activation_bits must be 8, or None for weight-only.*got 16"),
    ],
)
def test_scheme_errors(fields, error, message):
    with pytest.raises(error, match=message):
        Scheme(**fields)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], "int8"), TypeError, "weight must be a tensor, got list"),
        ((torch.ones(3), "int8"), ValueError, r"weight must be a float tensor .* shape \[3\]"),
        ((torch.ones(3, 0), "int8"), ValueError, "weight must be a float tensor"),
        ((torch.ones(3, 3, dtype=torch.int32), "int8"), ValueError, "weight must be a float tensor .* got torch.int32"),
        ((torch.ones(1, 32769), "int8"), ValueError, "at most 32768 in features, got 32769"),
        ((torch.full((3, 3), torch.nan), "int8"), ValueError, "weight must be finite"),
        ((torch.ones(3, 3, device="meta"), "int8"), ValueError, "weight must have values, got one on the meta device"),
        ((torch.ones(3, 3), "int5"), ValueError, "scheme must be a Scheme or one of 'int8', .*got 'int5'"),
        ((torch.ones(3, 3), 8), ValueError, "scheme must be a Scheme"),
    ],
)
def test_pack_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        pack(*arguments)


def test_importance_errors():
    with pytest.raises(TypeError, match="importance must be a tensor or None, got list"):
        pack(torch.ones(3, 2), importance=[1.0, 1.0])
    with pytest.raises(ValueError, match=r"importance must have the shape \[2\], got \[3\]"):
        pack(torch.ones(3, 2), importance=torch.ones(3))
    with pytest.raises(ValueError, match="importance must be finite and >= 0"):
        pack(torch.ones(3, 2), importance=torch.tensor([1.0, -1.0]))
