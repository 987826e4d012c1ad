"""Tables as CSV, Markdown and LaTeX: the same numbers, escaped as each format wants it."""

from __future__ import annotations

import csv
import io

from thanos.study.report.numbers import Number
from thanos.study.report.tables import Cell, Table, columns, number, text, to_csv, to_latex, to_markdown

MEAN, SPREAD = Number(44.81234, "perplexity", "mean", ("a", "b")), Number(0.2571, "perplexity", "spread", ("a", "b"))
TABLE = Table(
    "demo",
    "Perplexity & friends",
    columns("<Method|method", "α", "perplexity"),
    (
        (text("a|b_c"), number(Number(0.1, "alpha", "value", ("a",))), number(MEAN, SPREAD, best=True)),
        (text("x"), number(None), number(MEAN)),
    ),
    {0: "2:4", 1: "30 %"},
    (Number(2, "cells", "value", ("a", "b")), " cells."),
)


def test_csv_has_unrounded_numbers_and_spreads_of_their_own() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(TABLE))))
    assert list(rows[0]) == ["group", "method", "α", "perplexity", "perplexity_spread"]
    assert float(rows[0]["perplexity"]) == 44.81234
    assert float(rows[0]["perplexity_spread"]) == 0.2571
    assert (rows[1]["α"], rows[1]["perplexity_spread"], rows[1]["group"]) == ("", "", "30 %")


def test_an_unknown_number_is_empty_in_csv_and_a_dash_of_text_stays() -> None:
    table = Table("t", "t", columns("<sign", "seeds", "x"), ((text("–"), text("–"), number(None)),))
    assert to_csv(table).splitlines() == ["sign,seeds,x", "–,,"]
    assert "| – | – | – |" in to_markdown(table)


def test_a_mark_follows_the_number_and_is_not_in_csv() -> None:
    table = Table("t", "t", columns("x"), ((number(MEAN, SPREAD, mark="=°"),),))
    assert "| 44.81 ± 0.26=° |" in to_markdown(table)
    assert to_csv(table).splitlines()[1] == "44.81234,0.2571"


def test_latex_raises_whole_exponents() -> None:
    small = Number(4.312e-7, "layer_error", "mean", ("a",))
    table = Table("t", "t", columns("<formula", "x"), ((text("(H⁻¹[P,P])⁻¹"), number(small)),))
    assert r"(H$^{-1}$[P,P])$^{-1}$ & 4.31 $\times$ 10$^{-7}$ \\" in to_latex(table)


def test_markdown_has_one_cell_a_column_and_escapes_bars() -> None:
    lines = [line for line in to_markdown(TABLE).splitlines() if line.startswith("|")]
    assert lines[1] == "| --- | ---: | ---: |"
    assert r"| a\|b_c | 0.1 | **44.81 ± 0.26** |" in lines
    assert {line.replace(r"\|", "").count("|") for line in lines} == {4}


def test_latex_escapes_and_balances() -> None:
    latex = to_latex(TABLE)
    assert r"Perplexity \& friends" in latex
    assert r"a|b\_c & 0.1 & \textbf{44.81 $\pm$ 0.26} \\" in latex
    assert r"\multicolumn{3}{l}{\textit{30 \%}} \\" in latex
    assert latex.count("{") == latex.count("}")
    assert latex.count(r"\begin{") == latex.count(r"\end{") == 2


def test_prose_in_a_cell_is_shown_with_its_numbers() -> None:
    cell = Cell(prose=("Thanos ", MEAN, " ± ", SPREAD))
    assert cell.shown == "Thanos 44.81 ± 0.26"
    table = Table("t", "t", columns("<numbers"), ((cell,),))
    assert "Thanos 44.81 ± 0.26" in to_csv(table)
