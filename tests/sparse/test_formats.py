"""Encoding and decoding, against an oracle that reads the stored words one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_matrices import random_weight, same_bits, sparse_weight, tailed
from thanos.sparse import encoding, formats
from thanos.sparse.encoding import choose_format, count_entries, encode
from thanos.sparse.formats import PackedWeight, decode, decode_strips, padding_is_zero
from thanos.sparse.kernels import encoder

DTYPES = (torch.bfloat16, torch.float16)


def read_words(packed: PackedWeight) -> Tensor:
    """The dense matrix's bits, read value by value from the documented layout."""
    spec = packed.spec
    words = [word & 0xFFFFFFFF for word in packed.words.tolist()]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    out = torch.zeros(spec.strips * 32, spec.tiles * 32, dtype=torch.int64)
    for strip in range(spec.strips):
        for tile in range(spec.tiles):
            index = strip * spec.tiles + tile
            if packed.offsets is None:
                first, n, tail = index * (32 + 16 * spec.n), spec.n, 0
            else:
                begin, end = packed.offsets[index : index + 2].tolist()
                first, tail = 16 * (begin // 4), begin % 4
                n = end // 4 - begin // 4 - 2 - tail
            rest = halves[2 * (first + 32 + 16 * n) : 2 * (first + 32 + 16 * (n + tail))]
            for row in range(32):
                mask, value = words[first + row], 2 * (first + 32)
                columns = [column for column in range(32) if mask >> (31 - column) & 1]
                assert len(columns) >= n
                for column in columns[n:]:
                    out[strip * 32 + row, tile * 32 + column] = rest.pop(0)
                columns, taken = columns[:n], 0
                for size in (8,) * (n // 8) + tuple(size for size in (4, 2, 1) if n & size):
                    for column, half in zip(
                        columns[taken : taken + size],
                        halves[value + row * size : value + (row + 1) * size],
                        strict=True,
                    ):
                        out[strip * 32 + row, tile * 32 + column] = half
                    value, taken = value + 32 * size, taken + size
            assert len(rest) < 32
            assert not any(rest)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", range(1, 32))
def test_a_fixed_count_round_trips_and_has_the_documented_layout(n, dtype):
    weight = sparse_weight(40, 64, n=n, dtype=dtype, seed=n)
    packed = encode(weight)
    assert packed.spec.format == "fixed"
    assert packed.spec.n == n
    assert packed.spec.nbytes == packed.words.numel() * 4 == 2 * 2 * (128 + 64 * n)
    assert same_bits(decode(packed), weight)
    expected = torch.zeros(64, 64, dtype=torch.int64)
    expected[:40] = weight.view(torch.int16).long() & 0xFFFF
    assert torch.equal(read_words(packed), expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 32), (32, 1), (31, 33), (33, 31), (64, 96), (100, 70), (5, 300)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_matrix_round_trips(shape, sparsity, dtype):
    draw = torch.Generator().manual_seed(7)
    weight = torch.randn(shape, generator=draw).to(dtype)
    weight[torch.rand(shape, generator=draw) < sparsity] = 0
    packed = encode(weight)
    assert packed.words.dtype == torch.int32
    assert packed.words.shape == (packed.spec.words,)
    assert (0 if packed.offsets is None else packed.offsets.numel()) == packed.spec.offsets
    assert same_bits(decode(packed), weight)
    assert padding_is_zero(packed)
    expected = torch.zeros(packed.spec.strips * 32, packed.spec.tiles * 32, dtype=torch.int64)
    expected[: shape[0], : shape[1]] = weight.view(torch.int16).long() & 0xFFFF
    assert torch.equal(read_words(packed), expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 16), (16, 32), (1, 4), (1, 2)])
def test_every_pattern_whose_width_divides_32_has_a_fixed_count(n, m):
    packed = encode(sparse_weight(64, 128, n=n, m=m))
    assert packed.spec.format == "fixed"
    assert packed.spec.n == n * 32 // m
    assert packed.spec.nbytes / packed.spec.dense_bytes == (2 + packed.spec.n) / 32


def test_values_that_are_not_numbers_keep_their_bits():
    weight = sparse_weight(64, 64)
    bits = weight.view(torch.int16)
    special = torch.tensor(
        [-32768, 0x7FC1, -1, 0x7F80, -128, 1], dtype=torch.int16
    )  # -0, NaN, NaN, inf, -inf, subnormal
    bits[0, bits[0].nonzero()[:6, 0]] = special
    packed = encode(weight)
    assert packed.spec.n == 16
    assert same_bits(decode(packed), weight)


def test_a_negative_zero_counts_as_an_entry():
    weight = sparse_weight(32, 32, n=4)
    column = (weight[3] == 0).nonzero()[0, 0]
    weight[3, column] = -0.0
    packed = encode(weight)
    assert packed.spec.n == 5
    assert same_bits(decode(packed), weight)


def smallest(counts: list[int]) -> tuple[int, int]:
    """n and the tail's units for rows with these numbers of values: the fewest units, where a tail counts as eight more."""
    sizes = {n: -(-sum(max(0, count - n) for count in counts) // 32) for n in range(33)}
    n = min((n for n in sizes if sizes[n] <= 2), key=lambda n: (n + sizes[n] + 8 * (sizes[n] > 0), -n))
    return n, sizes[n]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_every_tile_takes_the_fewest_units_and_a_tail_only_where_it_pays(sparsity):
    weight = random_weight(128, 256, sparsity)
    weight[3, 32:64] = 1.0  # a full row among others
    kept = (weight != 0).view(4, 32, 8, 32).sum(-1)
    counts = count_entries(weight)
    assert counts.shape == (3, 4, 8)
    assert torch.equal(counts[0].long(), kept.amax(1))
    for strip in range(4):
        for tile in range(8):
            assert (*counts[1:, strip, tile].tolist(),) == smallest(kept[strip, :, tile].tolist())


def test_the_format_with_fewer_bytes_is_chosen():
    weight = random_weight(128, 256, 0.6)
    kept = (weight != 0).view(4, 32, 8, 32).sum(-1)
    spec = choose_format(count_entries(weight), (128, 256), weight.dtype)
    units = sum(2 + sum(smallest(kept[strip, :, tile].tolist())) for strip in range(4) for tile in range(8))
    assert spec.format == "bitmap"
    assert spec.nbytes == 64 * units + 4 * (4 * 8 + 1)
    assert spec.nbytes < 32 * (128 + 64 * int(kept.max()))
    assert encode(weight).spec == spec


@pytest.mark.parametrize(("sparsity", "share", "fewest"), [(0.5, 0.745, 0.6), (0.6, 0.646, 0.495), (0.7, 0.537, 0.39)])
def test_random_matrices_take_the_documented_bytes(sparsity, share, fewest):
    weight = random_weight(512, 512, sparsity)
    for spec, expected in ((encode(weight).spec, share), (tailed(weight).spec, fewest)):
        assert spec.format == "bitmap"
        assert spec.nbytes / spec.dense_bytes == pytest.approx(expected, abs=0.01)


def test_few_long_rows_go_into_tails():
    weight = random_weight(512, 512, 0.7)
    random = encode(weight).spec
    weight[::32] = 0.5  # a row of each strip
    packed = encode(weight)
    assert packed.offsets is not None
    assert bool((packed.offsets[:-1] & 3 > 0).all())
    assert packed.spec.nbytes < 1.1 * random.nbytes
    assert same_bits(decode(packed), weight)


@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (64, 96), (100, 70)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.95, 1.0])
def test_tails_round_trip_and_have_the_documented_layout(shape, sparsity):
    weight = random_weight(*shape, sparsity)
    packed = tailed(weight)
    assert same_bits(decode(packed), weight)
    expected = torch.zeros(packed.spec.strips * 32, packed.spec.tiles * 32, dtype=torch.int64)
    expected[: shape[0], : shape[1]] = weight.view(torch.int16).long() & 0xFFFF
    assert torch.equal(read_words(packed), expected)


def test_a_matrix_that_is_too_large_for_offsets_has_no_bitmap_format(monkeypatch):
    sparse, dense = random_weight(64, 96, 0.7), random_weight(64, 96, 0.0)
    spec = choose_format(count_entries(sparse), (64, 96), sparse.dtype)
    monkeypatch.setattr(encoding, "MOST_UNITS", spec.words // 16)
    assert choose_format(count_entries(sparse), (64, 96), sparse.dtype) == spec
    monkeypatch.setattr(encoding, "MOST_UNITS", spec.words // 16 - 1)
    assert choose_format(count_entries(sparse), (64, 96), sparse.dtype).format == "fixed"
    assert choose_format(count_entries(dense), (64, 96), sparse.dtype).n == 32
    assert 4 * formats.MOST_UNITS + 3 < 1 << 31


def test_a_count_that_is_too_small_is_refused():
    weight = sparse_weight(32, 64, n=16)
    spec = choose_format(count_entries(sparse_weight(32, 64, n=15)), (32, 64), weight.dtype)
    with pytest.raises(ValueError, match="holds 16 entries, more than n = 15"):
        encode(weight, spec)


def test_strips_are_the_rows_of_the_matrix():
    weight = sparse_weight(70, 64)
    packed = encode(weight)
    assert same_bits(decode_strips(packed, 1, 3), weight[32:])
    assert same_bits(decode_strips(packed, 0, 1), weight[:32])


def test_a_matrix_of_several_chunks_round_trips(monkeypatch):
    monkeypatch.setattr(formats, "CHUNK_ENTRIES", 1 << 12)
    for weight in (sparse_weight(200, 96), sparse_weight(200, 90, n=9, m=40)):
        assert same_bits(decode(encode(weight)), weight)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 70), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_round_trip_of_random_bits(rows, columns, share, seed):
    draw = torch.Generator().manual_seed(seed)
    bits = torch.randint(-32768, 32768, (rows, columns), generator=draw, dtype=torch.int16)
    bits[torch.rand(rows, columns, generator=draw) < share] = 0
    weight = bits.view(torch.float16)
    assert same_bits(decode(encode(weight)), weight)


def special(weight: Tensor) -> Tensor:
    """The same with entries that are not numbers, negative zeros, empty and full rows."""
    weight[0] = 0
    weight[-1, : weight.shape[1] // 2] = 1.5
    weight[len(weight) // 2, 0] = float("nan")
    weight[len(weight) // 2, -1] = -0.0
    return weight


@pytest.mark.skipif(not encoder.available(torch.zeros(1, dtype=torch.float16)), reason="the extension was not built")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (33, 31), (64, 96), (100, 1000), (257, 129)])
def test_the_extension_and_the_plain_way_write_the_same_words(shape, dtype, monkeypatch):
    for sparsity in (0.0, 0.3, 0.6, 0.95, 1.0):
        weight = special(random_weight(*shape, sparsity, dtype=dtype))
        for one in (weight, weight.T.contiguous().T):
            counts, packed = count_entries(one), encode(one)
            with monkeypatch.context() as patch:
                patch.setattr(encoder, "available", lambda weight: False)
                assert torch.equal(counts, count_entries(weight))
                plain, others = encode(weight), tailed(weight)
            assert torch.equal(others.words, tailed(weight).words)
            assert packed.spec == plain.spec
            assert torch.equal(packed.words, plain.words)
            assert (packed.offsets is None) == (plain.offsets is None)
            assert packed.offsets is None or torch.equal(packed.offsets, plain.offsets)


def test_counts_that_do_not_suit_the_matrix_are_refused(monkeypatch):
    weight = random_weight(64, 96, 0.5)
    counts = count_entries(weight)
    spec = choose_format(counts, (64, 96), weight.dtype)
    assert spec.format == "bitmap"
    lacking = [counts.clone() for _ in range(3)]
    lacking[0][1] -= 1
    lacking[1][1, 0, 0] = counts[1, 0, 0] - 3
    lacking[2][1], lacking[2][2] = 3, 2  # fewer than two units hold the rest
    for available in (encoder.available(weight), False):
        monkeypatch.setattr(encoder, "available", lambda weight, available=available: available)
        for changed in lacking:
            with pytest.raises((ValueError, RuntimeError)):
                encode(weight, spec, changed)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_word(threads, monkeypatch):
    weight = random_weight(2048, 4096, 0.6)
    expected = encode(weight)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for available in (encoder.available(weight), False):
            monkeypatch.setattr(encoder, "available", lambda weight, available=available: available)
            packed = encode(weight)
            assert torch.equal(packed.words, expected.words)
            assert same_bits(decode(packed), weight)
    finally:
        torch.set_num_threads(before)
