"""Checks of packed tensors: what passes them can be used, whatever it holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_matrices import random_weight, sparse_weight, tailed
from thanos.checkpoint.layout import TensorSpec
from thanos.errors import ModelError
from thanos.sparse.encoding import encode
from thanos.sparse.formats import PackedWeight, decode
from thanos.sparse.ops import packed_linear
from thanos.sparse.storage import check_stored, check_weight, parse_settings, settings_of, tensor_specs

PACKED = (encode(sparse_weight(40, 70)), tailed(random_weight(64, 96, 0.6)), encode(sparse_weight(64, 96)))

TAILED = PACKED[1]


def use(packed: PackedWeight) -> None:
    decode(packed)
    x = torch.ones(1, packed.spec.columns, dtype=packed.spec.dtype)
    packed_linear(x, packed.words, packed.offsets, None, packed.spec.rows, packed.spec.n)


@settings(max_examples=150, deadline=None)
@given(
    which=st.sampled_from(PACKED),
    where=st.integers(0, 10**6),
    value=st.integers(-(2**31), 2**31 - 1),
    masks=st.booleans(),
)
def test_a_changed_word_is_refused_or_harmless(which, where, value, masks):
    words = which.words.clone()
    words[where % 32 if masks else where % len(words)] = value
    changed = PackedWeight(which.spec, words, which.offsets)
    try:
        check_weight(changed, "layer")
    except ModelError:
        return
    use(changed)


@settings(max_examples=150, deadline=None)
@given(where=st.integers(0, 6), value=st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-5, 200)))
def test_a_changed_offset_is_refused_unless_it_is_the_same(where, value):
    packed = PACKED[1]
    assert packed.offsets is not None
    offsets = packed.offsets.clone()
    same = int(offsets[where]) == value
    offsets[where] = value
    changed = PackedWeight(packed.spec, packed.words, offsets)
    try:
        check_weight(changed, "layer")
    except ModelError:
        assert not same
        return
    use(changed)


def parts(packed: PackedWeight, tile: int) -> tuple[int, int, int, int]:
    """First word, n, units of the tail and values in the tail of a tile."""
    assert packed.offsets is not None
    begin, end = packed.offsets[tile : tile + 2].tolist()
    first, tail = 16 * (begin // 4), begin % 4
    n = end // 4 - begin // 4 - 2 - tail
    masks = [word & 0xFFFFFFFF for word in packed.words[first : first + 32].tolist()]
    return first, n, tail, sum(mask.bit_count() for mask in masks) - 32 * n


@pytest.mark.parametrize("tile", range(6))
def test_every_rule_of_a_tail_is_checked(tile):
    assert TAILED.offsets is not None
    first, n, tail, used = parts(TAILED, tile)
    assert tail
    assert 32 * (tail - 1) < used < 32 * tail  # the seed of this matrix
    words, offsets = TAILED.words.clone(), TAILED.offsets.clone()
    behind = words[first + 32 + 16 * n :].view(torch.int16)
    behind[used] = 1  # the first place that must be zero
    with pytest.raises(ModelError, match="values after the last one"):
        check_weight(PackedWeight(TAILED.spec, words, offsets), "layer")
    offsets[tile] -= tail  # as if the tail's units were n's
    with pytest.raises(ModelError, match="masks that do not suit"):
        check_weight(PackedWeight(TAILED.spec, TAILED.words, offsets), "layer")
    offsets[tile] += 3
    with pytest.raises(ModelError, match="offsets that do not suit"):
        check_weight(PackedWeight(TAILED.spec, TAILED.words, offsets), "layer")
    for row in range(32):
        words = TAILED.words.clone()
        words[first + row] = 0  # fewer than n
        with pytest.raises(ModelError, match="masks that do not suit"):
            check_weight(PackedWeight(TAILED.spec, words, TAILED.offsets), "layer")


def test_the_end_has_no_tail_and_the_first_tile_begins_at_zero():
    assert TAILED.offsets is not None
    for index, change in ((-1, 1), (0, 4), (0, -4)):
        offsets = TAILED.offsets.clone()
        offsets[index] += change
        with pytest.raises(ModelError, match="offsets that do not suit"):
            check_weight(PackedWeight(TAILED.spec, TAILED.words, offsets), "layer")


@pytest.mark.parametrize("units", [1, 2, 3])
def test_words_that_are_no_whole_units_are_refused(units):
    assert TAILED.offsets is not None
    words, offsets = torch.cat([TAILED.words, torch.zeros(4 * units, dtype=torch.int32)]), TAILED.offsets.clone()
    offsets[-1] += units  # a tail at the end, as if a tile began there
    spec = dataclasses.replace(TAILED.spec, words=len(words))
    with pytest.raises(ModelError, match="offsets that do not suit"):
        check_weight(PackedWeight(spec, words, offsets), "layer")


@pytest.mark.parametrize("version", [1, 2])
def test_settings_keep_the_version_of_a_layout(version):
    changed = settings_of({"layer": TAILED.spec}) | {"format_version": version}
    assert parse_settings(changed, "model")["layer"].version == version


@pytest.mark.parametrize("packed", PACKED)
def test_other_sizes_and_dtypes_are_refused(packed):
    check_weight(packed, "layer")
    for words in (packed.words[:-1], packed.words.view(torch.float32), packed.words[None]):
        with pytest.raises(ModelError, match="layer has"):
            check_weight(PackedWeight(packed.spec, words, packed.offsets), "layer")
    other = None if packed.offsets is not None else packed.words[:5]
    with pytest.raises(ModelError, match="layer has"):
        check_weight(PackedWeight(packed.spec, packed.words, other), "layer")


def test_settings_come_back():
    specs = {f"layer.{index}": packed.spec for index, packed in enumerate(PACKED)}
    assert parse_settings(settings_of(specs), "model") == specs


@pytest.mark.parametrize("settings", [None, 3, [], {}, {"format_version": 1}, {"format_version": 1, "layers": [1]}])
def test_settings_that_are_none_are_refused(settings):
    with pytest.raises(ModelError):
        parse_settings(settings, "model")


@pytest.mark.parametrize(
    "value", [None, True, 1.5, float("nan"), -1, 10**30, "", [], {}, [[1]], [64, 64.0], [True, 64]]
)
@pytest.mark.parametrize("key", ["format_version", "layers", "entry", "format", "shape", "dtype", "n", "words"])
def test_any_other_value_in_the_settings_is_refused(key, value):
    for packed in PACKED:
        changed = settings_of({"layer": packed.spec})
        entry = changed["layers"]["layer"]
        if key in changed:
            changed[key] = value
        elif key == "entry":
            changed["layers"]["layer"] = value
        elif key in entry:
            entry[key] = value
        else:
            continue
        with pytest.raises(ModelError):
            parse_settings(changed, "model")


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J"])
def test_names_that_would_break_a_message_are_refused_in_one_line(name):
    with pytest.raises(ModelError) as caught:
        parse_settings(settings_of({name: PACKED[0].spec}), "model")
    assert str(caught.value).isprintable()


LAYERS = {f"layer.{index}": packed.spec for index, packed in enumerate(PACKED)}


def stored() -> dict[str, TensorSpec]:
    found = {"norm.weight": TensorSpec(torch.bfloat16, (0,))}
    for name, spec in LAYERS.items():
        found |= tensor_specs(f"another.prefix.{name}", spec)
    return found


def test_the_tensors_of_the_layers_are_accepted_under_any_prefix():
    check_stored(LAYERS.values(), stored(), "model")


@pytest.mark.parametrize(
    ("name", "spec", "words"),
    [
        ("layer.0.weight_words", None, "lacks a tensor weight_words, int32"),
        ("layer.1.weight_offsets", None, "lacks a tensor weight_offsets, int32"),
        ("layer.0.weight_words", TensorSpec(torch.float8_e4m3fn, (1728,)), r"layer\.0\.weight_words, float8_e4m3fn"),
        ("layer.0.weight_words", TensorSpec(torch.int32, (1, 1728)), "lists no layer for"),
        ("layer.1.weight_offsets", TensorSpec(torch.int64, (7,)), "int64"),
        ("layer.0.weight_offsets", TensorSpec(torch.int32, (0,)), "lists no layer for"),
        ("layer.9.weight_words", TensorSpec(torch.int32, (1728,)), "lists no layer for"),
        ("layer.1.weight", TensorSpec(torch.bfloat16, (64, 96)), "both packed and dense"),
    ],
)
def test_other_tensors_than_those_of_the_layers_are_refused(name, spec, words):
    tensors = stored()
    tensors.pop(f"another.prefix.{name}", None)
    if spec is not None:
        tensors[f"another.prefix.{name}"] = spec
    with pytest.raises(ModelError, match=words):
        check_stored(LAYERS.values(), tensors, "model")
