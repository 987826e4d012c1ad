"""The pages that benchmarks/quality_page.py fills show what the stored comparisons say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT
from helpers import benchmark_script
from thanos.comparison.document import NAME, Row, merged, read_comparisons
from thanos.comparison.report import front_of, value_of

quality_page = benchmark_script("quality_page")

PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if quality_page.BLOCK.search(page.read_text("utf-8"))
]
QUALITY = ROOT / "docs" / "results" / "quality"
SMOLLM2, QWEN = QUALITY / "smollm2-135m" / NAME, QUALITY / "qwen2.5-coder-0.5b" / NAME
LARGEST = QUALITY / "qwen2.5-coder-1.5b" / NAME
ROWS = [
    Row(
        label="dense",
        weight_bytes=2_690_000,
        tokens_per_second=311.2,
        evaluation={"perplexity": 21.608},
        zero_shot={"average": {"acc": 0.4243, "acc_stderr": 0.00604}},
        texts={"One": " 1", "Two and": "\n  three.\n\nFour"},
    ),
    Row(
        label="a int8", weight_bytes=1_640_000, evaluation={"perplexity": 30.0}, texts={"One": "", "Two and": "a " * 99}
    ),
]


def test_readme_and_the_page_of_qualities_are_filled() -> None:
    assert {page.name for page in PAGES} >= {"README.md", "quality.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_and_texts_are_what_the_comparison_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert quality_page.filled(text, page.parent) == text, f"run: python benchmarks/quality_page.py {page}"


def test_a_table_of_models_has_their_words_and_no_number_that_was_not_measured() -> None:
    assert quality_page.models(ROWS, "a int8 = one; dense = the dense model").splitlines() == [
        "| | in memory, MB | tokens/s | perplexity | zero-shot, % |",
        "|---|---|---|---|---|",
        "| one | 1.64 |  | 30.00 |  |",
        "| the dense model | 2.69 | 311 | 21.61 | 42.4 ± 0.6 |",
    ]


def test_texts_are_on_one_line_and_shortened() -> None:
    first, empty, dense, other = quality_page.texts(ROWS, 2, "dense = the dense model; a int8 = int8").splitlines()
    assert first == "“Two and” is continued by"
    assert empty == ""
    assert dense == "- the dense model: “three. Four”"
    assert other.endswith("a a …”")
    assert len(other) < 150


def test_a_model_without_a_row_is_refused() -> None:
    with pytest.raises(KeyError, match="no model is called b; there are dense, a int8"):
        quality_page.chosen(ROWS, "dense = x; b = y")


def stored(document: Path) -> tuple[dict[str, Row], str, Callable[[str, str], float]]:
    """A stored comparison: label → row, the label of the dense model, and (label, field) → number, which was measured."""
    rows = {row.label: row for row in merged(read_comparisons([document]))}

    def value(label: str, field: str) -> float:
        found = value_of(rows[label], field)
        assert found is not None
        return found

    return rows, next(iter(rows)), value


def test_what_the_page_concludes_is_what_its_numbers_say() -> None:
    """The statements of README and quality.md about SmolLM2-135M."""
    rows, first, value = stored(SMOLLM2)
    front = {row.label for row in front_of(list(rows.values()), "weight_bytes")}
    assert front == {"neurons20-recovered int8", f"{first} int4", f"{first} int8", first}
    pruned = [label for label in rows if not label.startswith(first)]
    assert min(pruned, key=lambda label: value(label, "perplexity")) == "neurons20-recovered"
    for label in ("16of32-recovered-packed", "2of4-recovered", "fast50"):  # what is sparse loses to int8 and int4
        for kind in ("int8", "int4"):
            for field in ("weight_bytes", "perplexity"):
                assert value(f"{first} {kind}", field) < value(label, field)
    speeds = [value(label, "tokens_per_second") for label in rows if not label.endswith(("int8", "int4"))]
    assert max(speeds) < 1.02 * min(speeds)
    accuracies = [value(label, "zero_shot") for label in pruned if label != "fast50"]
    assert max(accuracies) - min(accuracies) < 2 * value("2of4-recovered", "zero_shot_stderr")


def test_what_the_pages_conclude_about_the_larger_model_is_what_its_numbers_say() -> None:
    """The statements of README and quality.md about Qwen2.5-Coder-0.5B."""
    rows, first, value = stored(QWEN)
    by_bytes = {row.label for row in front_of(list(rows.values()), "weight_bytes")}
    assert by_bytes == {f"{first} int4", "neurons20-recovered int8", f"{first} int8", first}
    for field in ("weight_bytes", "perplexity"):
        ordered = [value(label, field) for label in (f"{first} int4", "neurons20-recovered int8", f"{first} int8")]
        assert ordered == sorted(ordered, reverse=field == "perplexity")
    packed, dense = "16of32-recovered-packed", first
    assert max(rows, key=lambda label: value(label, "tokens_per_second")) == packed
    gain = value(packed, "tokens_per_second") / value(dense, "tokens_per_second")
    share = value(packed, "weight_bytes") / value(dense, "weight_bytes")
    for page in (ROOT / "README.md", ROOT / "docs" / "results" / "quality.md"):
        text = " ".join(page.read_text(encoding="utf-8").split())
        assert f"{gain:.2f} times" in text
        assert f"{share:.2f} of the bytes" in text
    with_zeros = ("16of32", "16of32-recovered", packed, "2of4", "2of4-recovered", "fast50")
    assert value("neurons20-recovered", "perplexity") < min(value(label, "perplexity") for label in with_zeros)
    assert rows[packed].texts == rows["16of32-recovered"].texts
    plain = [value(label, "tokens_per_second") for label in rows if label != packed and "int" not in label]
    assert max(plain) < 1.02 * min(plain)


def test_what_the_pages_conclude_about_the_largest_model_is_what_its_numbers_say() -> None:
    """The statements of README and quality.md about Qwen2.5-Coder-1.5B."""
    rows, first, value = stored(LARGEST)
    assert {"neurons20-recovered int8", "2of4-recovered", "fast50", f"{first} int8", f"{first} int4"} < set(rows)
    by_bytes = {row.label for row in front_of(list(rows.values()), "weight_bytes")}
    assert by_bytes == {f"{first} int4", f"{first} int8", first}
    for label in rows:
        if not label.startswith(first):
            for field in ("weight_bytes", "perplexity"):
                assert value(f"{first} int4", field) < value(label, field)
    packed = "16of32-recovered-packed"
    assert max(rows, key=lambda label: value(label, "tokens_per_second")) == packed
    gain = value(packed, "tokens_per_second") / value(first, "tokens_per_second")
    for page, words in (
        ("README.md", f"has {gain:.2f} times the tokens"),
        ("docs/results/quality.md", f"{gain:.2f} times those"),
    ):
        assert words in " ".join((ROOT / page).read_text(encoding="utf-8").split())


def test_the_numbers_in_the_text_of_readme_are_measured_ones() -> None:
    """Its tables are generated. These are about a model of Llama-3-8B's shape, and about the packed format."""
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    lines = (ROOT / "docs" / "results" / "packed" / "decode-h100.jsonl").read_text(encoding="utf-8").splitlines()
    dense, packed = (row for row in map(json.loads, lines) if row["compiled"])
    assert (dense["model"], packed["model"], packed["shape"]) == ("dense", "packed", "llama-3-8b")
    (faster,) = re.findall(r"decodes ([\d.]+) times as many tokens per second as the dense one", text)
    (smaller,) = re.findall(r"with `torch.compile`, and takes ([\d.]+) of the bytes", text)
    assert float(faster) == round(packed["tokens_per_second"] / dense["tokens_per_second"], 2)
    assert float(smaller) == round(packed["weight_bytes"] / dense["weight_bytes"], 2)
    bits = 16 * 16 / 32 + 1  # half of the values, in 16 bits, and a mask with one bit for each weight
    assert f"packed 16:32 takes {bits:.0f} bits per original weight" in text
    assert f"packed into {bits / 16:.2f} of their bytes" in text
