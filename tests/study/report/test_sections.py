"""The rules of a report's sections, each on a store made to have one answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from study_records import METHODS, MODEL, cell, cost_record, cost_study, full_study, record
from thanos.study.report.numbers import plain
from thanos.study.report.results import Results, over_common_seeds
from thanos.study.report.sections import COST_SECTIONS, MODEL_SECTIONS
from thanos.study.report.sections.alpha import ALPHAS, alpha, recommend
from thanos.study.report.sections.blocks import SIZES, blocks
from thanos.study.report.sections.claims import all_claims, claims
from thanos.study.report.sections.common import equal_alphas, headline_rows, headline_sparsity
from thanos.study.report.sections.cost import cost
from thanos.study.report.sections.curves import curves
from thanos.study.report.sections.data import variations
from thanos.study.report.sections.fairness import fairness
from thanos.study.report.sections.noise import noise
from thanos.study.report.sections.outliers import outliers
from thanos.study.report.sections.paper import perplexity_table, zero_shot_table
from thanos.study.report.sections.repair import repair
from thanos.study.report.sections.scope import scope
from thanos.study.report.sections.summary import summary
from thanos.study.report.sections.where import where
from thanos.study.report.tables import Table
from thanos.study.store import CellRecord


def seeds(
    values: Sequence[float], method: str = "thanos", pattern: str = "unstructured", **changes: object
) -> list[CellRecord]:
    given = {name: changes.pop(name) for name in ("seconds",) if name in changes}
    return [record(cell(method, pattern, seed=s, **changes), perplexity=v, **given) for s, v in enumerate(values)]


def column(table: Table, name: str) -> list[str]:
    place = [c.name for c in table.columns].index(name)
    return [row[place].shown for row in table.rows]


FULL = Results(MODEL, full_study(blocks=2))


@pytest.mark.parametrize("section", MODEL_SECTIONS, ids=lambda section: section.__name__)
def test_every_section_speaks_on_a_full_store_and_asks_for_cells_on_an_empty_one(section) -> None:
    assert section(FULL).tables
    empty = section(Results(MODEL, []))
    assert empty.missing or section.__name__ in ("scope", "repair", "variations")
    assert not empty.figures


def test_the_headline_has_the_dense_model_on_top_and_every_method_below_each_pattern() -> None:
    table = summary(FULL).tables[0]
    assert column(table, "method") == ["Dense", *["Thanos", "SparseGPT", "Wanda", "Magnitude"] * 4]
    assert list(table.bands.values()) == ["unstructured 50 %", "2:4", "4:8", "columns 30 %"]
    assert set(column(table, "seeds")) == {"–", "3"}
    assert summary(FULL).missing == []


def test_numbers_of_one_seed_in_a_row_of_several_are_marked() -> None:
    found = [*seeds((44.0, 45.0, 46.0)), *seeds((50.0,), "wanda")]
    found[1:3] = [
        dataclasses.replace(one, zero_shot=None, machine={"device": "NVIDIA H100", "sharers": 3}) for one in found[1:3]
    ]
    table = summary(Results(MODEL, found)).tables[0]
    marked = {c.name: row.shown.endswith("°") for c, row in zip(table.columns, table.rows[0], strict=True)}
    assert [name for name, mark in marked.items() if mark] == ["zero_shot", "seconds"]
    assert not any(cell.mark for cell in table.rows[1])
    assert "° after a number: from one seed, in a row that has several" in plain(table.note)
    whole = summary(Results(MODEL, seeds((44.0, 45.0, 46.0)))).tables[0]
    assert all("±" in column(whole, name)[0] for name in ("zero_shot", "seconds", "perplexity"))


def test_the_headline_names_what_it_lacks() -> None:
    section = summary(Results(MODEL, seeds((44.0,))))
    assert section.missing[0] == "the dense model"
    assert "unstructured 50 %: SparseGPT, Wanda, Magnitude" in section.missing
    assert any(line.startswith("columns") for line in section.missing)


def test_a_method_that_the_paper_lacks_is_shown_but_no_part_of_its_claims() -> None:
    paper = [record(cell(method), perplexity=ppl) for method, ppl in zip(METHODS, (44, 46, 60, 99), strict=True)]
    other = record(cell("admm", damping=0.01), perplexity=40)
    section = summary(Results(MODEL, [*paper, other]))
    assert [line[0] for line in section.tables[0].rows if "ADMM" in str(line[0])]
    assert not any("ADMM" in line for line in summary(Results(MODEL, paper)).missing)
    with_it, without = (all_claims(Results(MODEL, found))[0] for found in ([*paper, other], paper))
    assert with_it == without
    assert with_it.verdict.startswith("holds")
    assert "3 other methods" in with_it.claim


def test_the_headline_is_where_most_methods_are_if_not_at_the_usual_sparsity() -> None:
    few = [record(cell(method, "columns", sparsity=0.5)) for method in METHODS[:2]]
    many = [record(cell(method, "columns", sparsity=0.2)) for method in METHODS]
    lone = [record(cell("thanos", "columns", sparsity=0.3, seed=seed)) for seed in range(9)]
    results = Results(MODEL, [*few, *many, *lone])
    assert headline_sparsity(results, "columns") == 0.2
    assert {row.sparsity for row in headline_rows(results, "columns")} == {0.2}
    assert headline_sparsity(Results(MODEL, []), "columns") is None


@pytest.mark.parametrize(("pattern", "usual"), [("columns", 0.3), ("unstructured", 0.5)])
def test_more_cells_at_another_sparsity_do_not_move_the_headline(pattern: str, usual: float) -> None:
    found = [record(cell(method, pattern, sparsity=usual)) for method in METHODS[:3]]
    found += [record(cell(method, pattern, sparsity=0.2, seed=seed)) for method in METHODS for seed in range(3)]
    assert headline_sparsity(Results(MODEL, found), pattern) == usual


def test_alpha_is_compared_both_ways_and_never_across_sparsities() -> None:
    section = fairness(FULL)
    table = next(table for table in section.tables if table.name == "alpha_both_ways")
    bands = list(table.bands.values())
    for expected in ("45.0 % measured, 2:4", "50.0 % measured, 2:4", "45.0 % measured, unstructured"):
        assert expected in bands
    apart = next(table for table in section.tables if table.name == "not_ranked")
    assert any(line.startswith("2:4, Thanos α = 0.1") for line in column(apart, "row"))
    assert all(abs(row[-1].number.value) > 0.002 for row in apart.rows if row[-1].number)


def test_outlier_rows_that_keep_the_budget_stand_beside_those_without() -> None:
    lower = seeds((80.0, 81.0, 82.0), pattern="2:4", outlier_rows=0.1, keep_budget=True)
    table = outliers(Results(MODEL, [*seeds((90.0, 91.0, 92.0), pattern="2:4"), *lower])).tables[0]
    assert column(table, "verdict") == ["<"]
    assert column(table, "difference") == ["−10.00"]


def test_rows_of_another_scope_stand_beside_the_methods_own_and_in_no_other_section() -> None:
    own = seeds((50.0, 51.0, 52.0))
    results = Results(MODEL, [*own, *seeds((44.0, 45.0, 46.0), scope="row")])
    table = scope(results).tables[0]
    assert column(table, "scope") == ["row"]
    assert column(table, "method") == ["Thanos budget per row"]
    assert column(table, "difference") == ["−6.00"]
    assert column(table, "verdict") == ["<"]
    assert [row.scope for row in results.rows] == [None]
    assert [row.value("perplexity") for row in headline_rows(results, "unstructured")] == [51.0]
    assert not scope(Results(MODEL, own)).tables


def test_rows_with_a_repair_stand_beside_the_method_alone_and_in_no_other_section() -> None:
    own = seeds((50.0, 51.0, 52.0))
    best, layers = (
        seeds((40.0, 41.0, 42.0), effort="max"),
        seeds((45.0, 46.0, 47.0), effort="max", scope="layer", tune=4),
    )
    allocated = seeds((49.0, 50.0, 51.0), allocation="error")
    results = Results(MODEL, [*own, *best, *layers, *allocated])
    table = repair(results).tables[0]
    assert column(table, "label") == [
        "Thanos allocation error",
        "Thanos effort max",
        "Thanos budget per layer, effort max, tune 4",
    ]
    assert column(table, "difference") == ["−1.00", "−10.00", "−5.00"]
    assert column(table, "verdict") == ["=", "<", "<"]
    assert [row.repair for row in results.rows] == [""]
    assert not scope(results).tables
    assert [row.value("perplexity") for row in headline_rows(results, "unstructured")] == [51.0]
    assert not repair(Results(MODEL, own)).tables


def test_the_recommended_alpha_is_the_smallest_within_the_noise_of_the_best() -> None:
    found = seeds((100.0, 101.0, 102.0), pattern="2:4")
    for share, value in ((0.02, 95.0), (0.05, 90.6), (0.1, 90.0), (0.2, 94.0)):
        found += [record(cell("thanos", "2:4", outlier_rows=share, keep_budget=True), perplexity=value)]
    results = Results(MODEL, found)
    rows = equal_alphas(results, "thanos", "2:4", 0.5)
    assert [row.alpha for row in rows] == [0.0, 0.02, 0.05, 0.1, 0.2]
    within, best = recommend(over_common_seeds(*rows))
    assert best.alpha == 0.1
    assert [row.alpha for row in within] == [0.05, 0.1]
    section = alpha(results)
    assert column(section.tables[0], "recommended") == ["", "", "recommended°", "", ""]
    assert any("0.15, 0.3" in line for line in section.missing)


def by_seed(share: float, values: Sequence[float], **changes: object) -> list[CellRecord]:
    kept = {"outlier_rows": share, "keep_budget": True} if share else {}
    return seeds(values, pattern="2:4", **kept, **changes)


def test_alphas_are_judged_over_the_seeds_that_all_of_them_have() -> None:
    # Equal to α = 0 on seed 0, and better than its mean by more than any spread.
    lone = [*by_seed(0.0, (90.0, 95.0, 95.5)), *by_seed(0.1, (90.0,)), *by_seed(0.2, (90.5,))]
    section = alpha(Results(MODEL, lone))
    words = plain(section.prose[1])
    assert words.startswith(
        "2:4: from one seed, recommended α = 0° (perplexity 90.00); it is the best of 3, over seed 0. Noise: 3.04, from"
    )
    assert column(section.tables[0], "perplexity") == ["90.00", "90.00", "90.50"]
    assert "Over seed 0, which all of these rows have; further seeds of single rows" in plain(section.tables[0].note)
    drawn = section.figures[0].series[0].points  # type: ignore[union-attr]
    assert [point.y.value for point in drawn] == [90.0, 90.0, 90.5]
    whole = [*by_seed(0.0, (90.0, 95.0, 95.5)), *by_seed(0.1, (85.0, 90.0, 90.5))]
    words = plain(alpha(Results(MODEL, whole)).prose[1])
    assert words.startswith(
        "2:4: recommended α = 0.1 (perplexity 88.50); it is the best of 2, over seeds 0, 1, 2. Noise: 3.04."
    )
    apart = [*by_seed(0.0, (90.0,)), *by_seed(0.1, (85.0, 90.0))[1:]]
    section = alpha(Results(MODEL, apart))
    assert (section.tables, section.missing[-1]) == ([], "Thanos, 2:4: a seed that every α has")


def test_one_default_for_all_patterns_must_be_within_the_noise_for_each() -> None:
    def store(best_for_columns: float) -> Results:
        found = [
            *seeds((100.0, 101.0, 102.0), pattern="2:4"),
            *seeds((70.0, 71.0, 72.0), pattern="columns", sparsity=0.3),
        ]
        for share in (0.05, 0.1):
            kept = {"outlier_rows": share, "keep_budget": True}
            found.append(record(cell("thanos", "2:4", **kept), perplexity=90.0 if share == 0.05 else 90.5))
            value = 60.0 if share == best_for_columns else 65.0
            found.append(record(cell("thanos", "columns", sparsity=0.3, **kept), perplexity=value))
        return Results(MODEL, found)

    words = plain(alpha(store(0.1)).prose[-1])
    assert (
        words == "One default for columns 30 % and 2:4: α = 0.1°, the smallest within the noise of the best for each."
    )
    lone = store(0.05)
    assert "α = 0.05°, the smallest" in plain(alpha(lone).prose[-1])


def test_alphas_that_lower_the_sparsity_are_not_on_the_curve() -> None:
    lowered = record(cell("thanos", "2:4", outlier_rows=0.1))
    assert [
        row.alpha
        for row in equal_alphas(Results(MODEL, [*seeds((90.0,), pattern="2:4"), lowered]), "thanos", "2:4", 0.5)
    ] == [0.0]


@pytest.mark.parametrize(
    ("small", "large", "word"),
    [(44.0, 46.0, "worth it"), (46.0, 44.0, "not worth it"), (44.0, 43.3, "a tie, and slower, so not worth it")],
)
def test_block_sizes_are_judged_by_the_largest(small: float, large: float, word: str) -> None:
    found = seeds((43.5, 44.5, 43.9) if small == 44.0 else (45.5, 46.5, 46.1))
    found += [record(cell(block_size=8), perplexity=60.0), record(cell(block_size=2048), perplexity=large)]
    section = blocks(Results(MODEL, found))
    answer = plain(section.prose[1])
    assert answer.startswith(f"unstructured 50 %: from one seed, {word}°. B = 128 against 2048")
    assert answer.endswith(", over seed 0; noise 0.50.")
    assert column(section.tables[0], "block_size") == ["8", "128", "2048"]


def test_block_sizes_are_judged_over_the_seeds_that_all_of_them_have() -> None:
    sizes = [record(cell(block_size=size), perplexity=43.0, seconds=9.0) for size in (8, 2048)]
    section = blocks(Results(MODEL, [*seeds((43.0, 45.0, 46.5), seconds=9.0), *sizes]))
    assert "a tie, also in time°. B = 8 against 2048" in plain(section.prose[1])
    assert column(section.tables[0], "perplexity") == ["43.00", "43.00", "43.00"]
    assert column(section.tables[0], "verdict") == ["=°", "=°", ""]
    drawn = section.figures[0].series[0].points  # type: ignore[union-attr]
    assert [point.y.value for point in drawn] == [43.0] * 3
    whole = [*seeds((43.0, 45.0, 46.5)), *seeds((40.0, 42.0, 43.5), block_size=8)]
    table = blocks(Results(MODEL, whole)).tables[0]
    assert column(table, "verdict") == ["<", ""]
    assert column(table, "perplexity") == ["41.83 ± 1.76", "44.83 ± 1.76"]
    mixed = [*whole, *seeds((90.0,), pattern="2:4"), *seeds((91.0,), pattern="2:4", block_size=8)]
    about = plain(blocks(Results(MODEL, mixed)).tables[0].note)
    assert "Over the seeds that all rows of a pattern have (unstructured 50 %: seeds 0, 1, 2; 2:4: seed 0)." in about


def test_the_larger_of_two_spreads_counts_for_the_recommendation() -> None:
    found = [*by_seed(0.0, (91.0, 96.0, 101.0)), *by_seed(0.1, (93.9, 94.0, 94.1))]
    words = plain(alpha(Results(MODEL, found)).prose[1])
    assert words.startswith("2:4: recommended α = 0 (perplexity 96.00); the best is α = 0.1 (94.00)")
    assert "Noise: 5.00." in words


def test_a_recommendation_from_single_draws_says_so() -> None:
    section = alpha(Results(MODEL, [*by_seed(0.0, (96.0,)), *by_seed(0.1, (94.0,))]))
    words = plain(section.prose[1])
    assert words.startswith(
        "2:4: from one seed, recommended α = 0.1° (perplexity 94.00); it is the best of 2, over seed 0. No row has several"
    )
    assert "the recommendation is from one seed (°)" in words
    assert column(section.tables[0], "recommended") == ["", "recommended°"]


def test_the_choice_by_divergence_is_named_beside_that_by_perplexity() -> None:
    found = [*by_seed(0.0, (96.0,)), *by_seed(0.1, (94.0,))]
    same = plain(alpha(Results(MODEL, found)).prose[1])
    assert same.endswith("By KL divergence the rule chooses the same.")
    for one, divergence in zip(found, (1.25, 1.5), strict=True):
        assert one.evaluation is not None
        one.evaluation["kl_divergence"] = divergence
    other = plain(alpha(Results(MODEL, found)).prose[1])
    assert other.endswith("By KL divergence the rule chooses α = 0 (1.2500 nats/token).")


def test_groups_and_claims_give_one_pair_one_verdict() -> None:
    found = [*by_seed(0.0, (90.0, 95.0, 95.5)), *by_seed(0.1, (90.3,))]
    assert by_claim(found, "2:4: lower perplexity with α") == "tie°"
    table = next(t for t in fairness(Results(MODEL, found)).tables if t.name == "sparsity_groups")
    assert column(table, "rank") == ["1=", "1=°"]
    assert [row[5].best for row in table.rows] == [True, True]
    assert column(table, "seeds") == ["0, 1, 2", "0"]


def test_differences_between_methods_are_over_common_seeds() -> None:
    found = [*seeds((44.0, 47.0, 47.3)), *seeds((44.5,), "sparsegpt")]
    table = next(t for t in noise(Results(MODEL, found)).tables if t.name == "differences")
    assert (column(table, "difference"), column(table, "verdict")) == (["−0.50"], ["=°"])


def test_variations_stand_beside_the_usual_over_common_seeds() -> None:
    found = [*seeds((44.0, 47.0, 47.3)), record(cell(damping=0.1), perplexity=45.0)]
    table = variations(Results(MODEL, found)).tables[0]
    assert (column(table, "perplexity"), column(table, "usual_perplexity")) == (["45.00"], ["44.00"])
    other = [*seeds((44.0, 47.0, 47.3)), record(cell(damping=0.1, seed=9), perplexity=45.0)]
    assert column(variations(Results(MODEL, other)).tables[0], "usual_perplexity") == ["–"]


def test_block_sizes_of_a_full_study_are_complete() -> None:
    section = blocks(FULL)
    assert section.missing == []
    assert column(section.tables[0], "block_size") == [str(size) for size in SIZES] * 3


def test_the_marginal_cost_is_seconds_per_point() -> None:
    found = [
        record(cell(), perplexity=44.0, seconds=40.0),
        record(cell("sparsegpt"), perplexity=48.0, seconds=30.0),
        record(cell("wanda"), perplexity=60.0, seconds=50.0),
    ]
    table = cost(Results(MODEL, found)).tables[0]
    assert column(table, "price") == ["2.5°", "–", "–"]
    assert column(table, "front")[2] in ("", "memory")  # dearer in seconds and worse: beaten


def timed(method: str, values: Sequence[tuple[float, float]], **changes: object) -> list[CellRecord]:
    """Cells of one row with (perplexity, seconds) by seed."""
    cells = [cell(method, seed=seed, **changes) for seed in range(len(values))]
    times = zip(cells, values, strict=True)
    return [record(one, perplexity=p, seconds=s, device_peak_bytes=2**33) for one, (p, s) in times]


def test_a_device_whose_cells_were_all_shared_prices_nothing() -> None:
    """The usual device measured no seconds of its own; those of the other say nothing of it."""
    shared = [record(cell(m, seed=seed), seconds=9.0) for m in ("thanos", "wanda") for seed in (0, 1)]
    shared = [dataclasses.replace(one, machine={"device": "NVIDIA H100", "sharers": 3}) for one in shared]
    alone = [record(cell(m, seed=2), seconds=5.0) for m in ("thanos", "wanda")]
    alone = [dataclasses.replace(one, machine={"device": "NVIDIA H200", "sharers": 1}) for one in alone]
    for asked in ({}, {"evaluation": None}):
        cells = [dataclasses.replace(one, asked=one.asked | asked) for one in (*shared, *alone)]
        if asked:
            cells = [dataclasses.replace(one, evaluation=None, zero_shot=None) for one in cells]
        section = cost(Results(MODEL, cells))
        assert section.tables == []
        assert section.missing


def test_seconds_within_their_spread_are_a_tie() -> None:
    found = timed("thanos", [(44.0, 7.0), (45.0, 7.4), (46.0, 7.8)])
    found += timed("sparsegpt", [(48.0, 7.0), (49.0, 7.1), (50.0, 7.2)])
    found += timed("wanda", [(60.0, 6.2)])
    section = cost(Results(MODEL, found))
    table = section.tables[0]
    assert column(table, "seconds") == ["7.40 ± 0.40", "7.10 ± 0.10", "6.20"]
    assert column(table, "seconds_difference") == ["+0.30=", "–", "–"]
    assert column(table, "price") == ["=", "–", "–"]
    assert column(table, "front") == ["time", "", "time"]  # SparseGPT is not faster than Thanos, and worse
    assert "For a row with one seed it is set to 0.40 s." in " ".join(plain(prose) for prose in section.prose)
    slower = timed("thanos", [(44.0, 8.5), (45.0, 8.9), (46.0, 9.3)]) + found[3:]
    table = cost(Results(MODEL, slower)).tables[0]
    assert (column(table, "seconds_difference")[0], column(table, "price")[0]) == ("+1.80", "0.45")
    assert column(table, "front") == ["time", "time", "time"]


def test_rows_of_one_seed_take_the_largest_spread_of_seconds() -> None:
    found = timed("thanos", [(44.0, 7.3)]) + timed("sparsegpt", [(48.0, 7.0)])
    assert column(cost(Results(MODEL, found)).tables[0], "front") == ["time", "time"]
    found += timed("wanda", [(60.0, 6.0), (60.1, 6.4), (60.2, 6.8)])
    table = cost(Results(MODEL, found)).tables[0]
    assert column(table, "front")[:2] == ["time", ""]
    assert (column(table, "seconds_difference")[0], column(table, "price")[0]) == ("+0.30=°", "=")
    columns_30 = [record(cell(m, "columns", sparsity=0.3), seconds=s) for m, s in (("thanos", 7.0), ("sparsegpt", 7.3))]
    assert by_claim([*found, *columns_30], "columns 30 %: less time than SparseGPT") == "tie°"


def test_outlier_rows_are_priced_over_common_seeds() -> None:
    found = timed("sparsegpt", [(99.0, 7.0), (109.0, 7.0), (110.0, 7.0)], pattern="2:4")
    found += timed("thanos", [(90.0, 7.5), (91.0, 7.5), (92.0, 7.5)], pattern="2:4")
    found += timed("thanos", [(89.0, 9.0)], pattern="2:4", outlier_rows=0.1, keep_budget=True)
    table = cost(Results(MODEL, found)).tables[0]
    assert column(table, "method")[:2] == ["Thanos", "Thanos α = 0.1, budget kept"]
    assert column(table, "price")[1] == "0.20°"  # 2 s for 10 points, not for 17
    assert column(table, "seconds_difference")[:2] == ["+0.50", "+2.00°"]


def with_memory(method: str, perplexity: float, gibibytes: float) -> CellRecord:
    phases = {"finish": {"seconds": 1.0, "host_peak_bytes": 0, "device_peak_bytes": 2**30}}
    peak = int((1 + gibibytes) * 2**30)
    return record(cell(method), perplexity=perplexity, seconds=9.0, phases=phases, device_peak_bytes=peak)


def test_memory_within_one_percent_is_equal_and_has_no_figure() -> None:
    found = [
        with_memory(name, ppl, gib) for name, ppl, gib in zip(METHODS, (44, 46, 60, 99), (2.01, 2, 2, 2), strict=True)
    ]
    section = cost(Results(MODEL, found))
    assert [figure.name for figure in section.figures] == ["cost_unstructured_seconds"]
    names = "Thanos, SparseGPT, Wanda and Magnitude (4 rows)"
    words = f"unstructured 50 %: {names} need the same memory within 1 %, at most 2.01 GiB."
    assert words in [plain(prose) for prose in section.prose]
    assert column(section.tables[0], "front") == ["time", "", "", ""]


def test_half_a_mebibyte_makes_no_pareto_front() -> None:
    found = [
        with_memory(name, ppl, gib) for name, ppl, gib in zip(METHODS, (44, 46, 60, 99), (2.01, 2, 1, 1), strict=True)
    ]
    section = cost(Results(MODEL, found))
    assert [figure.name for figure in section.figures] == ["cost_unstructured_seconds", "cost_unstructured_memory"]
    assert column(section.tables[0], "front") == ["time and memory", "", "memory", ""]


def test_points_with_the_budget_kept_are_told_apart() -> None:
    found = seeds((300.0,), pattern="columns", sparsity=0.3)
    for keep in (False, True):
        found.append(record(cell("thanos", "columns", sparsity=0.3, outlier_rows=0.1, keep_budget=keep)))
    chart = cost(Results(MODEL, found)).figures[0]
    labels = [series.label for series in chart.series]  # type: ignore[union-attr]
    assert labels == ["Thanos", "Thanos α = 0.1", "Thanos α = 0.1, kept"]


def test_costs_of_different_devices_are_not_compared() -> None:
    elsewhere = record(cell("sparsegpt"), machine={"device": "cpu"})
    section = cost(Results(MODEL, [record(cell()), record(cell("wanda")), elsewhere]))
    assert column(section.tables[0], "method") == ["Thanos", "Wanda"]


def test_seconds_of_a_seed_from_another_device_are_left_out_of_costs() -> None:
    found = timed("thanos", [(44.0, 7.0), (45.0, 7.2), (46.0, 90.0)])
    found += timed("sparsegpt", [(48.0, 6.0), (49.0, 6.2), (50.0, 80.0)])
    found = [
        dataclasses.replace(one, machine={"device": "cpu"}) if one.cell["seed"] == 2 else one
        for one in [*found, *timed("wanda", [(60.0, 5.0)])]
    ]
    table = cost(Results(MODEL, found)).tables[0]
    assert column(table, "seconds") == ["7.10 ± 0.14", "6.10 ± 0.14", "5.00"]
    assert column(table, "seconds_difference")[0] == "+1.00"
    own = [dataclasses.replace(one, cell={**one.cell, "pattern": "columns", "sparsity": 0.3}) for one in found]
    assert by_claim(own, "columns 30 %: less time than SparseGPT") == "does not hold"


def test_a_model_of_which_the_cost_alone_counts_has_no_accuracy() -> None:
    results = Results("other", cost_study("other"))
    assert results.cost_only
    assert not FULL.cost_only
    for make in COST_SECTIONS[:2]:
        section = make(results)
        assert section.missing == []
        assert "nothing about accuracy" in plain(section.prose[0])
        shown = [name for table in section.tables for name in (c.name for c in table.columns)]
        assert not {"perplexity", "kl_divergence", "verdict", "front"}.intersection(shown)
        assert {"layer_error", "seconds", "solve_seconds"} <= set(shown)
        assert all(figure.y_label != "perplexity" for figure in section.figures)  # type: ignore[union-attr]
    names = [figure.name for figure in blocks(results).figures]
    assert names == [*(f"blocks_{name}_layer_error" for name in ("unstructured", "4_8", "2_4")), "blocks_seconds"]
    assert column(blocks(results).tables[0], "block_size") == [str(size) for size in SIZES] * 3
    assert column(cost(results).tables[0], "method") == ["Thanos", "SparseGPT", "Wanda", "Magnitude"] * 4
    assert [len(series.points) for series in cost(results).figures[0].series] == [4] * 4  # type: ignore[union-attr]


def test_where_accuracy_was_not_measured_the_least_time_is_named() -> None:
    found = [cost_record(cell(block_size=size), seconds=s) for size, s in ((8, 40.0), (128, 12.0), (2048, 31.0))]
    words = plain(blocks(Results(MODEL, found)).prose[1])
    assert words == "unstructured 50 %: pruning is fastest with B = 128, 12.0 s; B = 8: 40.0 s; B = 2048: 31.0 s."
    lone = cost(Results(MODEL, [cost_record(cell(), seconds=40.0), cost_record(cell("sparsegpt"), seconds=30.0)]))
    assert column(lone.tables[0], "seconds_difference") == ["+10.0°", "–"]
    assert lone.missing == [
        f"{name}: at least two methods at one sparsity on one device" for name in ("2:4", "4:8", "columns")
    ]


def test_figure_and_table_over_sparsity_are_one_store() -> None:
    section = curves(FULL)
    for figure, table in zip(section.figures, section.tables, strict=True):
        drawn = sorted(p.y.value for series in figure.series for p in series.points)  # type: ignore[union-attr]
        listed = sorted(c.number.value for row in table.rows for c in row[1:] if c.number is not None)
        assert drawn == listed
        asked = [row[0].number for row in table.rows]
        assert all(
            share is not None and 0 < share.value < 1 and share.text == f"{100 * share.value:g}" for share in asked
        )
    assert [figure.name for figure in section.figures] == ["sparsity_unstructured", "sparsity_columns"]


def test_lines_with_alpha_are_those_that_keep_the_budget() -> None:
    found = [record(cell(method, "columns", sparsity=step / 10)) for method in METHODS for step in (1, 2, 3)]
    kept = [(0.1, 1, False), (0.1, 2, True), (0.1, 3, True), (0.1, 3, False), (0.2, 1, True), (0.2, 2, False)]
    for share, step, keep in kept:
        found.append(record(cell("thanos", "columns", sparsity=step / 10, outlier_rows=share, keep_budget=keep)))
    section = curves(Results(MODEL, found))
    lines = {series.label: series.points for series in section.figures[0].series}  # type: ignore[union-attr]
    assert list(lines) == ["Thanos α = 0", "Thanos α = 0.1, kept", "SparseGPT", "Wanda", "Magnitude"]
    kept_keys = {one.key[:12] for one in found if one.cell["keep_budget"]}
    assert len(lines["Thanos α = 0.1, kept"]) == 2
    assert all(key in kept_keys for point in lines["Thanos α = 0.1, kept"] for key in point.y.cells)
    assert section.missing[-1].startswith("columns: Thanos at 40 %; SparseGPT at 40 %")
    assert section.missing[0].startswith("unstructured: Thanos at 10, 20, 30, 40, 50, 60, 70, 80 %")


def test_lines_far_above_are_capped_in_figures_over_sparsity() -> None:
    found = []
    for method, values in zip(METHODS, ((24, 340), (25, 360), (26, 1300), (40, 8e4)), strict=True):
        found += [record(cell(method, sparsity=s), perplexity=v) for s, v in zip((0.3, 0.7), values, strict=True)]
    chart = curves(Results(MODEL, found)).figures[0]
    assert 360 < chart.ceiling < 600  # type: ignore[union-attr, operator]


def test_fairness_asks_for_the_kept_budget_alone() -> None:
    assert fairness(FULL).missing == []
    lone = fairness(Results(MODEL, seeds((90.0,), pattern="2:4")))
    assert "Thanos, 2:4, α = 0.1, budget kept, to compare with α = 0" in lone.missing
    assert not any("as requested" in line for line in lone.missing)


def test_fairness_names_the_methods_that_lack_where_one_has_outlier_rows() -> None:
    found = seeds((90.0,), pattern="2:4")
    found += [record(cell(method, "2:4", outlier_rows=0.1), perplexity=70.0) for method in ("thanos", "wanda")]
    assert "SparseGPT, Magnitude, 2:4, α = 0.1, as requested" in fairness(Results(MODEL, found)).missing


def test_zero_shot_tables_have_a_column_for_each_task() -> None:
    table = zero_shot_table(FULL).tables[0]
    assert [c.name for c in table.columns][1:6] == ["winogrande", "openbookqa", "piqa", "arc_easy", "arc_challenge"]
    assert column(table, "method")[0] == "Dense"


def test_fewer_zeros_do_not_take_the_bold() -> None:
    half = [record(cell(m, "2:4"), perplexity=v) for m, v in (("thanos", 90.0), ("sparsegpt", 99.0))]
    lowered = record(cell("thanos", "2:4", outlier_rows=0.1), perplexity=70.0)
    assert lowered.zero_shot is not None
    lowered.zero_shot["average"]["acc"] = 0.9
    results = Results(MODEL, [*half, lowered])
    for table, name in (
        (zero_shot_table(results).tables[0], "average"),
        (perplexity_table([results]).tables[0], MODEL),
    ):
        place = [c.name for c in table.columns].index(name)
        bold = {row[0].shown: row[place].best for row in table.rows}
        assert not bold["Thanos α = 0.1, only 45 % sparse"]
        assert bold["Thanos"]


def test_the_headline_bolds_rows_of_equal_sparsity_alone() -> None:
    found = [record(cell(m), perplexity=v, sparsity=s) for m, v, s in (("thanos", 44.0, 0.5), ("wanda", 30.0, 0.45))]
    found.append(record(cell("sparsegpt"), perplexity=48.0))
    table = summary(Results(MODEL, found)).tables[0]
    place = [c.name for c in table.columns].index("perplexity")
    assert [row[place].best for row in table.rows] == [True, False, False]


def test_table_3_says_how_many_seeds_its_accuracies_have() -> None:
    found = [*seeds((44.0, 45.0, 46.0)), *seeds((50.0, 51.0, 52.0), "wanda")]
    assert "Means over 3 calibration seeds. " in plain(zero_shot_table(Results(MODEL, found)).tables[0].note)
    one = [r if r.cell["seed"] == 0 else dataclasses.replace(r, zero_shot=None) for r in found]
    about = plain(zero_shot_table(Results(MODEL, one)).tables[0].note)
    assert about.startswith("2 cells;")
    assert "One calibration seed for each row." in about
    mixed = [
        r if r.cell["seed"] == 0 or r.cell["method"] == "thanos" else dataclasses.replace(r, zero_shot=None)
        for r in found
    ]
    about = plain(zero_shot_table(Results(MODEL, mixed)).tables[0].note)
    assert "Means over 1 to 3 calibration seeds, those with the tasks." in about


def test_the_papers_table_has_a_column_for_each_model() -> None:
    other = Results("other", full_study("other", blocks=1))
    table = perplexity_table([FULL, other]).tables[0]
    assert [c.head for c in table.columns] == ["Method", MODEL, "other"]
    assert all(cell.number is not None for row in table.rows for cell in row[1:])


def test_the_papers_table_does_not_hide_a_lower_sparsity() -> None:
    labels = column(perplexity_table([FULL]).tables[0], "method")
    assert "Thanos α = 0.1, only 45 % sparse" in labels
    assert "Thanos α = 0.1, budget kept" in labels


def test_fewer_than_three_seeds_are_asked_for() -> None:
    section = noise(Results(MODEL, [*seeds((44.0, 45.0)), *seeds((50.0, 51.0, 52.0), "wanda")]))
    assert section.missing == ["unstructured 50 %, Thanos: 3 seeds with distinct windows, not 2"]
    pairs = next(table for table in section.tables if table.name == "differences")
    assert column(pairs, "verdict") == ["<"]


def test_the_worst_layers_are_the_worst() -> None:
    section = where(FULL)
    table = section.tables[0]
    first = headline_rows(FULL, "unstructured")[0].records[0]
    errors = sorted((layer["error_after_compensation"] for layer in first.layers), reverse=True)
    assert [row[1].number.value for row in table.rows[:10] if row[1].number] == errors[:10]
    maps = [figure for figure in section.figures if figure.name == "where_unstructured_error"]
    drawn = sorted(n.value for row in maps[0].values for n in row if n)  # type: ignore[union-attr]
    assert drawn == sorted(errors)


def test_sparsity_is_mapped_only_where_layers_differ() -> None:
    def store(last: float) -> Results:
        found = [record(cell(), sparsity=0.5), record(cell("thanos", "2:4"), sparsity=0.5)]
        found[0].layers[3]["sparsity"] = last
        return Results(MODEL, found)

    even = where(store(0.5015))
    assert [figure.name for figure in even.figures] == ["where_unstructured_error", "where_2_4_error"]
    words = "unstructured 50 % from 50.00 to 50.15 %; 2:4 from 50.00 to 50.00 %."
    assert plain(even.prose[-1]) == f"The layers' measured sparsities differ by less than 0.2 points: {words}"
    uneven = where(store(0.6))
    assert "where_unstructured_sparsity" in [figure.name for figure in uneven.figures]
    assert plain(uneven.prose[-1]).endswith("points: 2:4 from 50.00 to 50.00 %.")


def by_claim(found: Sequence[CellRecord], text: str) -> str:
    return next(c.verdict for c in all_claims(Results(MODEL, found)) if text in c.claim)


@pytest.mark.parametrize(
    ("thanos", "other", "expected"),
    [
        ((44.0, 44.5, 45.0), (47.0, 47.5, 48.0), "holds"),
        ((47.0, 47.5, 48.0), (44.0, 44.5, 45.0), "does not hold"),
        ((44.0, 45.0, 46.0), (44.5, 45.5, 46.5), "tie"),
        ((44.0,), (47.0,), "holds°"),
        ((44.0,), (), "not measured"),
    ],
)
def test_a_claim_holds_or_not_or_ties(thanos: tuple[float, ...], other: tuple[float, ...], expected: str) -> None:
    assert (
        by_claim([*seeds(thanos), *seeds(other, "sparsegpt")], "unstructured 50 %: lower perplexity than") == expected
    )


def test_a_claim_names_what_ran_and_nothing_else() -> None:
    one = [*seeds((44.0,)), *seeds((47.0,), "sparsegpt")]
    three = [*one, *seeds((60.0,), "wanda"), *seeds((99.0,), "magnitude")]
    both = [*three, *seeds((60.0,), sparsity=0.6), *seeds((70.0,), "sparsegpt", sparsity=0.6)]
    columns = {"pattern": "columns", "sparsity": 0.3}
    both += [*seeds((300.0,), **columns), *seeds((350.0,), "sparsegpt", **columns)]
    found = {name: [c.claim for c in all_claims(Results(MODEL, store))] for name, store in
             (("none", seeds((44.0,))), ("one", one), ("three", three), ("both", both))}  # fmt: skip
    assert found["none"][0] == "unstructured 50 %: lower perplexity than another method"
    assert found["one"][0] == "unstructured 50 %: lower perplexity than SparseGPT (1 other method)"
    names = "SparseGPT, Wanda and Magnitude (3 other methods)"
    assert found["three"][0] == f"unstructured 50 %: lower perplexity than {names}"
    assert "unstructured: the gap to SparseGPT grows with sparsity" in found["one"]
    assert "unstructured: the gap to SparseGPT grows with sparsity, over 50 % and 60 % (2 sparsities)" in found["both"]
    claim = "The gain over SparseGPT, as a fraction of the perplexity, is largest for columns"
    assert claim in found["one"]
    assert f"{claim}, compared with unstructured 50 % (1 other pattern)" in found["both"]
    assert not any(word in claim for claims in found.values() for claim in claims for word in ("every", "all "))


def test_the_gap_grows_only_if_it_grows_at_every_step() -> None:
    def store(*gaps: float) -> list[CellRecord]:
        found = []
        for step, gap in enumerate(gaps):
            found += [record(cell(sparsity=0.5 + step / 10), perplexity=50.0)]
            found += [record(cell("sparsegpt", sparsity=0.5 + step / 10), perplexity=50.0 + gap)]
        return found

    assert by_claim(store(1, 2, 3), "gap to SparseGPT grows") == "holds°"
    assert by_claim(store(1, 3, 2), "gap to SparseGPT grows") == "does not hold°"
    several = [*seeds((50.0, 50.1)), *seeds((51.0, 51.1), "sparsegpt")]
    several += [*seeds((90.0, 90.1), sparsity=0.6), *seeds((95.0, 95.1), "sparsegpt", sparsity=0.6)]
    assert by_claim(several, "gap to SparseGPT grows") == "holds"
    assert by_claim([*several, *store(1, 2, 9)[-2:]], "gap to SparseGPT grows") == "holds°"
    assert by_claim(store(1), "gap to SparseGPT grows") == "not measured"


def test_a_gap_that_grows_by_less_than_the_noise_is_a_tie() -> None:
    def store(gap: float) -> list[CellRecord]:
        found = [*seeds((50.0, 51.0, 52.0)), *seeds((52.0, 53.0, 54.0), "sparsegpt")]
        found += seeds((90.0, 93.0, 96.0), sparsity=0.6)
        return [*found, *seeds((90.0 + gap, 93.0 + gap, 96.0 + gap), "sparsegpt", sparsity=0.6)]

    assert by_claim(store(4.9), "gap to SparseGPT grows") == "tie"  # 2.9 more, within the 3 of the larger spread
    assert by_claim(store(5.1), "gap to SparseGPT grows") == "holds"
    assert by_claim(store(-1.1), "gap to SparseGPT grows") == "does not hold"


def test_the_gap_is_over_the_seeds_that_all_sparsities_have() -> None:
    found = [*seeds((50.0, 40.0, 40.0)), *seeds((52.0, 90.0, 90.0), "sparsegpt")]
    found += [*seeds((90.0,), sparsity=0.6), *seeds((145.0,), "sparsegpt", sparsity=0.6)]
    claim = next(c for c in all_claims(Results(MODEL, found)) if "gap" in c.claim)
    assert (claim.verdict, plain(claim.evidence)) == ("holds°", "50 %: +2.00, 60 %: +55.00")


def test_a_gain_that_is_larger_by_less_than_the_noise_is_a_tie() -> None:
    def store(columns: float) -> list[CellRecord]:
        found = [*seeds((44.0, 45.0, 46.0)), *seeds((49.0, 50.0, 51.0), "sparsegpt")]  # 10 % ± 2 %
        own, other = (columns - 1, columns, columns + 1), (99.0, 100.0, 101.0)
        found += [*seeds(own, pattern="columns", sparsity=0.3), *seeds(other, "sparsegpt", "columns", sparsity=0.3)]
        return found

    assert by_claim(store(88.1), "largest for columns") == "tie"
    assert by_claim(store(87.9), "largest for columns") == "holds"
    assert by_claim(store(92.1), "largest for columns") == "does not hold"
    mixed = [one for one in store(87.9) if one.cell["pattern"] == "columns" or one.cell["seed"] == 1]
    assert by_claim(mixed, "largest for columns") == "holds°"


def test_the_lowest_must_be_lower_than_every_other() -> None:
    # Wanda's spread is so large that its mean, though further off, is the one that Thanos does not clearly beat.
    found = [*seeds((44.0, 45.0, 46.0)), *seeds((47.0, 48.0, 49.0), "sparsegpt"), *seeds((40.0, 49.0, 58.0), "wanda")]
    claim = all_claims(Results(MODEL, found))[0]
    assert claim.verdict == "tie"
    assert plain(claim.evidence) == "Thanos 45.00 ± 1.00 against Wanda 49.00 ± 9.00"


def test_claims_about_alpha_compare_at_equal_sparsity_alone() -> None:
    base = seeds((90.0, 91.0, 92.0), pattern="2:4")
    lowered = record(cell("thanos", "2:4", outlier_rows=0.1), perplexity=70.0)
    kept = record(cell("thanos", "2:4", outlier_rows=0.1, keep_budget=True), perplexity=95.0)
    assert by_claim([*base, lowered], "2:4: lower perplexity with α") == "not measured"
    assert by_claim([*base, lowered, kept], "2:4: lower perplexity with α") == "does not hold°"


def test_alpha_is_judged_over_the_seeds_that_both_rows_have() -> None:
    base = seeds((91.0, 93.0, 98.0), pattern="2:4")
    kept = record(cell("thanos", "2:4", seed=1, outlier_rows=0.1, keep_budget=True), perplexity=97.0)
    far = record(cell("thanos", "2:4", seed=1, outlier_rows=0.1, keep_budget=True), perplexity=97.0 + 0.3)
    # The spread of α = 0 is 3.6: 97 − 93 is beyond it, and the mean of all three, 94, would make it a tie.
    found = next(c for c in all_claims(Results(MODEL, [*base, kept])) if "2:4: lower perplexity with α" in c.claim)
    assert (found.verdict, plain(found.evidence)) == ("does not hold°", "α = 0.1: 97.00 against α = 0: 93.00")
    table = outliers(Results(MODEL, [*base, far])).tables[0]
    assert (column(table, "difference"), column(table, "verdict")) == (["+4.30"], [">°"])
    other = record(cell("thanos", "2:4", seed=7, outlier_rows=0.1, keep_budget=True), perplexity=97.0)
    assert by_claim([*base, other], "2:4: lower perplexity with α") == "not measured"
    assert column(outliers(Results(MODEL, [*base, other])).tables[0], "verdict") == ["–"]


def test_a_difference_within_the_known_noise_is_a_tie() -> None:
    base = seeds((91.0, 93.0, 98.0), pattern="2:4")
    near = record(cell("thanos", "2:4", outlier_rows=0.1, keep_budget=True), perplexity=93.0)
    assert by_claim([*base, near], "2:4: lower perplexity with α") == "tie°"
    assert column(outliers(Results(MODEL, [*base, near])).tables[0], "verdict") == ["=°"]
    sizes = [record(cell(block_size=8), perplexity=44.5), record(cell(block_size=2048), perplexity=44.0)]
    table = blocks(Results(MODEL, [*seeds((43.0, 44.0, 45.5)), *sizes])).tables[0]
    assert column(table, "verdict") == ["=°", "=°", ""]
    assert column(blocks(Results(MODEL, sizes)).tables[0], "verdict") == [">°", ""]


def test_a_claim_of_which_either_row_has_one_seed_is_marked() -> None:
    found = [*seeds((44.0, 44.5, 45.0)), *seeds((47.0,), "sparsegpt")]
    assert by_claim(found, "lower perplexity than SparseGPT") == "holds°"


def test_the_claim_about_time_names_its_sparsity() -> None:
    found = [record(cell(m, "columns", sparsity=0.3), seconds=s) for m, s in (("thanos", 7.0), ("sparsegpt", 8.0))]
    assert by_claim(found, "columns 30 %: less time than SparseGPT") == "holds°"


def test_the_structured_gain_is_a_share_of_perplexity() -> None:
    found = [*seeds((45.0,)), *seeds((50.0,), "sparsegpt")]  # 10 %
    found += [*seeds((300.0,), pattern="columns", sparsity=0.3), *seeds((350.0,), "sparsegpt", "columns", sparsity=0.3)]
    assert by_claim(found, "largest for columns") == "holds°"
    table = claims(Results(MODEL, found)).tables[0]
    assert "unstructured 50 %: 10.0 %, columns 30 %: 14.3 %" in column(table, "numbers")


def test_the_shares_asked_for_are_those_of_the_sensitivity_study() -> None:
    assert ALPHAS == (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
    assert (SIZES[0], SIZES[-1]) == (8, 2048)
    assert alpha(FULL).missing == []
