"""The product of a packed matrix, against float64, on every device that is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sparse_matrices import DEVICES, DTYPES, SHAPES, assert_close, on, product, random_weight, sparse_weight, tailed
from thanos.sparse.encoding import encode
from thanos.sparse.formats import decode
from thanos.sparse.kernels import cpu
from thanos.sparse.kernels.tuned import device_settings
from thanos.sparse.modules import PackedLinear
from thanos.sparse.ops import packed_linear, packed_linears


@pytest.fixture
def library_adds_in_float32() -> Iterator[None]:
    """Many tokens are multiplied by the library, which may add partial sums of its own in 16 bits unless told not to."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction, settings.allow_fp16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = settings.allow_fp16_reduced_precision_reduction = False
    yield
    settings.allow_bf16_reduced_precision_reduction, settings.allow_fp16_reduced_precision_reduction = before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 5, 20, 40, 300])
@pytest.mark.usefixtures("library_adds_in_float32")
def test_the_product_is_that_of_the_dense_matrix(shape, dtype, tokens, device):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, shape[1], generator=draw).to(dtype)
    bias = torch.randn(shape[0], generator=draw).to(dtype)
    random = random_weight(*shape, 0.6, dtype=dtype)
    for weight, pack in ((sparse_weight(*shape, dtype=dtype), encode), (random, encode), (random, tailed)):
        packed = on(pack(weight), device)
        by_library = device == "cuda" and tokens > device_settings(torch.cuda.get_device_name()).most_tokens
        for one in (None, bias):
            held = None if one is None else one.to(device)
            got = product(packed, x.to(device), held)
            assert_close(got, weight, x, one, rounded=by_library)
            if by_library:
                assert torch.equal(got, F.linear(x.to(device), weight.to(device), held))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", range(1, 32))
def test_every_count_of_32(n, device):
    weight = sparse_weight(70, 300, n=n, dtype=DTYPES[n % 2], seed=n)
    packed = on(encode(weight), device)
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(n)).to(weight.dtype)
    assert_close(product(packed, x.to(device)), weight, x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.99, 1.0])
def test_every_sparsity_with_empty_and_full_rows(sparsity, device):
    weight = random_weight(80, 200, sparsity)
    weight[7], weight[40], weight[:, 33] = 0, 0.5, 0
    weight[32:64, 64:96] = 0
    packed = on(encode(weight), device)
    x = torch.randn(1, 200, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert_close(product(packed, x.to(device)), weight, x)
    assert product(packed, x.to(device))[0, 7] == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_the_rows_that_read_it(value, device):
    weight = sparse_weight(64, 96)
    x = torch.randn(1, 96, generator=torch.Generator().manual_seed(5)).bfloat16()
    x[0, 40] = value
    got = product(on(encode(weight), device), x.to(device)).cpu()[0]
    reads = weight[:, 40] != 0
    assert not got[reads].isfinite().any()


@pytest.mark.parametrize("device", DEVICES)
def test_other_dimensions_and_strides_of_the_input(device):
    weight = sparse_weight(64, 96)
    packed = on(encode(weight), device)
    x = torch.randn(3, 96, 2, generator=torch.Generator().manual_seed(5)).bfloat16().to(device).transpose(1, 2)
    got = product(packed, x)
    assert got.shape == (3, 2, 64)
    assert_close(got.reshape(6, 64), weight, x.reshape(6, 96))
    assert product(packed, x[:0]).shape == (0, 2, 64)
    assert product(packed, x[0, 0]).shape == (64,)


needs_extension = pytest.mark.skipif(bool(cpu.lacking()), reason=cpu.lacking())


@needs_extension
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dot", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_extension_and_the_plain_way_are_the_float64_product(shape, dot, dtype, monkeypatch):
    draw = torch.Generator().manual_seed(2)
    x, bias = torch.randn(3, shape[1], generator=draw).to(dtype), torch.randn(shape[0], generator=draw).to(dtype)
    for weight, pack in (
        (sparse_weight(*shape, dtype=dtype), encode),
        (random_weight(*shape, 0.7, dtype=dtype), tailed),
    ):
        packed = pack(weight)
        got = cpu.linear(x, packed.words, packed.offsets, bias, shape[0], packed.spec.n, dot=dot)
        assert_close(got, weight, x, bias)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "lacking", lambda: "as if it were not built")
            assert_close(product(packed, x, bias), weight, x, bias)


@needs_extension
def test_the_extension_gives_a_token_the_same_bits_with_any_batch_and_threads():
    threads = torch.get_num_threads()
    for packed in (encode(sparse_weight(640, 1000)), tailed(random_weight(640, 1000, 0.6))):
        x = torch.randn(cpu.MOST_TOKENS, 1000, generator=torch.Generator().manual_seed(6)).bfloat16()
        whole = product(packed, x)
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                assert torch.equal(torch.cat([product(packed, row[None]) for row in x]), whole)
        finally:
            torch.set_num_threads(threads)


@needs_extension
def test_the_extension_rounds_what_is_not_finite_and_too_large():
    weight = torch.zeros(32, 32, dtype=torch.float16)
    weight[:, 0] = 60000
    weight[3, 0], weight[4, 0] = float("nan"), float("inf")
    packed = encode(weight)
    y = product(packed, torch.full((1, 32), 2.0, dtype=torch.float16))[0]
    assert y[3].isnan()
    assert torch.isinf(y[[0, 4, 31]]).all()
    assert product(encode(weight.bfloat16()), torch.full((1, 32), 2.0).bfloat16())[0, 3].isnan()


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bitmap", [False, True])
def test_arguments_that_do_not_fit_together_are_refused_before_anything_is_read(bitmap, device, tokens):
    packed = on(encode(random_weight(64, 96, 0.7) if bitmap else sparse_weight(64, 96)), device)
    words, offsets, n = packed.words, packed.offsets, packed.spec.n
    x, bias = torch.ones(tokens, 96).bfloat16().to(device), torch.ones(64).bfloat16().to(device)
    ends = torch.zeros(7, dtype=torch.int32, device=device)
    for changed in (
        (x[:, :64], words, offsets, bias, 64, n),
        (x.repeat(1, 2), words, offsets, bias, 64, n),
        (x.float(), words, offsets, None, 64, n),
        (x[0, 0], words, offsets, bias, 64, n),
        (x, words, offsets, bias.half(), 64, n),
        (x, words, offsets, bias[:63], 64, n),
        (x, words, offsets, bias.repeat(2)[::2], 64, n),
        (x, words, offsets, bias, 63, n),
        (x, words, offsets, None, 97, n),
        (x, words.view(2, -1), offsets, bias, 64, n),
        (x, words.repeat(2)[::2], offsets, bias, 64, n),
        (x, words.float(), offsets, bias, 64, n),
        (x, words, offsets, bias, 64, n + 1),
        (x, words[1:], ends[:6], bias, 64, n),
        (x, words, None if bitmap else ends, bias, 64, n),
        (x, words, ends.long(), bias, 64, 0),
        (x, words, ends[:6], bias, 64, 0),
    ):
        with pytest.raises(RuntimeError, match="does not fit a packed matrix"):
            packed_linear(*changed)
        several: list[Any] = [changed[0], *([one] for one in changed[1:5]), changed[5]]
        with pytest.raises(RuntimeError, match="does not fit a packed matrix"):
            packed_linears(*several)
    if device == "meta":
        with pytest.raises(RuntimeError, match="at most 4"):
            packed_linears(x, [words] * 5, [offsets] * 5, [None] * 5, [64] * 5, n)


@pytest.mark.parametrize("columns", [64, 95, 97, 192])
def test_a_layer_refuses_an_input_of_another_width(columns):
    packed = encode(sparse_weight(64, 96))
    module = PackedLinear(packed.spec, bias=False)
    module.load_state_dict({"weight_words": packed.words})
    with pytest.raises(RuntimeError, match=f"of 96 inputs got an input of shape \\(2, {columns}\\)"):
        module(torch.ones(2, columns).bfloat16())


def test_the_operator_follows_the_rules_of_torch():
    for weight in (sparse_weight(40, 70), random_weight(40, 70, 0.6)):
        packed = encode(weight)
        x, bias = torch.randn(3, 70).bfloat16(), torch.randn(40).bfloat16()
        arguments = (x, packed.words, packed.offsets, bias, packed.spec.rows, packed.spec.n)
        torch.library.opcheck(
            torch.ops.thanos.packed_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize(
    ("name", "where", "value"),
    [
        ("weight_words", 3, -1),
        ("weight_offsets", 2, 10**6),
        ("weight_offsets", 0, -1),
        ("weight_words", slice(1, None), None),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_takes_no_tensors_that_a_kernel_cannot_read(assign, name, where, value):
    packed = encode(random_weight(64, 96, 0.7))
    assert packed.offsets is not None
    module = PackedLinear(packed.spec, bias=False)
    state = {"weight_words": packed.words, "weight_offsets": packed.offsets}
    module.load_state_dict(state, assign=assign)
    changed = state[name].clone()
    if value is None:
        changed = changed[where]
    else:
        changed[where] = value
    with pytest.raises(RuntimeError, match="the packed model is damaged"):
        module.load_state_dict({**state, name: changed}, assign=assign)
    with pytest.raises(RuntimeError, match="the packed model is damaged"):
        module.load_state_dict({name: changed}, assign=assign, strict=False)
    assert torch.equal(module.weight_words, packed.words)
    assert torch.equal(decode(module.packed), decode(packed))


def test_a_compiled_module_gives_the_same():
    weight = sparse_weight(64, 96)
    packed = encode(weight)
    module = PackedLinear(packed.spec, bias=True)
    module.load_state_dict({"weight_words": packed.words, "bias": torch.randn(64).bfloat16()})
    x = torch.randn(2, 96).bfloat16()
    compiled = torch.compile(lambda x: module(x).float() + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), module(x).float() + 1)


def test_a_module_is_a_linear_layer_that_knows_its_weight():
    weight = sparse_weight(64, 96)
    packed = encode(weight)
    module = PackedLinear(packed.spec, bias=False)
    module.load_state_dict({"weight_words": packed.words})
    assert torch.equal(module.weight, weight)
    assert "16:32" in repr(module)
    x = torch.randn(2, 96).bfloat16()
    assert torch.equal(module.dense()(x), F.linear(x, weight))
    with pytest.raises(TypeError, match="dequantize"):
        module(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(module(x.float()), weight, x)
