"""``thanos bench layer``: seconds per layer of this package's solvers and of reference implementations, with their errors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos import registry
from thanos.bench import cost_model as costs
from thanos.bench.device_rates import measure_rates
from thanos.bench.measure import machine, median_seconds, with_peak
from thanos.bench.references import Solver, load_reference
from thanos.errors import RecipeError
from thanos.recipe import LayerRecipe
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.prune_layer import prune_weight
from thanos.solvers.synthetic_layer import synthetic_layer


@dataclass(frozen=True, slots=True)
class LayerSettings:
    """Settings of the benchmark. It measures every method with every pattern and block size, for every shape.

    Attributes:
        shapes: (rows, columns) of each layer.
        methods: names of methods.
        patterns: patterns as in a recipe.
        block_sizes: columns per block; None for the method's default.
        tokens: number of tokens in the Hessian; None for four per column.
        sparsity: sparsity for patterns that do not imply one.
        damping: damping as in a recipe.
        repeats: number of timed runs; the median is reported.
        device: device of the solves.
        peers: reference implementations, name → folder.
        seed: seed of the random layer.
    """

    shapes: tuple[tuple[int, int], ...]
    methods: tuple[str, ...] = field(default_factory=registry.blockwise_methods)
    patterns: tuple[str, ...] = field(default_factory=lambda: registry.example_patterns()[:2])
    block_sizes: tuple[int | None, ...] = (None,)
    tokens: int | None = None
    sparsity: float = 0.5
    damping: float = 0.01
    repeats: int = 5
    device: str = "cpu"
    peers: Mapping[str, Path] = field(default_factory=dict)
    seed: int = 0

    def recipes(self) -> Iterator[LayerRecipe]:
        """Yield one recipe per method, pattern and block size; only one per pattern for a method without block size."""
        recipes: dict[LayerRecipe, None] = {}
        for name, pattern, size in itertools.product(self.methods, self.patterns, self.block_sizes):
            method = registry.method(name)
            sparsity = self.sparsity if registry.parse_pattern(pattern).sparsity is None else None
            settings = method.used({"block_size": size, "damping": self.damping})
            recipes[LayerRecipe(method=name, pattern=pattern, sparsity=sparsity, **settings)] = None
        yield from recipes


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One measurement.

    Attributes:
        implementation: ``thanos`` for this package, ``reference`` for a reference implementation.
        method: name of the method.
        pattern: pattern as in a recipe.
        rows: rows of the weight.
        columns: columns of the weight.
        block_size: columns per block.
        seconds: median seconds from weight and Hessian to the pruned weight. Those of this package include both errors and
            the mask.
        floor_seconds: seconds to factorise this Hessian, measured in the same run; every compensating method needs that.
        modelled_seconds: seconds by the cost model at the rates measured in the same run; None for references.
        error: relative output error tr(Δ H Δᵀ) / tr(W H Wᵀ), measured in float64.
        sparsity: fraction of zeros.
        peak_bytes: peak device memory in addition to weight and Hessian, in bytes; on the CPU the process's peak.
    """

    implementation: str
    method: str
    pattern: str
    rows: int
    columns: int
    block_size: int
    seconds: float
    floor_seconds: float
    modelled_seconds: float | None
    error: float
    sparsity: float
    peak_bytes: int


def run(settings: LayerSettings) -> Iterator[LayerTime]:
    """Run the measurements, and yield them one by one.

    Raises RecipeError if a setting is out of range or a pattern does not fit a shape, and DataError if the folder of a
    reference implementation does not contain it.
    """
    if settings.repeats < 1:
        raise RecipeError(f"--repeats must be at least 1; got {settings.repeats}")
    recipes = list(settings.recipes())
    references = {name: load_reference(name, folder) for name, folder in settings.peers.items()}
    rates = device_rates(settings.device)
    for rows, columns in settings.shapes:
        tokens = settings.tokens or 4 * columns
        weight, hessian = synthetic_layer(rows, columns, tokens=tokens, device=settings.device, seed=settings.seed)
        case = _Case(weight, hessian, settings, _floor(hessian, settings))
        for recipe in recipes:
            shape = rows, columns, recipe.resolved_block_size
            sparsity = recipe.resolved_sparsity
            parts = costs.solve(recipe.method, recipe.parsed_pattern, *shape, sparsity=sparsity)
            modelled = sum(part.seconds(**rates) for part in parts.values())
            yield case.measure("thanos", recipe, _prune, modelled)
        for recipe in recipes:
            if recipe.method in references:
                yield case.measure("reference", recipe, references[recipe.method], None)


def report(settings: LayerSettings, results: list[LayerTime]) -> dict[str, Any]:
    """Return settings, machine, rates and results as plain values, for JSON."""
    return {
        "schema": 1,
        "benchmark": "layer",
        "machine": machine(settings.device),
        "rates": device_rates(settings.device),
        "settings": asdict(settings) | {"peers": sorted(settings.peers)},
        "results": [asdict(result) for result in results],
    }


@cache
def device_rates(device: str) -> dict[str, float]:
    """Return the rates of float32 arithmetic and of memory traffic, measured once per process and device."""
    rates = measure_rates(torch.device(device), torch.float32)
    return {"flops_per_second": rates.float32_flops, "bytes_per_second": rates.memory_bytes}


def relative_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """Return tr(Δ H Δᵀ) / tr(W H Wᵀ) in float64, independently of the error that a solver reports."""

    def squared_norm(matrix: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=matrix.device)
        for rows in matrix.split(1024):
            wide = rows.double()
            for columns in range(0, hessian.shape[0], 2048):
                image = wide @ hessian[:, columns : columns + 2048].double()
                total += (image * wide[:, columns : columns + 2048]).sum()
        return total

    return (squared_norm(pruned.to(weight.dtype) - weight) / squared_norm(weight)).item()


@dataclass(frozen=True, slots=True)
class _Case:
    """One layer with the settings of the benchmark; ``floor`` is the seconds to factorise its Hessian."""

    weight: Tensor
    hessian: Tensor
    settings: LayerSettings
    floor: float

    def measure(self, implementation: str, recipe: LayerRecipe, solver: Solver, modelled: float | None) -> LayerTime:
        def solve() -> Tensor:
            return solver(self.weight, self.hessian, recipe)

        pruned, peak = with_peak(solve, self.settings.device)  # also the warm-up
        error = relative_error(self.weight, pruned, self.hessian)
        sparsity = (pruned == 0).sum().item() / pruned.numel()
        del pruned
        device, repeats = self.settings.device, self.settings.repeats
        return LayerTime(
            implementation=implementation,
            method=recipe.method,
            pattern=recipe.pattern,
            rows=self.weight.shape[0],
            columns=self.weight.shape[1],
            block_size=recipe.resolved_block_size,
            seconds=median_seconds(solve, repeats=repeats, device=device, warm_up=False),
            floor_seconds=self.floor,
            modelled_seconds=modelled,
            error=error,
            sparsity=sparsity,
            peak_bytes=peak,
        )


def _floor(hessian: Tensor, settings: LayerSettings) -> float:
    def factorise() -> None:
        InputStatistics(hessian).factor(settings.damping)

    return median_seconds(factorise, repeats=settings.repeats, device=settings.device)


def _prune(weight: Tensor, hessian: Tensor, recipe: LayerRecipe) -> Tensor:
    return prune_weight(
        weight,
        hessian,
        method=recipe.method,
        pattern=recipe.pattern,
        sparsity=recipe.sparsity,
        block_size=recipe.block_size,
        damping=recipe.damping,
    ).weight
