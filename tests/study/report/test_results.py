"""Rows: seeds together, everything else apart; groups by measured sparsity; ranks and ties."""

from __future__ import annotations

import dataclasses
import random
from itertools import combinations, pairwise

import pytest

from study_records import MODEL, cell, full_study, record
from thanos.study.report.numbers import plain
from thanos.study.report.ranking import change_of, comparable, groups_by_sparsity, one_seed, pareto, ranks, verdict
from thanos.study.report.results import Results, Row, models_of, over_common_seeds, row_of
from thanos.study.report.sections import data
from thanos.study.report.sections.common import left_out
from thanos.study.report.sections.fairness import fairness
from thanos.study.store import CellRecord, cell_key


def three(values: tuple[float, ...], method: str = "thanos", **changes: object) -> list[CellRecord]:
    return [record(cell(method, seed=seed, **changes), perplexity=value) for seed, value in enumerate(values)]


def test_rows_differ_in_nothing_but_the_seed() -> None:
    results = Results(MODEL, full_study(blocks=1))
    for row in [*results.rows, *results.scoped, *results.repaired, *results.variations]:
        settings = [{**one.cell, "seed": None} for one in row.records]
        assert all(one == settings[0] for one in settings)
        assert len({one.cell["seed"] for one in row.records}) == len(row.records)
    keys = [
        one.key
        for row in [*results.rows, *results.scoped, *results.repaired, *results.variations]
        for one in row.records
    ]
    assert len(keys) == len(set(keys)) == len(full_study(blocks=1)) - 1  # all but the dense model


def test_rows_that_count_units_differently_are_apart_and_named() -> None:
    usual = three((30.0, 31.0, 32.0), pattern="neurons", block_size=None)
    wide = three((33.0, 34.0, 35.0), pattern="neurons", block_size=None, multiple_of=256)
    heads = three((40.0, 41.0, 42.0), pattern="heads", block_size=None, head_unit="query")
    results = Results(MODEL, [*usual, *wide, *heads])
    assert [row.pattern_label for row in results.rows] == [
        "neurons 50 %",
        "neurons 50 %, multiple of 256",
        "heads 50 %, head unit query",
    ]
    assert [len(row.records) for row in results.rows] == [3, 3, 3]
    found = results.find(method="thanos", pattern="neurons", sparsity=0.5)
    assert found is not None
    assert not found.units, "a row is compared with those that count alike"


def test_a_pattern_that_this_version_lacks_has_its_measured_sparsity() -> None:
    """The store may be of another version, or of a study with a pattern of the user's own file."""
    known = record(cell(), sparsity=0.25)
    changes = ({"pattern": "bands", "sparsity": None}, {"pattern": "stripes", "sparsity": 0.3})
    rows = [row_of([dataclasses.replace(known, cell=known.cell | change)]) for change in changes]
    assert [(row.pattern_label, row.sparsity) for row in rows] == [("bands", 0.25), ("stripes 30 %", 0.3)]


def test_another_damping_is_a_variation_and_methods_without_damping_are_not() -> None:
    results = Results(MODEL, [*three((44.0, 45.0, 46.0)), record(cell(damping=0.1)), record(cell("wanda"))])
    assert [row.damping for row in results.variations] == [0.1]
    assert {row.method for row in results.rows} == {"thanos", "wanda"}


def test_methods_without_damping_are_compared_without_those_that_damp() -> None:
    results = Results(MODEL, [record(cell("wanda")), record(cell("magnitude")), record(cell("wanda", samples=4))])
    assert results.base == ("c4-sample.jsonl", 128, 2048, None)
    assert [row.method for row in results.rows] == ["wanda", "magnitude"]
    assert [row.samples for row in results.variations] == [4]


def test_another_evaluation_is_left_out_and_reported() -> None:
    odd = record(cell("wanda"))
    assert odd.evaluation is not None
    odd.evaluation["windows"] = 3
    results = Results(MODEL, [*three((44.0, 45.0, 46.0)), odd])
    assert [each.records for each in results.left_out] == [(odd,)]
    assert results.select(method="wanda") == []


def again(given: CellRecord, **asked: object) -> CellRecord:
    """The same cell and seed, asked for otherwise."""
    changed = {**given.asked, **asked}
    return dataclasses.replace(given, asked=changed, key=cell_key(given.cell, changed))


def test_another_dtype_is_left_out_and_named() -> None:
    found = [*three((44.0, 45.0, 46.0)), *three((48.0,), "sparsegpt")]
    odd = again(record(cell(), perplexity=60.0), dtype="bfloat16")
    results = Results(MODEL, [*found, odd])
    row = results.find(method="thanos")
    assert row is not None
    assert row.value("perplexity") == 45.0
    assert len(row.records) == 3
    words = plain(left_out(results))
    assert (
        words == "Left out: 1 cell that ran in another dtype than most (float32) (unstructured 50 %, Thanos, bfloat16)."
    )
    assert left_out(results) in fairness(results).prose
    assert left_out(results) in data([*found, odd], [], [results]).prose
    assert left_out(Results(MODEL, found)) == ()


@pytest.mark.parametrize("first", [True, False])
def test_a_cell_stored_with_and_without_tasks_counts_once_with_them(first: bool) -> None:
    with_tasks = again(record(cell(), perplexity=44.0), zero_shot={"tasks": ["piqa"], "limit": None})
    without = dataclasses.replace(record(cell(), perplexity=50.0), zero_shot=None)
    pair = [with_tasks, without] if first else [without, with_tasks]
    results = Results(MODEL, [*pair, record(cell(seed=1), perplexity=46.0)])
    row = results.find(method="thanos")
    assert row is not None
    assert sorted(r.evaluation["perplexity"] for r in row.records if r.evaluation) == [44.0, 46.0]
    assert [each.records for each in results.left_out] == [(without,)]


def test_of_equal_records_of_one_cell_the_last_counts() -> None:
    last = again(record(cell(), perplexity=45.0), other=1)
    results = Results(MODEL, [record(cell(), perplexity=44.0), last])
    assert [row.records for row in results.rows] == [(last,)]
    assert plain(left_out(results)).startswith("Left out: 1 cell that repeated")


def test_accuracies_on_other_tasks_are_not_shown_beside_those_of_most() -> None:
    odd = record(cell("wanda"))
    assert odd.zero_shot is not None
    odd.zero_shot["tasks"]["piqa"]["samples"] = 40
    results = Results(MODEL, [*three((44.0, 45.0, 46.0)), odd])
    row = results.find(method="wanda")
    assert row is not None
    assert row.mean("zero_shot") is None
    assert row.mean("perplexity") is not None
    assert "had other zero-shot tasks than most" in plain(left_out(results))


def test_groups_are_no_wider_than_two_tenths_of_a_point() -> None:
    draw = random.Random(1)
    rows = [row_of([record(cell(seed=i), sparsity=draw.uniform(0.44, 0.51))]) for i in range(60)]
    groups = groups_by_sparsity(rows)
    assert sorted(row.records[0].key for group in groups for row in group) == sorted(r.records[0].key for r in rows)
    for group in groups:
        shares = [row.value("sparsity") for row in group]
        assert max(shares) - min(shares) <= 0.002 + 1e-12
    assert all(
        max(r.value("sparsity") for r in low) < min(r.value("sparsity") for r in high) for low, high in pairwise(groups)
    )


def test_rows_of_unequal_sparsity_are_never_ranked_against_each_other() -> None:
    low, high = row_of([record(cell(seed=0), sparsity=0.4497)]), row_of([record(cell("wanda"), sparsity=0.5)])
    assert not comparable(low, high)
    assert ranks([low, high]) == ["", ""]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((44.0, 45.0, 46.0), (47.0, 48.0, 49.0), "better"),
        ((47.0, 48.0, 49.0), (44.0, 45.0, 46.0), "worse"),
        ((44.0, 45.0, 46.0), (44.9, 45.9, 46.9), "tie"),
        ((44.9, 45.0, 45.1), (42.0, 45.5, 49.0), "tie"),  # the larger spread counts
        ((44.0,), (44.01,), "better"),  # no spread known
        ((44.0,), (44.0,), "tie"),
    ],
)
def test_a_difference_within_the_larger_spread_is_a_tie(
    first: tuple[float, ...], second: tuple[float, ...], expected: str
) -> None:
    assert verdict(row_of(three(first)), row_of(three(second, "sparsegpt"))) == expected


def test_the_spread_of_kin_stands_for_that_of_a_row_with_one_seed() -> None:
    results = Results(
        MODEL, [*three((44.0, 45.0, 46.5)), *three((44.7,), block_size=8), *three((45.4,), block_size=16)]
    )
    first, second, whole = results.rows
    assert verdict(first, second) == "tie"  # 0.7 apart; the default block's spread is 1.3
    assert verdict(row_of(first.records), row_of(second.records)) == "better"
    assert whole.only({0}).noise() == whole.noise() == whole.spread("perplexity")


def test_rows_can_be_compared_over_common_seeds_alone() -> None:
    first, second = row_of(three((44.0, 45.0, 46.0))), row_of(three((50.0, 51.0), "sparsegpt"))
    assert [r.cell["seed"] for r in first.only({1, 2}).records] == [1, 2]
    pair = over_common_seeds(first, second)
    assert [row.value("perplexity") for row in pair] == [44.5, 50.5]
    assert over_common_seeds(first.only({2}), second)[0].mean("perplexity") is None
    assert [row.value("perplexity") for row in over_common_seeds(first, second, first.only({1}))] == [45.0, 51.0, 45.0]


def test_a_verdict_is_over_the_seeds_that_both_rows_have() -> None:
    whole = row_of(three((44.0, 47.0, 47.3)))
    equal, lone = row_of(three((44.0,), "sparsegpt")), row_of(three((47.0, 48.0), "wanda")[1:])
    assert (
        verdict(equal, whole) == verdict(whole, equal) == "tie"
    )  # the mean of all three is 46.1, beyond the spread of 1.8
    assert verdict(lone, whole) == "tie"
    assert verdict(equal, lone) == ""
    assert ranks([whole, equal]) == ["1=", "1=°"]
    assert ranks([equal, lone]) == ["", ""]
    change = change_of(lone, whole)
    assert change is not None
    assert change.value == 1.0


def test_common_seeds_are_those_that_have_the_field() -> None:
    def row(method: str, scored: tuple[int, ...], seeds: tuple[int, ...]) -> Row:
        found = [record(cell(method, seed=seed), perplexity=40.0 + seed) for seed in seeds]
        return row_of(
            [dataclasses.replace(r, zero_shot=r.zero_shot if r.cell["seed"] in scored else None) for r in found]
        )

    first, second = row("thanos", (0, 1), (0, 1, 2)), row("wanda", (0,), (0, 1, 2))
    assert [len(r.records) for r in over_common_seeds(first, second)] == [3, 3]
    assert [len(r.records) for r in over_common_seeds(first, second, field="zero_shot")] == [1, 1]
    assert (one_seed(first, second), one_seed(first, second, field="zero_shot")) == ("", "°")


def test_the_pareto_front_against_brute_force() -> None:
    draw = random.Random(3)
    for _ in range(30):
        points = [(float(draw.randint(0, 6)), float(draw.randint(30, 36))) for _ in range(8)]
        rows = [row_of([record(cell(block_size=8 + i), seconds=a, perplexity=b)]) for i, (a, b) in enumerate(points)]
        front = pareto(rows, lambda first, second: verdict(first, second, "seconds"))
        expected = [not any((c <= a and d <= b) and (c, d) != (a, b) for c, d in points) for a, b in points]
        assert [row in front for row in rows] == expected


def test_what_is_lent_stands_for_the_spread_of_rows_without_one() -> None:
    lent = row_of(three((44.0, 45.0, 46.0))).spread("perplexity")
    first, second = row_of(three((44.0,))), row_of(three((44.9,), "sparsegpt"))
    assert (verdict(first, second), verdict(first, second, lent=lent)) == ("better", "tie")
    sharp = row_of(three((43.9, 44.0, 44.1))), row_of(three((44.8, 44.9, 45.0), "sparsegpt"))
    assert verdict(*sharp, lent=lent) == "better"


def test_ranks_count_what_is_clearly_better_and_mark_ties_and_single_seeds() -> None:
    rows = [
        row_of(three((44.0, 45.0, 46.0))),
        row_of(three((44.5, 45.5, 46.5), "sparsegpt")),
        row_of(three((60.0,), "wanda")),
    ]
    assert ranks(rows) == ["1=", "1=", "3°"]


def test_higher_is_better_for_accuracies() -> None:
    a, b = row_of([record(cell(), perplexity=30.0)]), row_of([record(cell("wanda"), perplexity=80.0)])
    assert verdict(a, b, "top1_agreement") == "better"
    assert verdict(b, a, "top1_agreement") == "worse"


def test_seeds_that_drew_the_same_windows_are_one() -> None:
    same = [
        record(cell(seed=seed), perplexity=value, calibration={"sha256": windows})
        for seed, value, windows in ((0, 44.0, "a"), (1, 44.0, "a"), (2, 47.0, "b"))
    ]
    row = row_of(same)
    spread = row.spread("perplexity")
    assert spread is not None
    assert spread.value == pytest.approx(3 / 2**0.5)
    assert spread.cells == (same[0].key[:12], same[2].key[:12])
    assert row_of(same[:2]).spread("perplexity") is None


def test_accuracies_within_their_standard_error_are_ties() -> None:
    def row(method: str, accuracy: float) -> object:
        average = {"acc": accuracy, "acc_stderr": 0.006}
        return row_of([record(cell(method), zero_shot={"tasks": {}, "average": average})])

    assert verdict(row("thanos", 0.450), row("wanda", 0.445), "zero_shot") == "tie"  # type: ignore[arg-type]
    assert verdict(row("thanos", 0.450), row("wanda", 0.443), "zero_shot") == "better"  # type: ignore[arg-type]


def test_verdicts_mirror_each_other() -> None:
    rows = Results(MODEL, full_study(blocks=1)).rows
    mirror = {"better": "worse", "worse": "better", "tie": "tie", "": ""}
    for a, b in combinations(rows[:40], 2):
        assert verdict(a, b) == mirror[verdict(b, a)]


def test_noise_is_borrowed_from_the_same_method_and_pattern_alone() -> None:
    seeds = three((44.0, 45.0, 46.0))
    results = Results(MODEL, [*seeds, record(cell(block_size=8)), record(cell("sparsegpt"))])
    lonely = results.find(method="thanos", block_size=8)
    other = results.find(method="sparsegpt")
    assert lonely is not None
    assert other is not None
    noise = lonely.noise()
    assert noise is not None
    assert noise.value == pytest.approx(1.0)
    assert other.noise() is None


def test_default_block_sizes_are_the_recipes() -> None:
    results = Results(MODEL, [record(cell()), record(cell(block_size=64)), record(cell("thanos", "2:4"))])
    assert [(row.block_size, row.has_default_block) for row in results.rows] == [(64, False), (128, True), (512, True)]
    assert [row.label for row in results.rows] == ["Thanos B = 64", "Thanos", "Thanos"]


def test_models_keep_the_order_of_the_store() -> None:
    assert models_of([record(cell(model="b")), record(cell(model="a")), record(cell(model="b", seed=1))]) == ["b", "a"]
