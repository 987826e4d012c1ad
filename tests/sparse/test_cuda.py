"""The CUDA kernels, each with every division of its work, against float64. Shapes are small: they run under memcheck too."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_matrices import DTYPES, SHAPES, assert_close, on, product, random_weight, sparse_weight, tailed
from thanos.sparse.encoding import encode
from thanos.sparse.formats import PackedWeight, decode
from thanos.sparse.kernels.tuned import FEW, MANY, Launch, launch_for
from thanos.sparse.ops import packed_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"


def by_kernel(packed: PackedWeight, x: Tensor, family: str, launch: Launch, bias: Tensor | None = None) -> Tensor:
    from thanos.sparse.kernels.cuda import multiply

    most = 32 if len(x) % 2 else 16  # tokens of a pass: the bits are the same
    return multiply(
        x, [packed.words], [packed.offsets], [bias], [packed.spec.rows], packed.spec.n, family, launch, most
    )[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "launch", "tokens"),
    [
        (FEW, Launch(1, 1, 4), 1),
        (FEW, Launch(2, 2, 8), 2),
        (FEW, Launch(4, 4, 16), 7),
        (MANY, Launch(1, 1, 8), 1),
        (MANY, Launch(2, 2, 4), 8),
        (MANY, Launch(2, 4, 8), 13),
        (MANY, Launch(1, 8, 1), 33),
        (MANY, Launch(2, 1, 8), 20),
    ],
)
def test_every_kernel_is_the_float64_product(shape, dtype, family, launch, tokens):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, shape[1], generator=draw).to(dtype)
    bias = torch.randn(shape[0], generator=draw).to(dtype)
    random = random_weight(*shape, 0.6, dtype=dtype)
    for weight, pack in ((sparse_weight(*shape, dtype=dtype), encode), (random, encode), (random, tailed)):
        packed = on(pack(weight), DEVICE)
        assert_close(by_kernel(packed, x.to(DEVICE), family, launch, bias.to(DEVICE)), weight, x, bias)


@pytest.mark.parametrize("n", range(1, 32))
def test_every_count_of_32(n):
    from thanos.sparse.kernels.cuda import expand

    weight = sparse_weight(70, 320, n=n, dtype=DTYPES[n % 2], seed=n)
    packed = on(encode(weight), DEVICE)
    assert packed.spec.n == n
    x = torch.randn(9, 320, generator=torch.Generator().manual_seed(n)).to(weight.dtype)
    assert_close(by_kernel(packed, x[:1].to(DEVICE), FEW, Launch(2, 1, 4)), weight, x[:1])
    assert_close(by_kernel(packed, x.to(DEVICE), MANY, Launch(1, 1, 4)), weight, x)
    got = expand(packed.words, None, 0, 70, 320, n, weight.dtype)
    assert torch.equal(got.cpu().view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("shape", [(33, 31), (100, 1000), (257, 129), (64, 96)])
def test_the_device_expands_the_matrix_bit_by_bit(shape):
    from thanos.sparse.kernels.cuda import expand

    random = random_weight(*shape, 0.5, dtype=torch.float16)
    for weight, pack in ((sparse_weight(*shape), encode), (random, encode), (random, tailed)):
        packed = on(pack(weight), DEVICE)
        n = packed.spec.n
        got = expand(packed.words, packed.offsets, 0, *shape, n, weight.dtype)
        assert torch.equal(got.cpu().view(torch.int16), weight.view(torch.int16))
        part = expand(packed.words, packed.offsets, 1, shape[0] - 32, shape[1], n, weight.dtype)
        assert torch.equal(part.cpu().view(torch.int16), weight[32:].view(torch.int16))
        assert torch.equal(decode(packed).cpu().view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_library_multiplies_in_parts(parts):
    from thanos.sparse.kernels.cuda import by_library

    draw = torch.Generator().manual_seed(4)
    x, bias = torch.randn(70, 520, generator=draw).bfloat16(), torch.randn(1000, generator=draw).bfloat16()
    for weight in (sparse_weight(1000, 520), random_weight(1000, 520, 0.6)):
        packed = on(encode(weight), DEVICE)
        for one in (None, bias):
            held = None if one is None else one.to(DEVICE)
            got = by_library(x.to(DEVICE), packed.words, packed.offsets, held, 1000, packed.spec.n, parts)
            assert_close(got, weight, x, one, rounded=one is not None)
            if parts == 1:
                assert torch.equal(got, F.linear(x.to(DEVICE), weight.to(DEVICE), held))


def test_a_graph_replays_a_product_in_parts():
    from thanos.sparse.kernels.cuda import by_library

    weight = random_weight(1000, 520, 0.6)
    packed, x = on(encode(weight), DEVICE), torch.randn(70, 520, device=DEVICE).bfloat16()
    arguments = (packed.words, packed.offsets, None, 1000, 0, 4)
    by_library(x, *arguments)  # compiles, and makes the stream
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = by_library(x, *arguments)
    for _ in range(3):
        x.normal_()
        y.zero_()
        graph.replay()
        assert_close(y, weight, x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_kernel_for_few_tokens_reads_kept_columns_alone(value):
    weight = sparse_weight(64, 96)
    x = torch.randn(1, 96, generator=torch.Generator().manual_seed(5)).bfloat16()
    x[0, 40] = value
    got = by_kernel(on(encode(weight), DEVICE), x.to(DEVICE), FEW, Launch(2, 1, 4)).cpu()[0]
    reads = weight[:, 40] != 0
    assert not got[reads].isfinite().any()
    assert_close(got[~reads][None], weight[~reads], x.nan_to_num(0, 0, 0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_token(value):
    weight = sparse_weight(64, 96)
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(6)).bfloat16()
    x[3, 40] = value
    for family in (FEW, MANY):
        got = by_kernel(on(encode(weight), DEVICE), x.to(DEVICE), family, Launch(2, 1, 4)).cpu()
        assert not got[3, weight[:, 40] != 0].isfinite().any()
        others = [token for token in range(16) if token != 3]
        assert_close(got[others], weight, x[others])


@pytest.mark.parametrize("shape", [(64, 4096), (1024, 1024)])
@pytest.mark.parametrize("family", [FEW, MANY])
def test_a_token_has_the_same_bits_in_any_batch(shape, family):
    for weight in (sparse_weight(*shape), random_weight(*shape, 0.7)):
        packed = on(encode(weight), DEVICE)
        strips, tiles = shape[0] // 32, shape[1] // 32
        launch = launch_for(torch.cuda.get_device_name(), family, packed.spec.n, 18, strips, tiles)
        x = torch.randn(33, shape[1], device=DEVICE).bfloat16()
        whole = by_kernel(packed, x, family, launch)
        assert torch.equal(by_kernel(packed, x, family, launch), whole)
        for count in (1, 2, 3, 5, 8, 9, 16, 17):
            assert torch.equal(by_kernel(packed, x[:count], family, launch), whole[:count])
            other = torch.cat([x[:count], torch.randn_like(x)])[:20]
            assert torch.equal(by_kernel(packed, other, family, launch)[:count], whole[:count])


@pytest.mark.parametrize("tokens", [1, 16])
def test_a_graph_replays_the_product_and_reads_the_new_input(tokens):
    weight = sparse_weight(64, 4096)
    packed, x = on(encode(weight), DEVICE), torch.randn(tokens, 4096, device=DEVICE).bfloat16()
    product(packed, x)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(packed, x)
    for _ in range(3):
        x.normal_()
        y.zero_()
        graph.replay()
        assert torch.equal(y, product(packed, x))


def test_the_product_follows_the_current_stream():
    weight = sparse_weight(64, 4096)
    packed = on(encode(weight), DEVICE)
    x = torch.randn(1, 4096, device=DEVICE).bfloat16()
    expected = product(packed, x)
    side = torch.cuda.Stream()
    late = torch.zeros_like(x)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        got = product(packed, late)  # on another stream it would read zeros
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(got, expected)


def test_words_at_odd_addresses_are_read():
    weight = sparse_weight(64, 96)
    packed = encode(weight)
    words = torch.cat([packed.words[:1], packed.words]).to(DEVICE)[1:]
    x = torch.randn(1, 97, device=DEVICE).bfloat16()[:, 1:]
    for tokens in (1, 9, 70):
        batch = x.expand(tokens, 96)
        got = product(PackedWeight(packed.spec, words, None), batch)
        assert_close(got, weight, batch.cpu())


def test_matrices_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    weight = sparse_weight(64, 96)
    x = torch.randn(3, 96).bfloat16()
    with torch.cuda.device(0):
        assert_close(product(on(encode(weight), "cuda:1"), x.to("cuda:1")), weight, x)


def test_compilation_by_inductor():
    packed, x = on(encode(sparse_weight(64, 96)), DEVICE), torch.randn(2, 96, device=DEVICE).bfloat16()
    words, n = packed.words, packed.spec.n
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(lambda x: packed_linear(x, words, None, None, 64, n).float() + 1, fullgraph=True)
        got = compiled(x)
    assert torch.equal(got, product(packed, x).float() + 1)
