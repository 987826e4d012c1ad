"""``keep_budget``: with outlier rows, the matrix as a whole is as sparse as it would be without them."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
import thanos
from thanos import prune_weight
from thanos.cli import run
from thanos.errors import RecipeError
from thanos.solvers.prune_layer import PrunedWeight

every_method = pytest.mark.parametrize("method", oracles.METHODS)


def keep(rows: int, columns: int, *, method: str = "thanos", **arguments: Any) -> tuple[PrunedWeight, oracles.Layer]:
    case = oracles.layer(rows, columns, seed=rows + columns)
    return prune_weight(case.weight, case.hessian, keep_budget=True, **oracles.used(method, **arguments)), case


def energies(case: oracles.Layer) -> torch.Tensor:
    weight = case.weight.double()
    return torch.einsum("oi,ij,oj->o", weight, case.hessian.double(), weight)


def per_group(result: PrunedWeight, rows: torch.Tensor, m: int) -> set[int]:
    return set(result.kept[rows].reshape(-1, m).sum(1).tolist())


EXACT = [
    ("2:4", 0.1, 2, 4),
    ("2:4", 0.3, 6, 12),
    ("2:4", 1 / 3, 7, 14),
    ("4:8", 0.05, 1, 2),
    ("2:8", 0.1, 2, 12),
    ("6:8", 0.3, 6, 4),
]


@every_method
@pytest.mark.parametrize(("pattern", "alpha", "outliers", "halved"), EXACT)
def test_nm_totals_are_exact(method: str, pattern: str, alpha: float, outliers: int, halved: int) -> None:
    rows, columns = 21 if alpha == 1 / 3 else 20, 48
    result, case = keep(rows, columns, method=method, pattern=pattern, outlier_rows=alpha, block_size=16)
    n, m = map(int, pattern.split(":"))
    zeros = int((result.weight == 0).sum())
    assert Fraction(zeros, rows * columns) == Fraction(m - n, m)
    assert (result.outliers.numel(), result.halved.numel()) == (outliers, halved)
    order = energies(case).argsort()
    assert result.outliers.tolist() == sorted(order[-outliers:].tolist())
    assert result.halved.tolist() == sorted(order[:halved].tolist())
    assert torch.equal(result.weight[result.outliers], case.weight[result.outliers])
    assert per_group(result, result.halved, m) == {n // 2}
    others = torch.ones(rows, dtype=torch.bool)
    others[result.outliers] = others[result.halved] = False
    if others.any():
        assert per_group(result, others, m) == {n}


@every_method
def test_each_nm_row_is_what_its_own_pattern_gives(method: str) -> None:
    """A halved row equals that row of the whole matrix pruned to half of the pattern, and the others likewise."""
    result, case = keep(20, 48, method=method, pattern="2:4", outlier_rows=0.2, block_size=16)
    for rows, pattern in ((result.halved, "1:4"), (None, "2:4")):
        expected = prune_weight(case.weight, case.hessian, **oracles.used(method, pattern=pattern, block_size=16))
        if rows is None:
            taken = torch.cat([result.halved, result.outliers]).tolist()
            rows = torch.tensor([row for row in range(20) if row not in taken])
        assert torch.equal(result.kept[rows], expected.kept[rows])
        torch.testing.assert_close(result.weight[rows], expected.weight[rows], rtol=1e-4, atol=1e-5)


def half_up(number: Fraction) -> int:
    return math.floor(number + Fraction(1, 2))


@every_method
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 40), groups=st.integers(1, 6), percent=st.integers(0, 33), n=st.sampled_from([2, 4, 6]))
def test_nm_totals_are_exact_or_half_a_row_off(method: str, rows: int, groups: int, percent: int, n: int) -> None:
    """On 2:4, 4:8 and 6:8; where q, which is rounded up, leaves too few rows in a small matrix, that is refused."""
    m = 4 if n == 2 else 8
    q = oracles.outlier_count(percent / 100, rows)
    needed = Fraction(2 * q * (m - n), n)
    arguments: dict[str, Any] = {"method": method, "pattern": f"{n}:{m}", "outlier_rows": percent / 100}
    if q + half_up(needed) > rows:
        with pytest.raises(RecipeError, match="would keep half"):
            keep(rows, groups * m, **arguments)
        return
    result, _ = keep(rows, groups * m, **arguments)
    missing = int((result.weight == 0).sum()) - rows * groups * (m - n)
    assert result.outliers.numel() == q
    assert missing == (half_up(needed) - needed) * groups * n / 2
    assert abs(missing) <= groups * n / 4
    assert missing == 0 or n == 6


@every_method
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 30), columns=st.integers(2, 40), alpha=st.integers(1, 40), percent=st.integers(1, 50))
def test_columns_are_off_by_half_of_one_rows_entries_at_most(
    method: str, rows: int, columns: int, alpha: int, percent: int
) -> None:
    q, wanted = oracles.outlier_count(alpha / 100, rows), Fraction(percent, 100) * rows * columns
    arguments: dict[str, Any] = {
        "method": method,
        "pattern": "columns",
        "sparsity": percent / 100,
        "outlier_rows": alpha / 100,
    }
    if q == rows or half_up(wanted / (rows - q)) >= columns:
        with pytest.raises(RecipeError, match="rows stay dense; lower"):
            keep(rows, columns, **arguments)
        return
    result, _ = keep(rows, columns, **arguments)
    zeros, pruned = int((result.weight == 0).sum()), rows - result.outliers.numel()
    removed, uneven = divmod(zeros, pruned)
    assert not uneven, "whole columns of the rows that are not outliers"
    assert torch.equal(result.kept.all(0).sum(), torch.tensor(columns - removed))
    assert 0 < pruned <= rows - q
    ceiling = math.floor(wanted / (rows - q)) + 1
    if ceiling < columns:
        nearest = [(rows - q) * (ceiling - 1), *(ceiling * r for r in range(1, rows - q + 1))]
        assert abs(zeros - wanted) == min(abs(total - wanted) for total in nearest)
        assert abs(zeros - wanted) <= Fraction(ceiling, 2)
        assert pruned == rows - q or removed == ceiling, "more rows stay dense only where the total asks for it"
    else:  # one column has to stay
        assert (removed, pruned) == (columns - 1, rows - q)


@every_method
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 30), columns=st.integers(1, 40), alpha=st.integers(0, 40), percent=st.integers(0, 50))
def test_unstructured_totals_are_exact(method: str, rows: int, columns: int, alpha: int, percent: int) -> None:
    q, wanted = oracles.outlier_count(alpha / 100, rows), percent * rows * columns // 100
    arguments: dict[str, Any] = {"method": method, "sparsity": percent / 100, "outlier_rows": alpha / 100}
    if percent and (wanted > (rows - q) * columns or q == rows):
        with pytest.raises(RecipeError, match="rows stay dense; lower"):
            keep(rows, columns, **arguments)
        return
    result, _ = keep(rows, columns, **arguments)
    assert int((result.weight == 0).sum()) == wanted
    assert not (result.weight[result.outliers] == 0).any()


@every_method
@pytest.mark.parametrize("pattern", ["unstructured", "columns", "2:4"])
def test_without_outlier_rows_it_changes_nothing(method: str, pattern: str) -> None:
    kept, case = keep(12, 32, method=method, pattern=pattern)
    plain = prune_weight(case.weight, case.hessian, method=method, pattern=pattern)
    assert torch.equal(kept.weight, plain.weight)
    assert plain.halved.numel() == kept.halved.numel() == 0


def test_too_few_rows_are_refused_with_the_counts() -> None:
    with pytest.raises(RecipeError, match=r"1 of its 2 rows stay dense and 2 would keep half; lower"):
        keep(2, 8, pattern="2:4", outlier_rows=0.2)


def test_a_pruned_model_verifies_and_reports_its_budget(
    tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [
        "--pattern",
        "2:4",
        "--outlier-rows",
        "0.125",
        "--keep-budget",
        "--samples",
        "4",
        "--sequence-length",
        "32",
    ]
    assert run(["prune", str(tiny_llama), str(out), "--calibration", str(text_file), *arguments, "--quiet"]) == 0
    report = json.loads((out / "pruning.json").read_text())
    assert report["totals"]["sparsity_targeted"] == 0.5
    assert report["recipe"]["keep_budget"] is True
    assert all(layer["halved_rows"] == 2 * layer["outlier_rows"] > 0 for layer in report["layers"])
    found = thanos.inspect_checkpoint(out)
    assert all("2:4" in layer.patterns and layer.outlier_rows == layer.shape[0] // 8 for layer in found.layers)
    assert found.totals["sparsity_targeted"] == 0.5
    assert thanos.Recipe.from_toml(out / "recipe.toml").keep_budget
    assert "12.50 %, more removed from the other rows" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "table", "noted"),
    [
        (["--keep-budget"], "", True),
        ([], '[[override]]\nmatch = "*q_proj"\nkeep_budget = true\n', True),
        (["--keep-budget"], '[[override]]\nmatch = "*q_proj"\noutlier_rows = 0.125\n', False),
        (["--keep-budget", "--outlier-rows", "0.125"], "", False),
        ([], "", False),
    ],
)
def test_without_outlier_rows_a_note_says_that_it_has_no_effect(
    options: list[str],
    table: str,
    noted: bool,
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "r.toml").write_text(f'method = "magnitude"\n{table}')
    shape = ["--samples", "4", "--sequence-length", "32", "--device", "cpu", "--recipe", str(tmp_path / "r.toml")]
    command = ["prune", str(tiny_llama), str(tmp_path / "out"), "--calibration", str(text_file), *shape, *options]
    note = "keep_budget has no effect, since no layer has outlier rows; set outlier_rows too, or leave keep_budget out"
    for ending in (["--plan"], []):
        assert run([*command, "--quiet", *ending]) == 0
        assert capsys.readouterr().err.count(note) == noted
    report = json.loads((tmp_path / "out/pruning.json").read_text())
    assert report["warnings"].count(note) == noted
    assert "0.00 %, more removed" not in (tmp_path / "out/README.md").read_text()
