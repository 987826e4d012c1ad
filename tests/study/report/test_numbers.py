"""Numbers: what they are of, and how they are shown."""

from __future__ import annotations

import statistics

import pytest

from study_records import cell, record
from thanos.study.report.numbers import (
    FIELDS,
    Number,
    count,
    difference,
    field_of,
    gain,
    mean,
    plain,
    price,
    setting,
    spread,
)

SEEDS = [record(cell(seed=seed), perplexity=value) for seed, value in enumerate((44.0, 45.0, 47.0))]


def test_mean_and_spread_are_over_the_seeds_and_name_their_cells() -> None:
    average, noise = mean(SEEDS, "perplexity"), spread(SEEDS, "perplexity")
    assert average is not None
    assert noise is not None
    assert average.value == pytest.approx(136 / 3)
    assert noise.value == pytest.approx(statistics.stdev([44.0, 45.0, 47.0]))
    assert average.cells == noise.cells == tuple(one.key[:12] for one in SEEDS)
    assert (average.how, noise.how) == ("mean", "spread")


def test_cells_without_the_field_do_not_count() -> None:
    without = record(cell(seed=9), evaluation=None)
    average = mean([*SEEDS, without], "perplexity")
    assert average is not None
    assert without.key[:12] not in average.cells
    assert mean([without], "perplexity") is None
    assert spread(SEEDS[:1], "perplexity") is None
    assert setting(without, "perplexity") is None


def test_differences_gains_and_prices_follow_their_definitions() -> None:
    better, worse = mean(SEEDS[:1], "perplexity"), mean(SEEDS[2:], "perplexity")
    assert better is not None
    assert worse is not None
    assert difference(better, worse).value == -3.0
    assert gain(better, worse).value == pytest.approx(3 / 47)
    slow, fast = Number(40.0, "seconds", "mean", ("a",)), Number(25.0, "seconds", "mean", ("b",))
    cost = price((slow, fast), (better, worse))
    assert cost is not None
    assert cost.value == pytest.approx(15 / 3)
    assert price((slow, fast), (worse, better)) is None


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("perplexity", 44.8149, "44.81"),
        ("perplexity", 102811.4, "102,811"),
        ("perplexity", 1.683e22, "1.68 × 10²²"),
        ("sparsity", 0.49934, "49.93"),
        ("zero_shot", 0.4512, "45.1"),
        ("peak_bytes", 3 * 2**30, "3.00"),
        ("seconds", 7.126, "7.13"),
        ("seconds", 1234.6, "1,235"),
        ("layer_error", 0.0191234, "0.01912"),
        ("layer_error", 4.312e-7, "4.31 × 10⁻⁷"),
        ("layer_error", 0.0031234, "0.003123"),
        ("alpha", 0.1, "0.1"),
    ],
)
def test_numbers_are_shown_in_the_units_of_their_labels(field: str, value: float, text: str) -> None:
    assert Number(value, field, "mean", ("a",)).text == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.06105, "0.061"), (0.0053, "0.0053"), (2.5, "2.5"), (-14.6, "−15"), (1234.6, "1,235"), (0.0, "0")],
)
def test_prices_have_two_significant_digits(value: float, text: str) -> None:
    assert Number(value, "perplexity", "price", ("a",), ("b",)).text == text


def test_signs_of_differences_are_shown() -> None:
    assert Number(-2.653, "perplexity", "difference", ("a",), ("b",)).text == "−2.65"
    assert Number(2.653, "perplexity", "difference", ("a",), ("b",)).text == "+2.65"
    assert Number(-0.0503, "sparsity", "difference", ("a",), ("b",)).text == "−5.03"


def test_fields_of_tasks_and_layers() -> None:
    one = SEEDS[0]
    assert one.zero_shot is not None
    assert field_of("task:piqa").read(one) == one.zero_shot["tasks"]["piqa"]["acc"]
    assert field_of("task:absent").read(one) is None
    layer = one.layers[2]
    assert field_of(f"error:{layer['name']}").read(one) == layer["error_after_compensation"]
    assert field_of(f"zeros:{layer['name']}").read(one) == layer["sparsity"]


def test_every_field_reads_a_dense_record_or_says_that_it_has_none() -> None:
    dense = record(cell("dense", None))
    values = {name: field.read(dense) for name, field in FIELDS.items()}
    assert values["perplexity"] == 21.97
    assert values["seconds"] is values["alpha"] is values["layer_error"] is None


def test_seconds_of_cells_that_shared_their_device_count_for_nothing() -> None:
    for sharers, known in ((1, True), (3, False)):
        one = record(cell("thanos"), machine={"device": "NVIDIA H100", "sharers": sharers})
        assert one.seconds is not None
        for name in ("seconds", "solve_seconds"):
            assert (field_of(name).read(one) is not None) == known
        assert field_of("perplexity").read(one) is not None
        assert field_of("peak_bytes").read(one) is not None


def test_peak_memory_is_above_what_the_process_holds_while_it_prunes() -> None:
    def phases(**peaks: int) -> dict[str, dict[str, int]]:
        return {name: {"device_peak_bytes": peak, "host_peak_bytes": 10 * peak} for name, peak in peaks.items()}

    read = field_of("peak_bytes").read
    known = phases(load=700, solve=900, finish=500, reference=100, evaluate=5000)
    assert read(record(cell(), device_peak_bytes=950, phases=known)) == 450
    assert read(record(cell(), device_peak_bytes=None, host_peak_bytes=9000, phases=known)) == 4000
    assert read(record(cell(), device_peak_bytes=950, phases=phases(reference=100))) is None
    assert read(record(cell(), device_peak_bytes=None, host_peak_bytes=None, phases=known)) is None


def test_prose_reads_as_a_sentence() -> None:
    assert plain((count(SEEDS), " cells")) == "3 cells"
