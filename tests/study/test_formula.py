"""Which printed formula compensates removed columns rightly: against oracles that know nothing of the code."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from helpers import tiny_model, windows
from thanos.errors import ModelError, StudyError
from thanos.solvers.prune_layer import prune_weight
from thanos.study.config import read_study
from thanos.study.formula import FORMULAS, cheapest_columns, formula_errors, measure_layer
from thanos.study.paths import find_places
from thanos.study.report.build import build_report
from thanos.study.report.results import Results
from thanos.study.report.sections.formula import formula
from thanos.study.session import Session
from thanos.study.store import Contents, StoreWriter, read_store


def problem(rows: int = 24, columns: int = 32, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, the Gram matrix of correlated inputs, and those inputs (tokens, columns)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    inputs = torch.randn(400, columns, generator=generator, dtype=torch.float64) @ (mix + 0.5 * torch.eye(columns))
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), inputs.T @ inputs, inputs


@pytest.mark.parametrize("seed", range(4))
def test_eq13_is_the_least_squares_optimum_on_the_inputs_themselves(seed: int) -> None:
    weight, hessian, inputs = problem(seed=seed)
    removed = cheapest_columns(weight, hessian, 0.25)
    errors = formula_errors(weight, hessian, removed, damping=0.0)
    kept = [j for j in range(weight.shape[1]) if j not in removed.tolist()]
    outputs = inputs @ weight.T
    best = torch.linalg.lstsq(inputs[:, kept], outputs).solution
    optimum = float(((inputs[:, kept] @ best - outputs) ** 2).sum() / (outputs**2).sum())
    assert errors["eq13"] == pytest.approx(optimum, rel=1e-9)
    assert errors["least_squares"] == pytest.approx(optimum, rel=1e-9)
    alone = inputs[:, removed] @ weight[:, removed].T
    assert errors["none"] == pytest.approx(float((alone**2).sum() / (outputs**2).sum()), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_misprints_do_worse_than_no_compensation_on_correlated_inputs(seed: int) -> None:
    weight, hessian, _ = problem(48, 64, seed=seed)
    errors = formula_errors(weight, hessian, cheapest_columns(weight, hessian))
    assert tuple(errors) == FORMULAS
    assert errors["eq13"] == pytest.approx(errors["least_squares"], rel=1e-9)
    assert errors["eq13"] < errors["none"]
    assert errors["eq72"] > errors["eq13"]
    assert errors["algorithm7"] > errors["none"]
    assert all(math.isfinite(value) for value in errors.values())


def test_eq72_and_algorithm_7_are_read_literally() -> None:
    weight, hessian, _ = problem(3, 4)
    removed = torch.tensor([1, 3])
    errors = formula_errors(weight, hessian, removed, damping=0.0)
    H, inverse = hessian.tolist(), torch.linalg.inv(hessian).tolist()
    p = [1, 3]
    small = [[H[a][b] for b in p] for a in p]
    det = small[0][0] * small[1][1] - small[0][1] * small[1][0]
    literal = {
        "eq72": [[small[1][1] / det, -small[0][1] / det], [-small[1][0] / det, small[0][0] / det]],
        "algorithm7": [[inverse[a][b] for b in p] for a in p],
    }
    for name, middle in literal.items():
        energy = change = 0.0
        for w in weight.tolist():
            left = [sum(w[p[a]] * middle[a][b] for a in range(2)) for b in range(2)]
            new = [0.0 if j in p else w[j] - sum(left[b] * H[p[b]][j] for b in range(2)) for j in range(4)]
            delta = [n - o for n, o in zip(new, w, strict=True)]
            energy += sum(w[i] * H[i][j] * w[j] for i in range(4) for j in range(4))
            change += sum(delta[i] * H[i][j] * delta[j] for i in range(4) for j in range(4))
        assert errors[name] == pytest.approx(change / energy, rel=1e-9)


def test_the_solver_is_eq13() -> None:
    weight, hessian, _ = problem(40, 64, seed=7)
    pruned = prune_weight(weight, hessian, method="thanos", pattern="columns", sparsity=0.25)
    removed = (pruned.weight == 0).all(0).nonzero().squeeze(1)
    assert removed.tolist() == cheapest_columns(weight, hessian, 0.25).tolist()
    assert pruned.error_after_compensation == pytest.approx(formula_errors(weight, hessian, removed)["eq13"], rel=1e-6)


def test_scaling_the_hessian_changes_nothing() -> None:
    weight, hessian, _ = problem()
    removed = cheapest_columns(weight, hessian)
    first, second = formula_errors(weight, hessian, removed), formula_errors(weight, 1e-3 * hessian, removed)
    for name in ("eq13", "least_squares", "none", "eq72"):
        assert first[name] == pytest.approx(second[name], rel=1e-9)


@pytest.mark.parametrize("removed", [[], list(range(32))])
def test_all_or_no_columns_are_refused(removed: list[int]) -> None:
    weight, hessian, _ = problem()
    with pytest.raises(ValueError, match="removed columns"):
        formula_errors(weight, hessian, torch.tensor(removed, dtype=torch.int64))


@pytest.mark.parametrize("architecture", ["llama", "gpt-2"])
def test_a_layer_of_a_model_is_measured_on_the_inputs_that_it_gets(architecture: str) -> None:
    model = tiny_model(architecture)
    name = "model.layers.1.mlp.down_proj" if architecture == "llama" else "transformer.h.1.mlp.c_proj"
    ids = windows(3, 16)
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    found = measure_layer(model, ids, name)
    inputs = seen[0].reshape(-1, seen[0].shape[-1])
    stored = model.get_parameter(f"{name}.weight").detach().double()
    weight = stored if architecture == "llama" else stored.T
    expected = formula_errors(weight, inputs.T @ inputs, cheapest_columns(weight, inputs.T @ inputs))
    assert (found["layer"], found["tokens"], found["shape"]) == (name, 48, list(weight.shape))
    assert found["removed"] == round(0.25 * weight.shape[1])
    for key, value in expected.items():
        assert found["errors"][key] == pytest.approx(value, rel=1e-4)


def test_a_layer_that_is_not_there_or_not_alone_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ModelError, match=r"matches 0 layers \(the nearest are"):
        measure_layer(model, windows(1, 8), "model.layers.0.mlp.down_project")
    with pytest.raises(ModelError, match="matches 3 layers"):
        measure_layer(model, windows(1, 8), "down_proj")


# --- as a cell of a study -----------------------------------------------------------------------------------------------

STUDY = """models = ["tiny"]
[evaluation]
text = "prose.txt"
sequence_length = 64
max_windows = 2
[formula]
layer = "layers.1.mlp.down_proj"
calibration = "prose.txt"
samples = 2
sequence_length = 32
[[grid]]
method = "magnitude"
calibration = "prose.txt"
samples = 2
sequence_length = 32
"""


@pytest.fixture
def data(tiny_llama: Path, text_file: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    shutil.copytree(tiny_llama, folder / "tiny")
    shutil.copyfile(text_file, folder / "prose.txt")
    return folder


def test_a_study_compares_the_formulas_on_the_layer_that_it_names(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(STUDY, encoding="utf-8")
    study = read_study(path)
    (tmp_path / "out" / "cache").mkdir(parents=True)
    session = Session(study, find_places(study, tmp_path / "out", data), "cpu")
    found = session.run(study.cells[-1], lambda event: None)
    assert (found.status, found.reason) == ("done", None)
    assert found.formula is not None
    assert found.formula["layer"] == "model.layers.1.mlp.down_proj"
    assert found.formula["tokens"] == 64
    assert found.formula["errors"]["eq13"] == pytest.approx(found.formula["errors"]["least_squares"], rel=1e-6)
    assert found.asked["formula"] == {"layer": "layers.1.mlp.down_proj", "share": 0.25}
    StoreWriter(tmp_path / "out").append(found)
    section = formula(Results("tiny", read_store(tmp_path / "out").done))
    assert [row[2].number.value for row in section.tables[0].rows if row[2].number] == list(
        found.formula["errors"].values()
    )


def test_a_layer_that_the_model_lacks_fails_its_cell_alone(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(STUDY.replace("layers.1.mlp.down_proj", "layers.9.mlp.down_proj"), encoding="utf-8")
    study = read_study(path)
    (tmp_path / "out" / "cache").mkdir(parents=True)
    session = Session(study, find_places(study, tmp_path / "out", data), "cpu")
    found = session.run(study.cells[-1], lambda event: None)
    assert found.status == "failed"
    assert found.reason is not None
    assert "matches 0 layers" in found.reason
    assert build_report(Contents([found], [])).table("failed") is not None


def test_the_table_changes_no_other_cell(tmp_path: Path) -> None:
    path, without = tmp_path / "with.toml", tmp_path / "without.toml"
    path.write_text(STUDY, encoding="utf-8")
    without.write_text(re.sub(r"\[formula\].*?(?=\[\[)", "", STUDY, flags=re.DOTALL), encoding="utf-8")
    first, second = read_study(path), read_study(without)
    assert first.cells[:-1] == second.cells
    assert [first.asked(cell) for cell in second.cells] == [second.asked(cell) for cell in second.cells]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('layer = "layers.1.mlp.down_proj"\n', "", r"line 6, \[formula\] layer: name the layer"),
        ("samples = 2", "samples = 0", r"line 9, \[formula\] samples"),
        ("[[grid]]", "share = 1.5\n[[grid]]", r"line 11, \[formula\] share: must be a number between 0 and 1"),
        ("[[grid]]", 'model = "other"\n[[grid]]', r"line 11, \[formula\] model: 'other' is not among models"),
        ("[[grid]]", 'layr = "x"\n[[grid]]', r"line 11, \[formula\] layr: unknown field"),
    ],
)
def test_a_malformed_table_names_line_and_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "study.toml"
    path.write_text(STUDY.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(StudyError, match=message):
        read_study(path)
