"""varlen_attention's CUDA kernel, compiled by the host compiler and run on the CPU: against float64, beside torch's own
attention in the dtype of the products; what it may read and write; the same bits in any order of threads. Where there
is a GPU, the same cases run on it too."""

import pytest
import torch
import torch.nn.functional as F

from kdkernels import reference

from .cuda_host import PLACES, threads_reversed
from .cuda_host.varlen_attention import Host
from .test_guard_pages import beside_a_guard
from .test_varlen_attention import attention, draw

pytestmark = pytest.mark.usefixtures("one_thread")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Lengths, heads, size of a head: empty ones, one token, tiles of 64 filled, begun and one short, every padded size.
SHAPES = [
    ((5,), 2, 16),
    ((1, 0, 63, 97), 2, 26),
    ((128, 64), 1, 64),
    ((17, 3), 1, 6),
    ((70,), 1, 80),
    ((129, 1), 1, 128),
    ((0,), 1, 8),
    ((), 1, 8),
]


class Gpu:
    """The op on a GPU, called as `Host` is."""

    def attention(self, q, k, v, cu_seqlens, heads, scale):
        inputs = (x.cuda() for x in (q, k, v, cu_seqlens))
        return torch.ops.kdkernels.varlen_attention(*inputs, heads, scale).cpu()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return Host(tmp_path_factory.mktemp("varlen_attention"))


@pytest.fixture(params=PLACES)
def device(request):
    return request.getfixturevalue("host") if request.param == "host" else Gpu()


def room_behind(x, rows, value):
    """x in a tensor with `rows` more, which hold `value`."""
    return torch.cat([x, torch.full((rows, x.shape[1]), value, dtype=x.dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(device, shape, dtype):
    """No further from float64 than torch's attention in bf16 (of float32 inputs too) or fp16."""
    q, k, v, *rest = draw(*shape, dtype)
    got = device.attention(q, k, v, *rest)
    assert got.dtype == dtype
    truth = reference.varlen_attention(q.double(), k.double(), v.double(), *rest)
    if truth.numel() == 0:
        return
    products = torch.bfloat16 if dtype == torch.float32 else dtype
    peer = reference.varlen_attention(*(x.to(products) for x in (q, k, v)), *rest)
    error, of_peer = (got.double() - truth).abs(), (peer.double() - truth).abs()
    assert error.max() <= 1.1 * of_peer.max() and error.square().mean() <= 1.1 * of_peer.square().mean()


def test_lanes_meet_no_bank_twice(host):
    before = host.library.host_bank_conflicts()
    for size in (32, 64, 96, 128):
        host.attention(*draw((70,), 1, size, torch.bfloat16))
    assert host.library.host_bank_conflicts() == before


@pytest.mark.parametrize("lengths", [(63, 2, 63, 2, 65, 1, 0, 64, 64), (3, 0, 1, 2) * 20, (0, 0, 1) * 400])
def test_every_query_of_any_lengths_is_served(device, lengths):
    """Equal scores: the mean of the values, which are small integers, exact but for one division."""
    _, _, v, cumulative, *rest = draw(lengths, 1, 8)
    v = v.round()
    got = device.attention(torch.zeros_like(v), v, v, cumulative, *rest)
    means = [own.mean(0).expand(len(own), -1) for own in v.split(lengths)]
    torch.testing.assert_close(got, torch.cat(means), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_room_behind_the_tokens_is_not_touched(host, dtype):
    """The same bits whatever it holds; and finite values there don't show either: those rows stay NaN."""
    q, k, v, *rest = draw((70, 5), 2, 20, dtype)
    expected = host.attention(q, k, v, *rest)
    for value in (torch.nan, 7.0):
        got = host.attention(*(room_behind(x, 130, value) for x in (q, k, v)), *rest)
        assert torch.equal(got[:75], expected) and got[75:].isnan().all()


@pytest.mark.parametrize("size", [8, 26])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beside_the_inputs_is_read(host, dtype, size):
    """Each lies against a page whose touch ends the process; and lengths that are nonsense change nothing of that."""
    q, k, v, cumulative, *rest = draw((66, 3), 1, size, dtype)
    generator = torch.Generator().manual_seed(0)
    nonsense = [torch.randint(-50, 150, (count,), generator=generator) for count in (3, 3, 40, 90)]
    nonsense += [cumulative, torch.tensor([-(2**31), 2**31 - 1, 0])]
    for side in ("behind", "before"):
        for bounds in nonsense:
            inputs = (beside_a_guard(x, side) for x in (q, k, v, bounds.int()))
            host.attention(*inputs, *rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_are_followed(device, dtype):
    q, k, v, *rest = draw((40, 30), 2, 8, dtype)
    expected = device.attention(q, k, v, *rest)
    joint = torch.stack([q, k, v], 1)
    assert torch.equal(device.attention(*joint.unbind(1), *rest), expected)
    assert torch.equal(device.attention(*(x.t().contiguous().t() for x in (q, k, v)), *rest), expected)
    misaligned = (torch.cat([x[:, :1], x], 1)[:, 1:] for x in (q, k, v))
    assert torch.equal(device.attention(*misaligned, *rest), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_of_another_type(host, dtype):
    arguments = draw((30,), 2, 10)
    wide = host.attention(*arguments)
    assert torch.equal(host.attention(*arguments, out_dtype=dtype), wide.to(dtype))


def test_output_in_the_place_of_the_queries(host):
    q, k, v, *rest = draw((70, 130), 2, 16)
    expected = host.attention(q, k, v, *rest)
    assert torch.equal(host.attention(q, k, v, *rest, in_place=True), expected)


def test_the_order_of_threads_does_not_show(host):
    arguments = draw((100, 3, 150), 2, 16)
    expected = host.attention(*arguments)
    with threads_reversed(host.library):
        assert torch.equal(host.attention(*arguments), expected)


def test_a_sequence_does_not_see_the_others(device):
    q, k, v, cumulative, *rest = draw((7, 70, 5), 2, 16)
    k[3], v[80] = torch.nan, torch.inf
    got = device.attention(q, k, v, cumulative, *rest)
    assert got[:7].isnan().all() and got[7:77].isfinite().all() and not got[77:].isfinite().any()
    alone = (x[7:77] for x in (q, k, v))
    assert torch.equal(device.attention(*alone, torch.tensor([0, 70], dtype=torch.int32), *rest), got[7:77])


def test_scores_of_minus_infinity(device):
    """A whole tile of keys of them weighs nothing; where there is nothing else, there is no softmax."""
    q, k, v, _, *rest = draw((140,), 1, 8)
    q, k = q.abs(), k.abs()
    k[:130, 0] = -torch.inf
    whole, last = (torch.tensor([0, tokens], dtype=torch.int32) for tokens in (140, 10))
    got = device.attention(q, k, v, whole, *rest)
    expected = device.attention(q[130:], k[130:], v[130:], last, *rest)
    torch.testing.assert_close(got[130:], expected, rtol=1e-6, atol=1e-6)
    k[:, 0] = -torch.inf
    assert device.attention(q, k, v, whole, *rest).isnan().all()


def test_heads_too_large_are_refused(host):
    with pytest.raises(RuntimeError, match="invalid argument"):
        host.attention(*draw((3,), 1, 129))


def packed_tokens(lengths, capacity, heads=12, size=64, dtype=torch.bfloat16):
    """q, k, v with NaN behind the last token, cu_seqlens, heads, scale."""
    generator = torch.Generator("cuda").manual_seed(0)
    real = [torch.randn(sum(lengths), heads * size, generator=generator, device="cuda") for _ in range(3)]
    padded = (F.pad(x, (0, 0, 0, capacity - len(x)), value=torch.nan).to(dtype) for x in real)
    return *padded, torch.tensor([0, *lengths], device="cuda").cumsum(0).int(), heads, size**-0.5


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(128,) * 32, tuple(range(200)), (4096, 1, 700), (1,) * 5000], ids=len)
def test_real_sizes_on_gpu(lengths, dtype):
    """No further from float64 than torch's in the dtype of the products, and the same bits on every run."""
    q, k, v, *rest = packed_tokens(lengths, sum(lengths) + 100, dtype=dtype)
    got, real = attention(q, k, v, *rest), sum(lengths)
    products = torch.bfloat16 if dtype == torch.float32 else dtype
    truth = reference.varlen_attention(q.double(), k.double(), v.double(), *rest)[:real]
    peer = reference.varlen_attention(*(x.to(products) for x in (q, k, v)), *rest)[:real]
    error, of_peer = (got[:real].double() - truth).abs(), (peer.double() - truth).abs()
    assert error.max() <= 1.2 * of_peer.max() and error.square().mean() <= 1.2 * of_peer.square().mean()
    for _ in range(3):
        assert torch.equal(attention(q, k, v, *rest)[:real], got[:real])


@needs_gpu
def test_gpu_replays_a_graph_with_other_lengths():
    """What cu_seqlens holds at the replay is what counts: the grid was sized for any lengths."""
    q, k, v, bounds, *rest = packed_tokens((60, 0, 100, 40), 300)
    attention(q, k, v, bounds, *rest)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, bounds, *rest)
    for x in (q, k, v):
        x.nan_to_num_(0.5)
    bounds.copy_(torch.tensor([0, 1, 190, 190, 300]))
    graph.replay()
    assert torch.equal(out, attention(q, k, v, bounds, *rest))
    assert out.isfinite().all()


@needs_gpu
def test_two_streams_on_gpu():
    inputs = [packed_tokens((128,) * 8, 1024, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    expected, results = [attention(*arguments) for arguments in inputs], []
    late = [torch.zeros_like(arguments[1]) for arguments in inputs]
    for stream, (q, k, *rest), empty in zip([torch.cuda.Stream() for _ in inputs], inputs, late, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            results.append(attention(q, empty.copy_(k), *rest))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@needs_gpu
def test_gpu_is_never_waited_for():
    arguments = packed_tokens((70, 3), 100)
    attention(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, b, h, s: (q, k.float(), v, b, h, s), "must have one dtype on CUDA"),
        (lambda q, k, v, b, h, s: (q, k, v, b.cpu(), h, s), "must be on q's device"),
        (lambda q, k, v, b, h, s: (q, k, v, b, 1, s), "at most 128 features, got 768"),
    ],
)
def test_what_gpu_does_not_serve_is_an_error(change, message):
    with pytest.raises(RuntimeError, match=message):
        attention(*change(*packed_tokens((4,), 4)))


@needs_gpu
def test_opcheck_on_gpu():
    torch.library.opcheck(torch.ops.kdkernels.varlen_attention.default, packed_tokens((4, 0, 3), 7, 2, 8))
