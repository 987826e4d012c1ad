"""Patterns: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thanos.errors import RecipeError, UserError
from thanos.patterns.columns import Columns
from thanos.patterns.nm import NM
from thanos.patterns.unstructured import Unstructured
from thanos.registry import parse_pattern


@pytest.mark.parametrize("text", ["unstructured", "columns", "2:4", "4:8", "1:4", "1:2", "3:7", "15:16", "1:999999"])
def test_a_pattern_prints_as_it_is_written(text):
    pattern = parse_pattern(text)
    assert str(pattern) == text
    assert parse_pattern(pattern) is pattern
    assert parse_pattern(text) == pattern


@given(n=st.integers(1, 999), more=st.integers(1, 999))
def test_nm_keeps_n_of_m(n, more):
    m = n + more
    pattern = parse_pattern(f"{n}:{m}")
    assert pattern == NM(n, m)
    assert pattern.group == m
    assert pattern.sparsity == pytest.approx(1 - n / m)
    assert parse_pattern(str(pattern)) == pattern


def test_one_of_four_keeps_a_quarter():
    assert parse_pattern("1:4").sparsity == 0.75
    assert parse_pattern("3:4").sparsity == 0.25


@pytest.mark.parametrize("pattern", [Unstructured(), Columns()])
def test_the_other_patterns_take_any_width_and_leave_the_sparsity_open(pattern):
    assert pattern.sparsity is None
    assert pattern.group == 1
    for number in (1, 7, 4096):
        pattern.check_width(number)
        pattern.check_block_size(number)


def test_leading_zeros_are_numbers_all_the_same():
    assert parse_pattern("02:04") == NM(2, 4)


@pytest.mark.parametrize(
    "bad",
    [
        *("", "2", "2:", ":4", "2:4:8", "2/4", "2 : 4", " 2:4", "2:4 ", "2:4\n", "-2:4", "2:-4", "2.0:4", "n:m", "٢:٤"),
        *("1234567:2", "Unstructured", "COLUMNS", "column", "rows", "semi-structured"),
        *(None, 4, 0.5, ("2", "4"), ["2:4"], b"2:4"),
    ],
)
def test_what_is_no_pattern_is_refused_with_the_choices(bad):
    choices = r"is unknown; choose unstructured, N:M such as 2:4 .*, columns, neurons, heads, width, or blocks"
    with pytest.raises(RecipeError, match=choices) as caught:
        parse_pattern(bad)
    assert repr(bad) in str(caught.value)
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("bad", ["4:4", "4:2", "0:4", "0:0", "1:1", "8:4"])
def test_n_must_be_below_m_and_positive(bad):
    with pytest.raises(RecipeError, match=f"pattern {bad} is impossible.*0 < n < m"):
        parse_pattern(bad)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (5, 4), (0, 4), (-1, 4), (1, 0)])
def test_nm_checks_itself(n, m):
    with pytest.raises(RecipeError, match="0 < n < m"):
        NM(n, m)


@given(n=st.integers(1, 5), m=st.integers(6, 9), number=st.integers(1, 200))
def test_widths_and_block_sizes_must_be_multiples_of_m(n, m, number):
    pattern = NM(n, m)
    if number % m == 0:
        pattern.check_width(number)
        pattern.check_block_size(number)
        return
    with pytest.raises(RecipeError, match=rf"{n}:{m} needs a multiple of {m} input columns.*has {number}; skip"):
        pattern.check_width(number)
    with pytest.raises(RecipeError, match=rf"block_size {number} .*{n}:{m}.*multiple of {m}"):
        pattern.check_block_size(number)
