"""Reading ``study.toml``. An error names the line and field of the wrong value. docs/formats.md describes the format."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from thanos.errors import RecipeError, StudyError
from thanos.model.bos import BOS_CHOICES
from thanos.recipe import LayerRecipe, Recipe
from thanos.run.names import public_name as public
from thanos.settings import settings_of, value_types
from thanos.study.grid import DENSE, Cell, EvaluationPlan, Study, ZeroShotPlan, product
from thanos.system.suggestions import near, near_whole


def read_study(path: str | Path) -> Study:
    """Read and check a study.

    Raises StudyError, which names the line and the field, if the file cannot be read or a value is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except OSError as error:
        raise StudyError(
            f"study {path} cannot be read: {error.strerror}; give a TOML file, see docs/formats.md"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"study {path} is not valid TOML: {error}; docs/formats.md describes the file") from error
    return _Reader(path, text).study(values)


class _Reader:
    """Turns plain values into a study. Errors name the line and field in the file."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text = path, text

    def study(self, values: dict[str, Any]) -> Study:
        top = self._table(values, "", 0, _TOP)
        if not top.get("models"):
            raise self._error("", 0, "models", "a study needs at least one model")
        if values.get("grid", []) == []:
            raise self._error("", 0, "grid", "a study needs at least one [[grid]]")
        cost_only = top.get("cost_only", ())
        for model in cost_only:
            if model not in top["models"]:
                listed = ", ".join(top["models"])
                raise self._error("", 0, "cost_only", f"{model!r} is not among models: {listed}")
        evaluation = EvaluationPlan(**self._table(values.get("evaluation", {}), "evaluation", 0, _EVALUATION))
        tasks = None
        if "zero_shot" in values:
            from thanos.evaluation.tasks import PAPER_TASKS, task_names

            given = self._table(values["zero_shot"], "zero_shot", 0, _ZERO_SHOT)
            tasks = ZeroShotPlan(**{**given, "tasks": task_names(given.get("tasks", PAPER_TASKS))})
        cells, with_tasks = self._cells(values["grid"], top["models"], cost_only, tasks)
        return Study(
            models=top["models"],
            cost_only=frozenset(cost_only),
            cells=tuple(cells),
            zero_shot_cells=frozenset(with_tasks),
            evaluation=evaluation,
            zero_shot=tasks,
            dtype=top.get("dtype", "auto"),
            keep_models=top.get("keep_models", False),
            path=self._path,
            text=self._text,
        )

    def _cells(
        self, grids: Any, models: tuple[str, ...], cost_only: tuple[str, ...], tasks: ZeroShotPlan | None
    ) -> tuple[dict[Cell, None], set[Cell]]:
        if not isinstance(grids, list):
            raise self._error("grid", 0, "", "must be a list of tables; write [[grid]] with two brackets")
        names = [public(model) for model in models]
        for name in names:
            if names.count(name) > 1:
                raise self._error(
                    "", 0, "models", f"two models are called {name}; rename one, since the store has only names"
                )
        dense = {model: Cell(model=model, method=DENSE) for model in models if model not in cost_only}
        cells: dict[Cell, None] = dict.fromkeys(dense.values())
        with_tasks: set[Cell] = set()
        for index, grid in enumerate(grids):
            axes = self._table(grid, "grid", index, _AXES | {"zero_shot": _flag})
            zero_shot = axes.pop("zero_shot", False)
            if zero_shot and tasks is None:
                raise self._error(
                    "grid", index, "zero_shot", "there is no [zero_shot] table; add one (empty: the tasks of the paper)"
                )
            for model in axes.get("model", ()):
                if model not in models:
                    raise self._error("grid", index, "model", f"{model!r} is not among models: {', '.join(models)}")
            points = list(product({"model": models} | axes if "model" not in axes else axes))
            cells.update(dict.fromkeys(points))
            if zero_shot:
                evaluated = [cell for cell in points if cell.model in dense]
                if not evaluated:
                    raise self._error(
                        "grid", index, "zero_shot", "models in cost_only are not evaluated; remove zero_shot"
                    )
                with_tasks.update(evaluated, (dense[cell.model] for cell in evaluated))
        if tasks is not None and not with_tasks:
            raise self._error(
                "zero_shot", 0, "", "no [[grid]] has zero_shot = true, so no task would run; set it there"
            )
        return cells, with_tasks

    def _table(self, values: Any, table: str, index: int, checks: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
        if not isinstance(values, dict):
            raise self._error(table, index, "", "must be a table")
        checked = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            if table == "" and name in _TABLES:
                continue
            if name not in checks:
                allowed = [*checks, *(_TABLES if table == "" else ())]
                hint = near(key, allowed)
                raise self._error(table, index, key, f"unknown field; allowed are {', '.join(allowed)}{hint}")
            try:
                checked[name] = checks[name](value)
            except RecipeError as error:
                raise self._error(table, index, key, str(error)) from error
        return checked

    def _error(self, table: str, index: int, key: str, message: str) -> StudyError:
        return StudyError(f"{_location(self._path, self._text, table, index, key)}: {message}")


def location_of(study: Study, table: str, key: str) -> str:
    """Return the location of a field, ``study FILE, line N, [table] key``; of the table's head if the field is absent."""
    return _location(study.path, study.text, table, 0, key)


def location_of_calibration(study: Study, name: str) -> str:
    """Return the location of a calibration text in the first grid that names it, as :func:`location_of` does."""
    values = tomllib.loads(study.text)
    for index, grid in enumerate(values["grid"]):
        given = grid.get("calibration", [])
        if name in ([given] if isinstance(given, str) else given):
            return _location(study.path, study.text, "grid", index, "calibration")
    return location_of(study, "grid", "calibration")


def _location(path: Path, text: str, table: str, index: int, key: str) -> str:
    where = f"[{table}] {key}".strip() if table else key
    return f"study {path}, line {_line_of(text, table, index, key)}, {where}"


def _line_of(text: str, table: str, index: int, key: str) -> int:
    """Return the line of a key in the ``index``-th table of that name, else of the table's head, else 1."""
    head, seen, current, found = re.compile(r"\s*\[+\s*([\w-]+)\s*\]+"), -1, "", 1
    for number, line in enumerate(text.splitlines(), 1):
        match = head.match(line)
        if match:
            current = match[1].replace("-", "_")
            seen += current == table
            if current == table and seen == index:
                found = number
        inside = current == table and (table == "" or seen == index)
        if inside and key and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return number
    return found


# --- checks of single values ------------------------------------------------------------------------------------------


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(f"must be true or false; got {value!r}")
    return value


def _word(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"must be a name; got {value!r}")
    return value


def _whole(lowest: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise RecipeError(f"must be a whole number, at least {lowest}; got {value!r}{near_whole(value)}")
        return value

    return check


def _one_of(choices: Callable[[], Iterable[str]]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        allowed = tuple(choices())
        if value not in allowed:
            raise RecipeError(f"must be one of {', '.join(allowed)}; got {value!r}{near(value, allowed)}")
        return value

    return check


def _layer(name: str) -> Callable[[Any], Any]:
    """Return a check of one setting: a recipe with only that setting must be valid."""

    def check(value: Any) -> Any:
        LayerRecipe(**{name: value})
        return value

    return check


def _fraction(name: str) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        # Check the fraction alone. Each cell checks it together with its sparsity.
        LayerRecipe(**{"sparsity": 0.0, name: value} if name == "outlier_rows" else {name: value})
        return float(value)

    return check


def _many(check: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    """Allow one value or a list of them."""

    def each(value: Any) -> tuple[Any, ...]:
        values = value if isinstance(value, list) else [value]
        if not values:
            raise RecipeError("must not be an empty list")
        return tuple(check(one) for one in values)

    return each


def _of_recipe(name: str) -> Callable[[Any], Any]:
    """Return the check of one value of a recipe's setting, made from the setting's description."""
    described, (kind, _) = _SETTINGS[name], _TYPES[name]
    if name in ("pattern", "dense_target"):
        return _layer(name)
    if described.choices is not None:
        return _one_of(described.choices)
    if kind is bool:
        return _flag
    if kind is int:
        return _whole(int(described.lowest or 0))
    if kind is float:
        return _fraction(name)
    return _word


_SETTINGS, _TYPES = settings_of(Recipe), value_types(Recipe)
_TABLES = ("evaluation", "zero_shot", "grid")
_TOP: dict[str, Callable[[Any], Any]] = {
    "models": _many(_word),
    "cost_only": _many(_word),
    "dtype": _of_recipe("dtype"),
    "keep_models": _flag,
}
_EVALUATION: dict[str, Callable[[Any], Any]] = {
    "text": _word,
    "sequence_length": _whole(2),
    "max_windows": _whole(1),
    "compare": _flag,
    "bos": _one_of(lambda: BOS_CHOICES),
}
_ZERO_SHOT: dict[str, Callable[[Any], Any]] = {"tasks": _many(_word), "task_folder": _word, "limit": _whole(1)}
_AXES: dict[str, Callable[[Any], Any]] = {
    "model": _many(_word),
    **{f.name: _many(_of_recipe(f.name)) for f in fields(Cell) if f.name in _SETTINGS},
}
