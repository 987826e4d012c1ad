"""The settings of one weight matrix, validated when they are built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from thanos import registry
from thanos.errors import RecipeError
from thanos.patterns.base import Pattern
from thanos.recipe.checks import check_settings
from thanos.recipe.repair import REPAIR_FIELDS, Repair, checked_target, resolved, with_effort
from thanos.recipe.units import check_outlier_rows
from thanos.registry import parse_pattern
from thanos.settings import Heading, setting

DEFAULT_DAMPING: float = registry.LAYER_SETTINGS["damping"]
"""Damping added to the Hessian's diagonal, as a fraction of the diagonal's mean."""

_DESCRIBED = ("sparsity", "outlier_rows", "keep_budget", "block_size", "damping", "scope")
"""Fields whose descriptions state every value that is allowed for some pattern and method."""

LAYER_FIELDS = ("method", "pattern", *_DESCRIBED, *REPAIR_FIELDS)


_EFFORT = "set by the effort"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRecipe:
    """The settings of one weight matrix. The constructor checks them.

    The metadata of each field has its :class:`~thanos.settings.Setting`, from which the command line makes an option.

    Args:
        method: name of a method in :mod:`thanos.registry`.
        pattern: text of a pattern in :mod:`thanos.registry`, such as ``unstructured``, ``columns`` or ``2:4``.
        sparsity: fraction of the matrix's entries that become zero, in [0, 1). An n:m pattern determines it; for other patterns
            None means the pattern's default.
        outlier_rows: fraction of output rows left dense, in [0, 1).
        keep_budget: remove more from the other rows, so that the whole matrix has the same sparsity as without outlier rows;
            see :class:`~thanos.patterns.budget.Budget`. For n:m, n must be even: the rows with the smallest squared output norm
            keep n/2 of m.
        block_size: number of input columns handled together, for methods that work block by block; None means the method's
            own number for the pattern, from its row in :mod:`thanos.registry`.
        damping: fraction of the Hessian's mean diagonal added to its diagonal, at least 0, for methods that compensate and for
            the repair of any method.
        scope: what has the sparsity, for patterns that may remove any entries: ``layer``, the whole matrix, or ``row``, every
            row, as far as possible. None means the scope of ``effort``, else the method's own.
        effort: name of a preset of the next four settings; ``fast`` turns them off.
        dense_target: fraction α, in [0, 1], of the dense model's outputs in the target that the layer is fitted to; ``auto``
            chooses it on held-out sequences. For this and the next three settings, None means the value of ``effort``.
        sequential: gather the statistics of the layer's inputs after the earlier layers of its block are pruned.
        refit: conjugate-gradient steps on the remaining weights, after the method; 0 for none.
        tune: epochs of training of the layer's pruned block; 0 for none.

    Raises:
        RecipeError: a value is outside its range or contradicts another, or the method does not use a setting that differs
            from its default.
    """

    method: str = setting(
        registry.DEFAULT_METHOD, "Pruning method", Heading.METHOD, "NAME", choices=registry.method_names
    )
    pattern: str = setting(
        registry.DEFAULT_PATTERN,
        "Pattern of the removed weights",
        Heading.METHOD,
        "PATTERN",
        choices=lambda: [f"{row.name} ({row.help})" for row in registry.patterns()],
    )
    sparsity: float | None = setting(
        None,
        "Fraction of the weights to remove",
        Heading.METHOD,
        "FRACTION",
        lowest=0,
        below=1,
        default="0.5, or 0.2 for units of the model; some patterns set their own",
    )
    outlier_rows: float = setting(
        0.0, "Fraction of the output rows to leave dense", Heading.METHOD, "FRACTION", lowest=0, below=1
    )
    keep_budget: bool = setting(
        False, "Remove more from the other rows, so that outlier rows do not lower the sparsity", Heading.METHOD
    )
    block_size: int | None = setting(
        None,
        "Input columns per block, for methods that work block by block",
        Heading.METHOD,
        "COLUMNS",
        lowest=1,
        default="the method's own, 128 or 512",
    )
    damping: float = setting(
        DEFAULT_DAMPING,
        "Fraction of the Hessian diagonal's mean that compensating methods and repairs add to the diagonal",
        Heading.METHOD,
        "FRACTION",
        lowest=0,
    )
    scope: str | None = setting(
        None,
        "Whether the whole layer or every row has the sparsity; only for patterns that may remove any weights",
        Heading.METHOD,
        "SCOPE",
        choices=lambda: registry.SCOPES,
        default=f"{_EFFORT}, else the method's own",
    )
    effort: str = setting(
        registry.DEFAULT_EFFORT,
        "Preset of the options below, from cheap to accurate; options that are given override it",
        Heading.REPAIR,
        "NAME",
        choices=registry.effort_names,
    )
    dense_target: float | str | None = setting(
        None,
        "Fraction of the dense model's outputs in the target of a layer, 0 (off) to 1; auto: chosen on held-out sequences",
        Heading.REPAIR,
        "FRACTION",
        default=_EFFORT,
    )
    sequential: bool | None = setting(
        None, "Prune the layers of a block in the order of the forward pass", Heading.REPAIR, default=_EFFORT
    )
    refit: int | None = setting(
        None,
        "Conjugate-gradient steps on the remaining weights, 0 for none",
        Heading.REPAIR,
        "N",
        lowest=0,
        default=_EFFORT,
    )
    tune: int | None = setting(
        None, "Epochs of training of each pruned block, 0 for none", Heading.REPAIR, "N", lowest=0, default=_EFFORT
    )

    def __post_init__(self) -> None:
        method = registry.method(self.method)
        pattern = parse_pattern(self.pattern)
        registry.check_pattern(method, pattern)
        object.__setattr__(self, "pattern", str(pattern))
        check_settings(LayerRecipe, {name: getattr(self, name) for name in _DESCRIBED})
        for name, value in checked({name: getattr(self, name) for name in REPAIR_FIELDS}).items():
            object.__setattr__(self, name, value)
        check_outlier_rows(pattern, self.outlier_rows, self.keep_budget)
        if self.keep_budget and self.outlier_rows > 0:
            pattern.check_keep_budget(self.outlier_rows)
        check_scope(self.scope, pattern)
        implied = pattern.sparsity
        if implied is None:
            self._check_room(pattern.default_sparsity if self.sparsity is None else self.sparsity)
        elif self.sparsity is not None and abs(self.sparsity - implied) > 1e-9:
            raise RecipeError(
                f"sparsity {self.sparsity} contradicts pattern {pattern}, which removes {implied:.4g} of the weights; "
                "leave sparsity out or choose another pattern"
            )
        if self.block_size is not None:
            pattern.check_block_size(self.block_size)
        settings = {name: getattr(self, name) for name in registry.LAYER_SETTINGS}
        check_used(settings, self._methods(), damps=self._damps)

    def _damps(self) -> bool:
        """Return whether the repair of a layer uses the damped Hessian, whatever the method."""
        return self.repair.needs_gram

    def _methods(self) -> tuple[str, ...]:
        """Return the methods that may prune a layer. One of them must use each setting that differs from its default."""
        return (self.method,)

    def _check_room(self, sparsity: float) -> None:
        if self.outlier_rows > 0 and sparsity >= 1 - self.outlier_rows:
            raise RecipeError(
                f"sparsity {sparsity} is impossible with outlier_rows {self.outlier_rows}: the rows that may be pruned "
                f"hold only {1 - self.outlier_rows:.4g} of the weights; lower one of the two"
            )

    @property
    def parsed_pattern(self) -> Pattern:
        """The pattern as an object."""
        return parse_pattern(self.pattern)

    @property
    def resolved_sparsity(self) -> float:
        """Fraction of weights to remove: for n:m the pattern's (before outlier rows), else the setting or its default."""
        pattern = self.parsed_pattern
        if pattern.sparsity is not None:
            return pattern.sparsity
        return pattern.default_sparsity if self.sparsity is None else self.sparsity

    @property
    def resolved_block_size(self) -> int:
        """Block size that is used: the setting, or the paper's default for the method and pattern."""
        if self.block_size is not None:
            return self.block_size
        return registry.method(self.method).default_block_size(self.parsed_pattern)

    @property
    def resolved_scope(self) -> str:
        """Scope of the budget that is used: the setting, else that of the effort, else the method's own."""
        scope = self.scope or (registry.effort(self.effort).scope if self.parsed_pattern.any_entries else None)
        return scope or registry.method(self.method).scope

    @property
    def repair(self) -> Repair:
        """The parts of the repair, each resolved."""
        return resolved({name: getattr(self, name) for name in REPAIR_FIELDS})

    def by(self, method: str) -> LayerRecipe:
        """Return the same settings for another method, without those that it does not use."""
        values = {name: getattr(self, name) for name in LAYER_FIELDS} | {"method": method}
        return LayerRecipe(**used(values))


def used(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a layer without those that neither its method nor its repair uses.

    Args:
        values: all fields of a :class:`LayerRecipe`.
    """
    by_method = registry.method(values["method"]).used(values)
    damps = resolved(checked({name: values[name] for name in REPAIR_FIELDS})).needs_gram
    return by_method | ({"damping": values["damping"]} if damps else {})


def checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given settings among :data:`REPAIR_FIELDS`. A dense target that is a number in a text becomes a number.

    Raises:
        RecipeError: a value is outside its range; the message names the setting.
    """
    repair = {name: settings[name] for name in REPAIR_FIELDS if name in settings}
    if "effort" in repair:
        registry.effort(repair["effort"])
    if repair.get("dense_target") is not None:
        repair["dense_target"] = checked_target(repair["dense_target"])
    check_settings(LayerRecipe, {name: repair[name] for name in REPAIR_FIELDS[2:] if name in repair})
    return repair


def repairs_of(settings: Mapping[str, Any], overrides: Iterable[Mapping[str, Any]]) -> list[Repair]:
    """Return the repair of a recipe, then for each override the repair of the recipe with its changes.

    Missing settings have their defaults. Raises RecipeError if a value is outside its range.
    """
    base = {name: settings.get(name) for name in REPAIR_FIELDS} | {
        "effort": settings.get("effort", registry.DEFAULT_EFFORT)
    }
    return [resolved(checked(base | with_effort(changes))) for changes in ({}, *overrides)]


def check_scope(scope: str | None, pattern: Pattern) -> None:
    """Raise RecipeError for a scope if the pattern fixes the number of zeros in each row."""
    if scope is not None and not pattern.any_entries:
        raise RecipeError(
            f"scope {scope!r} has no meaning for pattern {pattern}, which fixes the zeros of each row; leave scope out, "
            f"or choose a pattern that may remove any weight, such as {registry.DEFAULT_PATTERN}"
        )


def check_used(
    settings: Mapping[str, Any], methods: Iterable[str], where: str = "", *, damps: Callable[[], bool] = lambda: False
) -> None:
    """Refuse settings that differ from their default and that none of the methods uses.

    Args:
        settings: name → value.
        methods: names of the methods.
        where: words that are added to the message.
        damps: returns whether a repair uses ``damping``. It is called only if no method does.

    Raises:
        RecipeError: there is such a setting.
    """
    rows = [registry.method(name) for name in methods]
    for name in registry.LAYER_SETTINGS:
        if all(name in row.unused(settings) for row in rows) and not (name == "damping" and damps()):
            raise RecipeError(
                f"method {' or '.join(row.name for row in rows)} does not use {name}{where}; leave it out (it uses "
                f"{', '.join(name for name in LAYER_FIELDS[1:] if all(name in row.used({name: None}) for row in rows))})"
            )
