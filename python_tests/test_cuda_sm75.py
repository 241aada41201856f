"""The CUDA kernels with the instructions and limits of sm_75, on the CPU: smaller products, no bf16, copies through
registers, 64 KB of shared memory a block. The cases are other files', the fewest that go through every kernel."""

import pytest
import torch

from kdkernels.quant import Scheme

from . import test_cuda_encoder as encoder
from . import test_cuda_quant_linear as products
from . import test_cuda_varlen_attention as attention
from .cuda_host.encoder import Host

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return Host(tmp_path_factory.mktemp("sm_75"), arch=75)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_integer_products(host, bits):
    for tile in (32, 64, 128):
        products.test_integer_sums_are_exact(host, bits, tile, reverse=tile == 64)
    products.test_integer_sums_of_few_rows_are_exact(host, bits, reverse=False)


def test_zeros_and_segments(host):
    products.test_scheme(host, Scheme(8, "block", 32, symmetric=False))


@pytest.mark.parametrize("scheme", products.WEIGHT_ONLY[::5], ids=products.name)
def test_weight_only(host, scheme):
    """float32 and bf16 without tensor cores, with fp32's errors; fp16 with them."""
    products.test_weight_only(host, scheme)


def test_weight_only_in_any_strides_and_order(host):
    products.test_weight_only_sums_in_any_order_of_threads(host, 4)


def test_weight_only_what_is_not_finite(host):
    products.test_weight_only_keeps_what_is_not_finite_in_its_row(host, 8)


@pytest.mark.parametrize("dtype", attention.DTYPES, ids=str)
def test_attention(host, dtype):
    """Every size of a head in fp16; in the others, whose products take 64 shuffles each, one with two tiles of keys."""
    for shape in attention.SHAPES if dtype == torch.float16 else [((66, 1), 1, 26)]:
        attention.test_values(host, shape, dtype)


def test_attention_reads_nothing_beside_its_inputs(host):
    attention.test_nothing_beside_the_inputs_is_read(host, torch.float16, 26)


def test_lanes_meet_no_bank_twice(host):
    attention.test_lanes_meet_no_bank_twice(host)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_encoder(host, dtype):
    encoder.test_encoder(host, Scheme(4, "block", 32), encoder.SHAPES[0], dtype)
