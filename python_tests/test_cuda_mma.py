"""What kernels reach through csrc/cuda/mma.h, on the CPU, against the tables of the PTX manual; and mistakes in using
it, each of which must be an error. The tables here give an element's place as the manual does, one by one."""

import ctypes
import shutil
import subprocess

import pytest
import torch

from .cuda_host import HERE, build, check, threads_reversed
from .test_guard_pages import beside_a_guard

LANES = range(32)
TYPES = {"s": torch.int8, "u": torch.uint8, "b": torch.bfloat16, "h": torch.float16}


@pytest.fixture(scope="module", params=[75, 90], ids="sm_{}".format)
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def host(tmp_path_factory, arch):
    return build("instructions.cu", tmp_path_factory.mktemp("instructions"), int64=["bank_conflicts"], arch=arch)


def place_a(i: int, lane: int, wide: bool) -> tuple[int, int]:
    """Row and column of A's element a_i: "Matrix fragments for mma.m16n8k16" (wide) and ".m16n8k32"."""
    group, thread = lane >> 2, lane % 4
    if wide:
        row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
        return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)
    row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
    return row, thread * 4 + (i & 3) + (16 if i >= 8 else 0)


def place_b(i: int, lane: int, wide: bool) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    if wide:
        return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group
    return thread * 4 + (i & 3) + (16 if i >= 4 else 0), group


def place_c(i: int, lane: int) -> tuple[int, int]:
    return (lane >> 2) + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


def fragment(matrix, place, elements) -> torch.Tensor:
    """[lane, element] of a matrix."""
    return torch.stack([torch.stack([matrix[place(i, lane)] for i in range(elements)]) for lane in LANES]).contiguous()


def draw(dtype, *shape, seed):
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    bounds = torch.iinfo(dtype)
    return torch.randint(bounds.min, bounds.max + 1, shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("types", ["ss", "su", "us", "uu", "bf", "hf"])
def test_mma_follows_the_tables(host, types):
    wide = types[1] == "f"
    left = TYPES[types[0]]
    right = left if wide else TYPES[types[1]]
    depth, exact = (16, torch.float64) if wide else (32, torch.int64)
    a, b = draw(left, 16, depth, seed=1), draw(right, depth, 8, seed=2)
    c = draw(torch.int8, 16, 8, seed=3).to(torch.float32 if wide else torch.int32)
    in_a = fragment(a, lambda i, lane: place_a(i, lane, wide), depth // 2)
    in_b = fragment(b, lambda i, lane: place_b(i, lane, wide), depth // 4)
    out = fragment(c, place_c, 4)
    check(host, host.run_mma(types.encode(), *(ctypes.c_void_p(x.data_ptr()) for x in (in_a, in_b, out))))
    expected = fragment(a.to(exact) @ b.to(exact) + c.to(exact), place_c, 4)
    if wide:
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(out.long(), expected)


def run_ldmatrix(host, count, transpose=False, skew=0, filled=32):
    """(16-bit elements [lane, matrix, 2] that were loaded, the matrices [4, 8, 8])"""
    chunks = draw(torch.int16, 8, 4, 8, seed=4)  # [row][matrix][element]
    out = torch.zeros(32, count, 2, dtype=torch.int16)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (chunks, out))
    check(host, host.run_ldmatrix(count, transpose, *pointers, skew, filled))
    return out, chunks.transpose(0, 1)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_follows_the_figure(host, count, transpose):
    """Thread i holds elements 2 * (i % 4) and the next of row i / 4; of the transposed matrix with .trans."""
    loaded, matrices = run_ldmatrix(host, count, transpose)
    for lane in LANES:
        for matrix in range(count):
            own = matrices[matrix].T if transpose else matrices[matrix]
            assert loaded[lane, matrix].tolist() == own[lane // 4, lane % 4 * 2 :][:2].tolist()


def test_ldmatrix_counts_bank_conflicts(host):
    """Rows 64 bytes apart: eight rows have two places among 128 bytes."""
    before = host.bank_conflicts()
    run_ldmatrix(host, 1)
    assert host.bank_conflicts() - before == 6


def test_shared_memory_that_was_not_written_is_an_error(host):
    run_ldmatrix(host, 1, filled=29)
    with pytest.raises(RuntimeError, match="read before it was written"):
        run_ldmatrix(host, 1, filled=28)


def test_shared_memory_out_of_bounds_is_an_error(host):
    with pytest.raises(RuntimeError, match="out of bounds"):
        run_ldmatrix(host, 4, skew=1)


def read_each_other(host, barrier=True, further=0):
    out = torch.zeros(64, dtype=torch.int32)
    check(host, host.run_read_each_other(ctypes.c_void_p(out.data_ptr()), barrier, further))
    return out


def test_a_kernel_with_a_fault_is_an_error(host):
    """The same kernel, right, without its barrier, and with an index too far to either side."""
    assert torch.equal(read_each_other(host), (torch.arange(64) + 32) % 64)
    with pytest.raises(RuntimeError, match="read before it was written"):
        read_each_other(host, barrier=False)
    for further in (1, -1):
        with pytest.raises(RuntimeError, match="out of bounds"):
            read_each_other(host, further=further)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_race_is_an_error(host, reverse):
    """Whatever the order in which warps run, and though the right numbers may come out."""
    out = torch.zeros(64, dtype=torch.int32)
    with threads_reversed(host, reverse):
        check(host, host.run_write_behind_a_read(ctypes.c_void_p(out.data_ptr()), True))
        assert torch.equal(out, (torch.arange(64) + 32) % 64)
        check(host, host.run_write_twice(ctypes.c_void_p(out.data_ptr()), True))
        assert torch.equal(out, torch.arange(64) % 32 + 32)
        for kernel in (host.run_write_behind_a_read, host.run_write_twice):
            with pytest.raises(RuntimeError, match="two warps are at the same shared memory"):
                check(host, kernel(ctypes.c_void_p(out.data_ptr()), False))


def run_cp_async(host, hasty):
    data = draw(torch.int32, 2, 32, 4, seed=5)
    out = torch.zeros(32, 2, 4, dtype=torch.int32)
    check(host, host.run_cp_async(ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(out.data_ptr()), hasty))
    return data, out


def test_copies_arrive_at_the_wait(host):
    data, out = run_cp_async(host, hasty=0)
    for group in range(2):  # lane i of register r: 4 bytes i % 4 of row i / 4 of matrix r
        expected = data[group].view(4, 8, 4).permute(1, 2, 0).reshape(32, 4)
        assert torch.equal(out[:, group], expected)


def test_a_copy_that_was_not_waited_for_is_an_error(host, arch):
    if arch < 80:  # a copy through a register has arrived at once
        data, out = run_cp_async(host, hasty=1)
        assert torch.equal(out[:, 1], data[1].view(4, 8, 4).permute(1, 2, 0).reshape(32, 4))
        return
    with pytest.raises(RuntimeError, match="read before it was written"):
        run_cp_async(host, hasty=1)


@pytest.mark.parametrize("some", [0, 5, 32])
def test_what_does_not_exist_is_zero_and_not_read(host, some):
    data = draw(torch.int32, 32, 4, seed=6)
    out = torch.full((32, 4), 99, dtype=torch.int32)
    given = beside_a_guard(data[:some], "behind")
    check(host, host.run_cp_async_some(ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()), some))
    data[some:] = 0
    assert torch.equal(out, data.view(4, 8, 4).permute(1, 2, 0).reshape(32, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pairs_are_rounded_to_nearest(host, dtype):
    """Ties to even; the first of two in the lower half."""
    x = draw(torch.float32, 32, 2, seed=7)
    x[0], x[1] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8]), torch.tensor([1 + 2**-11, 1 + 3 * 2**-11])
    x[2] = torch.tensor([torch.inf, -torch.inf])
    out = torch.zeros(32, 2, dtype=dtype)
    check(host, host.run_pack(dtype == torch.float16, ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())))
    assert torch.equal(out, x.to(dtype))


@pytest.mark.parametrize("seed", range(3))
def test_votes(host, seed):
    votes = torch.rand(32, generator=torch.Generator().manual_seed(seed)) < (0.5, 0.0, 2.0)[seed]
    out = torch.zeros(32, 4, dtype=torch.int64).to(torch.uint32)
    check(host, host.run_vote(ctypes.c_void_p(votes.data_ptr()), ctypes.c_void_p(out.data_ptr())))
    ballot = sum(1 << lane for lane in LANES if votes[lane])
    rows = [[ballot, votes.any().item(), votes.all().item(), (lane + 5) % 32] for lane in LANES]
    assert out.tolist() == rows


def test_lanes_at_different_instructions_are_an_error(host):
    out = torch.zeros(32, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="different instructions"):
        check(host, host.run_part_ways(ctypes.c_void_p(out.data_ptr())))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_ptx_assembles(tmp_path):
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("75", "80", "90a")]
    command = ["nvcc", "-std=c++17", *targets, "--fatbin", "-o", tmp_path / "instructions", HERE / "instructions.cu"]
    subprocess.run(command, check=True)
