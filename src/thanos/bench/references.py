"""Reference implementations to compare with ours: their solver classes, loaded from a user's folder and called unchanged."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from thanos import registry
from thanos.errors import DataError, RecipeError
from thanos.recipe import LayerRecipe

Solver = Callable[[Tensor, Tensor, LayerRecipe], Tensor]
"""(weight, hessian, recipe) → pruned weight."""

_UNUSED = ("matplotlib", "matplotlib.pyplot", "sklearn", "sklearn.cluster")
"""Modules that the reference files import but do not need to solve a layer; empty modules replace them."""

_ROWS_AT_ONCE = 256
"""Number of rows that are solved together, as in the Thanos repository's own command."""


def load_reference(name: str, folder: Path) -> Solver:
    """Return the solver of a method's reference repository.

    Raises RecipeError if the name is unknown, and DataError if the folder does not contain that repository, or its file cannot
    be imported.
    """
    classes = registry.reference_classes()  # each class is in a file with the method's name, at the root or in lib/
    if name not in classes:
        raise RecipeError(
            f"--peer {name}: unknown; choose {' or '.join(classes)}, as in --peer {next(iter(classes))}=DIR"
        )
    file = next((f for f in (folder / f"{name}.py", folder / "lib" / f"{name}.py") if f.is_file()), None)
    if file is None:
        raise DataError(f"--peer {name}={folder}: no {name}.py in it or in its lib/; give the repository's folder")
    solver = getattr(_load(file, folder), classes[name], None)
    if solver is None:
        raise DataError(f"--peer {name}: {file} has no class {classes[name]}; is it the reference repository?")

    def prune(weight: Tensor, hessian: Tensor, recipe: LayerRecipe) -> Tensor:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        layer.weight.data = weight.clone()
        with _quiet(weight.device):
            _run(solver(layer), hessian, recipe)
        return layer.weight.data

    return prune


def _load(file: Path, folder: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"reference_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    stand_ins = {name: types.ModuleType(name) for name in _UNUSED if name not in sys.modules}
    if "sklearn.cluster" in stand_ins:
        vars(stand_ins["sklearn.cluster"])["KMeans"] = None  # the only name that is imported from it
    here, before = folder.resolve(), set(sys.modules)
    sys.path.insert(0, str(here))  # the file imports other files of its folder
    sys.modules.update(stand_ins)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise DataError(f"{file} cannot be imported: {error}") from error
    finally:
        sys.path.remove(str(here))
        # Remove the repository's modules and the stand-ins. Keep the libraries that they imported: a second import breaks some.
        for name in set(sys.modules) - before:
            if name in stand_ins or here in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
                del sys.modules[name]
    return module


def _run(solver: Any, hessian: Tensor, recipe: LayerRecipe) -> None:
    """Set a solver's statistics and call its own pruning method. Each reference names the arguments differently."""
    solver.H, solver.nsamples = hessian.clone(), 1
    squares = hessian.diagonal().clone()
    solver.scaler_row, solver.X_squared_sum = squares, squares[:, None]
    pattern = recipe.parsed_pattern
    zeros, group = (pattern.group_zeros, pattern.group) if pattern.group_zeros else (0, 0)  # both count zeros
    method = solver.fasterprune if hasattr(solver, "fasterprune") else solver.snap
    wanted = {
        "prunen": zeros,
        "prunem": group,
        "prune_n": zeros,
        "prune_m": group,
        "blocksize": recipe.resolved_block_size,
        "percdamp": recipe.damping,
        "v_blocksize": _ROWS_AT_ONCE,
        "perc_outliers": 0.0,
    }
    accepted = inspect.signature(method).parameters
    method(recipe.resolved_sparsity, **{name: value for name, value in wanted.items() if name in accepted})


@contextlib.contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """Suppress the output that the references print; on the CPU also disable their GPU synchronisation."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if device.type == "cpu":
            stack.enter_context(mock.patch.object(torch.cuda, "synchronize"))
        yield
