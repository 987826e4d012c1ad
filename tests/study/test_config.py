"""``study.toml``: which cells it makes, and how a mistake in it is named."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT
from thanos.errors import RecipeError, StudyError
from thanos.evaluation.tasks import PAPER_TASKS
from thanos.run.names import public_name as public
from thanos.study.config import read_study
from thanos.study.grid import Cell, Study, public_cell

HEAD = 'models = ["a/model"]\n'


def read(tmp_path: Path, text: str) -> Study:
    path = tmp_path / "study.toml"
    path.write_text(text)
    return read_study(path)


def pruned(study: Study) -> list[Cell]:
    return [cell for cell in study.cells if cell.method != "dense"]


def test_the_smallest_study_is_the_dense_model_and_a_default_recipe(tmp_path: Path) -> None:
    study = read(tmp_path, HEAD + "[[grid]]\n")
    dense, cell = study.cells
    assert dense == Cell(model="a/model", method="dense")
    assert cell == Cell(
        model="a/model", method="thanos", pattern="unstructured", sparsity=0.5, outlier_rows=0.0, keep_budget=False,
        block_size=128, damping=0.01, calibration="c4", samples=128, sequence_length=2048, seed=0,
    )  # fmt: skip
    assert (study.evaluation.text, study.evaluation.sequence_length, study.dtype) == ("wikitext2", 2048, "auto")
    assert study.zero_shot is None
    assert study.asked(cell)["zero_shot"] is None


def test_a_grid_is_a_product_whose_first_axis_changes_last(tmp_path: Path) -> None:
    study = read(tmp_path, HEAD + '[[grid]]\nseed = [0, 1]\nmethod = ["thanos", "wanda"]\nsparsity = [0.5, 0.6]\n')
    assert [(c.seed, c.method, c.sparsity) for c in pruned(study)] == [
        (seed, method, sparsity) for seed in (0, 1) for method in ("thanos", "wanda") for sparsity in (0.5, 0.6)
    ]


def test_grids_are_united_without_repetition(tmp_path: Path) -> None:
    text = HEAD + '[[grid]]\nmethod = ["wanda", "thanos"]\n[[grid]]\nblock-size = [128, 256]\nsparsity = 0.5\n'
    assert [(c.method, c.block_size) for c in pruned(read(tmp_path, text))] == [
        ("wanda", None), ("thanos", 128), ("thanos", 256),
    ]  # fmt: skip


def test_what_a_method_or_pattern_does_not_have_makes_no_cells(tmp_path: Path) -> None:
    axes = "sparsity = [0.5, 0.6]\nblock_size = [64, 128]\ndamping = [0.01, 0.1]\nkeep_budget = [false, true]\n"
    text = HEAD + '[[grid]]\nmethod = ["magnitude", "sparsegpt"]\npattern = ["2:4", "columns", "unstructured"]\n' + axes
    found = [(c.method, c.pattern, c.sparsity, c.block_size, c.damping) for c in pruned(read(tmp_path, text))]
    assert found == [
        ("magnitude", "2:4", None, None, None),
        *[("magnitude", pattern, s, None, None) for pattern in ("columns", "unstructured") for s in (0.5, 0.6)],
        *[("sparsegpt", "2:4", None, block, damping) for block in (64, 128) for damping in (0.01, 0.1)],
        *[("sparsegpt", "columns", s, None, damping) for s in (0.5, 0.6) for damping in (0.01, 0.1)],
        *[("sparsegpt", "unstructured", s, b, d) for s in (0.5, 0.6) for b in (64, 128) for d in (0.01, 0.1)],
    ]


def test_a_scope_makes_cells_only_where_it_differs_from_the_methods_own(tmp_path: Path) -> None:
    axes = 'method = ["thanos", "wanda"]\npattern = ["unstructured", "2:4", "columns"]\nscope = ["layer", "row"]\n'
    cells = pruned(read(tmp_path, HEAD + "[[grid]]\n" + axes))
    assert [(c.method, c.pattern, c.scope) for c in cells] == [
        ("thanos", "unstructured", None), ("thanos", "unstructured", "row"), ("thanos", "2:4", None),
        ("thanos", "columns", None), ("wanda", "unstructured", "layer"), ("wanda", "unstructured", None),
        ("wanda", "2:4", None), ("wanda", "columns", None),
    ]  # fmt: skip
    assert [cell.recipe().resolved_scope for cell in cells if cell.pattern == "unstructured"] == [
        "layer", "row", "layer", "row",
    ]  # fmt: skip
    assert cells[1].title().endswith("B 128 by row seed 0")
    before = {"model", "method", "pattern", "sparsity", "outlier_rows", "keep_budget", "block_size", "damping"}
    before |= {"calibration", "samples", "sequence_length", "seed"}
    assert set(public_cell(cells[0])) == before, "cells of older stores keep their key"
    assert set(public_cell(cells[1])) == before | {"scope"}


def test_units_make_cells_only_where_the_pattern_has_them_and_they_are_not_the_default(tmp_path: Path) -> None:
    axes = 'pattern = ["unstructured", "neurons", "heads", "width", "blocks"]\nmultiple_of = [1, 64, 256]\n'
    cells = pruned(read(tmp_path, HEAD + "[[grid]]\n" + axes + 'head_unit = ["group", "query"]\n'))
    found = [(c.pattern, c.multiple_of, c.head_unit) for c in cells]
    assert found == [
        ("unstructured", None, None),
        ("neurons", 1, None), ("neurons", None, None), ("neurons", 256, None),
        ("heads", None, None), ("heads", None, "query"), ("heads", 64, None), ("heads", 64, "query"),
        ("heads", 256, None), ("heads", 256, "query"),
        ("width", 1, None), ("width", 1, "query"), ("width", None, None), ("width", None, "query"),
        ("width", 256, None), ("width", 256, "query"),
        ("blocks", None, None),
    ]  # fmt: skip
    for cell in cells:
        recipe = cell.recipe()
        assert (recipe.multiple_of, recipe.head_unit) == (cell.multiple_of, cell.head_unit)
    assert cells[1].title().endswith("neurons 20 % multiple of 1 seed 0")
    assert cells[5].title().endswith("heads 20 % head unit query seed 0")
    assert not {"multiple_of", "head_unit"} & set(public_cell(cells[2])), "cells of older stores keep their key"
    assert public_cell(cells[1])["multiple_of"] == 1


def test_equal_repairs_are_one_cell_however_they_are_written(tmp_path: Path) -> None:
    axes = 'effort = ["fast", "high", "max"]\ntune = [0, 10]\nrefit = [0, 20]\n'
    cells = pruned(read(tmp_path, HEAD + "[[grid]]\n" + axes))
    assert [(c.effort, c.tune, c.refit) for c in cells] == [
        (None, None, None), (None, None, 20), (None, 10, None), (None, 10, 20),
        ("high", None, 0), ("high", None, None), ("max", None, 0), ("max", None, None),
    ]  # fmt: skip
    repairs = [cell.recipe().repair for cell in cells]
    assert [(one.tune, one.refit) for one in repairs] == [(tune, refit) for tune in (0, 10) for refit in (0, 20)] * 2
    assert [one.sequential for one in repairs] == [False] * 4 + [True] * 4
    assert [cell.recipe().resolved_scope for cell in cells] == ["layer"] * 4 + ["row"] * 4
    assert cells[6].title().endswith("effort max, refit 0 seed 0")
    assert "effort" not in public_cell(cells[0]), "cells of older stores keep their key"
    assert public_cell(cells[6]).items() >= {"effort": "max", "refit": 0}.items()
    assert "tune" not in public_cell(cells[6])


def test_the_scope_and_the_damping_of_a_repaired_cell_are_those_of_its_run(tmp_path: Path) -> None:
    axes = 'method = ["thanos", "magnitude"]\neffort = "high"\nscope = ["layer", "row"]\ndense_target = [0.5, "auto"]\n'
    cells = pruned(read(tmp_path, HEAD + "[[grid]]\n" + axes + "allocation = 'uniform'\ndamping = 0.03\n"))
    assert [(c.scope, c.dense_target) for c in cells] == [
        ("layer", 0.5),
        ("layer", None),
        (None, 0.5),
        (None, None),
    ] * 2
    assert [cell.recipe().resolved_scope for cell in cells] == ["layer", "layer", "row", "row"] * 2
    assert {cell.damping for cell in cells} == {0.03}, "the refit needs the damped Hessian, whatever the method"
    assert {cell.recipe().damping for cell in cells} == {0.03}
    assert {cell.allocation for cell in cells} == {None}


def test_every_method_has_its_own_default_block_size(tmp_path: Path) -> None:
    text = HEAD + '[[grid]]\npattern = ["unstructured", "2:4"]\nmethod = ["thanos", "sparsegpt"]\n'
    assert [c.block_size for c in pruned(read(tmp_path, text))] == [128, 128, 512, 128]


def test_the_axes_of_a_grid_are_the_settings_of_a_cell(tmp_path: Path) -> None:
    names = (
        "model, method, pattern, sparsity, outlier_rows, keep_budget, block_size, damping, scope, multiple_of, "
        "head_unit, allocation, effort, dense_target, sequential, refit, tune, calibration, samples, sequence_length, seed, "
        "zero_shot"
    )
    with pytest.raises(StudyError, match=f"unknown field; allowed are {names}$"):
        read(tmp_path, HEAD + '[[grid]]\ndevice = "cpu"\n')
    for line, message in (
        ('method = "obs"', "must be one of thanos, sparsegpt, wanda, magnitude, admm; got 'obs'"),
        ('scope = "rows"', "must be one of layer, row; got 'rows'"),
        ('effort = "most"', "must be one of fast, high, max; got 'most'"),
        ("dense_target = 1.5", "dense_target must be auto or a number, at least 0 and at most 1; got 1.5"),
        ("sequential = 1", "must be true or false; got 1"),
        ("refit = -1", "must be a whole number, at least 0; got -1"),
        ('allocation = "owl"', "must be one of uniform, error; got 'owl'"),
        ("multiple_of = 0", "must be a whole number, at least 1; got 0"),
        ('head_unit = "pair"', "must be one of group, query; got 'pair'"),
        ("keep_budget = 1", "must be true or false; got 1"),
        ("block_size = 0", "must be a whole number, at least 1; got 0"),
        ("damping = -1", "damping must be a number, at least 0; got -1"),
        ('calibration = ""', "must be a name; got ''"),
        ("samples = 0", "must be a whole number, at least 1; got 0"),
        ("sequence_length = 1", "must be a whole number, at least 2; got 1"),
        ("seed = 0.5", "must be a whole number, at least 0; got 0.5"),
    ):
        with pytest.raises(StudyError, match=re.escape(message)):
            read(tmp_path, HEAD + f"[[grid]]\n{line}\n")


def test_an_impossible_combination_is_a_cell(tmp_path: Path) -> None:
    text = (
        HEAD
        + '[[grid]]\nsparsity = [0.5, 0.8]\noutlier_rows = [0, 0.3]\nblock_size = 6\npattern = ["unstructured", "2:4"]\n'
    )
    cells = pruned(read(tmp_path, text))
    possible = []
    for cell in cells:
        try:
            cell.recipe()
            possible.append((cell.pattern, cell.sparsity, cell.outlier_rows))
        except RecipeError:
            pass
    assert len(cells) == 6
    assert possible == [("unstructured", 0.5, 0.0), ("unstructured", 0.5, 0.3), ("unstructured", 0.8, 0.0)]


def test_the_recipe_is_the_cells(tmp_path: Path) -> None:
    (cell,) = pruned(
        read(tmp_path, HEAD + '[[grid]]\npattern = "2:4"\noutlier_rows = 0.1\nkeep_budget = true\nseed = 3\n')
    )
    recipe = cell.recipe(device="cpu", calibration="/there/c4.jsonl")
    assert (recipe.pattern, recipe.outlier_rows, recipe.keep_budget, recipe.seed) == ("2:4", 0.1, True, 3)
    assert (recipe.device, recipe.calibration, recipe.block_size) == ("cpu", "/there/c4.jsonl", 512)


def test_models_may_be_chosen_grid_by_grid(tmp_path: Path) -> None:
    text = 'models = ["a/x", "a/y"]\n[[grid]]\n[[grid]]\nmodel = "a/y"\nseed = 1\n'
    study = read(tmp_path, text)
    assert [(c.model, c.method, c.seed) for c in study.cells] == [
        ("a/x", "dense", None), ("a/y", "dense", None), ("a/x", "thanos", 0), ("a/y", "thanos", 0), ("a/y", "thanos", 1),
    ]  # fmt: skip


def test_tasks_are_for_the_grids_that_ask_and_their_dense_models(tmp_path: Path) -> None:
    text = 'models = ["a/x", "a/y"]\n[zero_shot]\ntasks = ["piqa"]\nlimit = 5\n[[grid]]\n'
    text += '[[grid]]\nmodel = "a/y"\nzero_shot = true\n'
    study = read(tmp_path, text)
    assert [(c.model, c.method) for c in study.cells if study.asked(c)["zero_shot"]] == [
        ("a/y", "dense"),
        ("a/y", "thanos"),
    ]
    assert study.asked(study.cells[1])["zero_shot"] == {"tasks": ["piqa"], "limit": 5}


@pytest.mark.parametrize(
    ("given", "tasks"),
    [
        ("", PAPER_TASKS),
        ("tasks = 'paper'\n", PAPER_TASKS),
        ("tasks = ['paper']\n", PAPER_TASKS),
        ("tasks = ['sciq', 'paper', 'piqa']\n", ("sciq", *PAPER_TASKS)),
    ],
)
def test_the_papers_tasks_are_the_default_and_have_a_name(tmp_path: Path, given: str, tasks: tuple[str, ...]) -> None:
    study = read(tmp_path, HEAD + f"[zero_shot]\n{given}[[grid]]\nzero_shot = true\n")
    assert study.asked(study.cells[1])["zero_shot"] == {"tasks": list(tasks), "limit": None}


def test_reading_a_study_loads_no_harness(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(HEAD + "[[grid]]\n")
    code = "import sys; from thanos.study.config import read_study; read_study(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert not {"lm_eval", "thanos.evaluation.tasks"} & set(done.stdout.split())


def test_models_of_which_the_cost_alone_counts_are_not_evaluated(tmp_path: Path) -> None:
    text = 'models = ["a/x", "a/y"]\ncost_only = "a/y"\n[zero_shot]\ntasks = ["piqa"]\n[[grid]]\nzero_shot = true\n'
    study = read(tmp_path, text)
    assert [(c.model, c.method) for c in study.cells] == [("a/x", "dense"), ("a/x", "thanos"), ("a/y", "thanos")]
    assert study.evaluates
    asked = [study.asked(cell) for cell in study.cells]
    assert [bool(found["zero_shot"]) for found in asked] == [True, True, False]
    assert asked[2] == {"dtype": "auto", "evaluation": None, "zero_shot": None}
    assert not read(tmp_path, 'models = "a/y"\ncost_only = "a/y"\n[[grid]]\n').evaluates


def test_what_enters_the_store_names_no_folder(tmp_path: Path) -> None:
    text = (
        'models = ["/home/me/Model"]\n[evaluation]\ntext = "sub/test.jsonl"\n[[grid]]\ncalibration = "sub/c4.jsonl"\n'
    )
    study = read(tmp_path, text)
    values = [public_cell(study.cells[1]), study.asked(study.cells[1])]
    assert (values[0]["model"], values[0]["calibration"]) == ("Model", "c4.jsonl")
    assert values[1]["evaluation"]["text"] == "test.jsonl"
    assert [public(name) for name in ("Qwen/Qwen2.5-0.5B", "gpt2", "../x/m.gguf", "./m", "c4", "a/b/c")] == [
        "Qwen/Qwen2.5-0.5B", "gpt2", "m.gguf", "m", "c4", "c",
    ]  # fmt: skip


MISTAKES: list[tuple[str, int, str]] = [
    ("\nmodels = ['a' 'b']\n", 2, "not valid TOML"),
    ("models = []\n[[grid]]\n", 1, "models: must not be an empty list"),
    ("dtype = 'float32'\n[[grid]]\n", 1, "models: a study needs at least one model"),
    (HEAD, 1, "grid: a study needs at least one"),
    (HEAD + "grid = []\n", 2, "grid: a study needs at least one"),
    (HEAD + "dtipe = 'float32'\n[[grid]]\n", 2, "dtipe: unknown field; allowed are models, cost_only, dtype"),
    (HEAD + "dtype = 'float64'\n[[grid]]\n", 2, "dtype: must be one of auto, float32"),
    (HEAD + "cost_only = 'a/y'\n[[grid]]\n", 2, "cost_only: 'a/y' is not among models: a/model"),
    (
        HEAD + "cost_only = 'a/model'\n[zero_shot]\ntasks = ['piqa']\n[[grid]]\nzero_shot = true\n",
        6,
        "[grid] zero_shot: models in cost_only are not evaluated; remove zero_shot",
    ),
    (HEAD + "[grid]\n", 2, "two brackets"),
    (
        HEAD + "[[grid]]\n[[grid]]\n# method = 1\nmethod = ['thanos', 'thanoz']\n",
        5,
        "[grid] method: must be one of thanos",
    ),
    (HEAD + "[[grid]]\nseed = 0\n[[grid]]\nseed = -1\n", 5, "[grid] seed: must be a whole number, at least 0; got -1"),
    (
        HEAD + "[[grid]]\nsparsity = [0.5,\n 1.5]\n",
        3,
        "[grid] sparsity: sparsity must be a number, at least 0 and below 1",
    ),
    (HEAD + "[[grid]]\noutlier-rows = 'x'\n", 3, "[grid] outlier-rows: outlier_rows must be a number"),
    (HEAD + "[[grid]]\npattern = ['2:4', '4:2']\n", 3, "[grid] pattern: pattern 4:2 is impossible"),
    (HEAD + "[[grid]]\nblock_size = true\n", 3, "[grid] block_size: must be a whole number"),
    (HEAD + "[[grid]]\nmodel = 'b/other'\n", 3, "[grid] model: 'b/other' is not among models: a/model"),
    (HEAD + "[[grid]]\nzero_shot = true\n", 3, "[grid] zero_shot: there is no [zero_shot] table"),
    (HEAD + "[zero_shot]\nlimit = 3\ntasks = []\n[[grid]]\n", 4, "[zero_shot] tasks: must not be an empty list"),
    (HEAD + "[evaluation]\nmax_windows = 0\n[[grid]]\n", 3, "[evaluation] max_windows: must be a whole number"),
    (HEAD + "[evaluation]\nseed = 0\n[[grid]]\nseed = 'x'\n", 3, "[evaluation] seed: unknown field"),
    ("models = ['/a/m', '/b/m']\n[[grid]]\n", 1, "two models are called m"),
    (HEAD + "evaluation = 3\n[[grid]]\n", 1, "[evaluation]: must be a table"),
]


@pytest.mark.parametrize(("text", "line", "message"), MISTAKES)
def test_a_mistake_is_named_with_line_and_field(tmp_path: Path, text: str, line: int, message: str) -> None:
    with pytest.raises(StudyError) as caught:
        read(tmp_path, text)
    assert f"line {line}" in str(caught.value)
    assert message in str(caught.value)
    assert "study.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ('model = ["a/model"]\n[[grid]]\n', "models"),
        (HEAD + "[[grids]]\n", "grid"),
        (HEAD + "[evalution]\n[[grid]]\n", "evaluation"),
        (HEAD + "[evaluation]\nmax_window = 4\n[[grid]]\n", "max_windows"),
        (HEAD + '[[grid]]\nmethods = "thanos"\n', "method"),
        (HEAD + '[[grid]]\nmethod = "sparse-gpt"\n', "sparsegpt"),
        (HEAD + 'dtype = "float-16"\n[[grid]]\n', "float16"),
        (HEAD + '[[grid]]\nsamples = "128"\n', "128"),
    ],
)
def test_what_was_meant_by_a_mistake(tmp_path: Path, text: str, meant: str) -> None:
    with pytest.raises(StudyError) as caught:
        read(tmp_path, text)
    assert str(caught.value).endswith(f"(did you mean {meant}?)")


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_bytes(b"\xff\xfe")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "study.toml")
    with pytest.raises(StudyError, match=r"study\.toml"):
        read_study(tmp_path / "study.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.toml")), ids=lambda p: p.stem)
def test_the_projects_own_studies_are_valid(path: Path) -> None:
    cells = pruned(read_study(path))
    assert cells
    for cell in cells:
        asked = {name: value for name, value in asdict(cell).items() if name not in ("model", "method")}
        recipe = cell.recipe()
        assert all(value in (None, getattr(recipe, name)) for name, value in asked.items()), cell
