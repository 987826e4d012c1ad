"""The types of the registry's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from thanos.patterns.base import Pattern
from thanos.registry.table import Named, Row

LAYER_SETTINGS: dict[str, Any] = {"block_size": None, "damping": 0.01}
"""Settings of a layer that only some methods use → their defaults. The damping is added to the Hessian's diagonal, as a
fraction of the diagonal's mean. Its default is SparseGPT's, which Thanos keeps (paper, section 5)."""

SCOPES = ("layer", "row")
"""Scopes of an unstructured budget: one for all rows of a layer, or the same for every row, as far as possible."""


class Needs(StrEnum):
    """The statistics of a layer's inputs X, (a, b), that a method needs. Each value includes those before it."""

    NOTHING = "nothing"
    NORMS = "norms"
    """Norms of the columns, ‖X_j‖₂, (b,): the square roots of the diagonal of XᵀX."""
    GRAM = "gram"
    """XᵀX, (b, b)."""
    FACTOR = "factor"
    """The triangular factor of the damped XᵀX, (b, b)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodRow(Row):
    """A pruning method; ``source`` is a function :class:`~thanos.solvers.problem.Problem` → ``Solution``.

    Attributes:
        needs: statistics of a layer's inputs that the method needs.
        compensates: whether the method updates the remaining weights.
        settings: names of the settings in :data:`LAYER_SETTINGS` that the method uses; the others are refused.
        block_size: default number of columns handled together.
        scope: the method's own scope of an unstructured budget, ``layer`` or ``row``; a recipe may choose the other.
        group_block_size: default for patterns with groups in a row (n:m); None for ``block_size``.
        patterns: names of the patterns that the method supports; None for all.
        colour: colour in figures on white, ``#rrggbb``; empty for an automatic one.
        dark_colour: colour in figures on a dark page.
        marker: marker in figures, by matplotlib's name; empty for an automatic one.
        cost: function (pattern, :class:`~thanos.solvers.cost.Size`) → dict with the :class:`~thanos.solvers.cost.Cost` of each
            part of the solve.
        in_paper: whether the Thanos paper compares the method. Reports then require its cells, and check the paper's claims
            about it.
        reference_class: the solver's class in the method's reference repository, for ``bench layer --peer``; empty without one.
    """

    needs: Needs
    compensates: bool = False
    settings: tuple[str, ...] = ()
    block_size: int = 128
    scope: str = SCOPES[0]
    group_block_size: int | None = None
    patterns: tuple[str, ...] | None = None
    colour: str = ""
    dark_colour: str = ""
    marker: str = ""
    cost: str | Callable[..., Any] = "thanos.solvers.cost:scoring"
    in_paper: bool = False
    reference_class: str = ""

    @property
    def needs_inputs(self) -> bool:
        """Whether the method needs any statistics of the inputs."""
        return self.needs is not Needs.NOTHING

    @property
    def needs_factor(self) -> bool:
        """Whether the method needs the factor of the damped Hessian."""
        return self.needs is Needs.FACTOR

    def unused(self, settings: Mapping[str, Any]) -> list[str]:
        """Return the names of settings that differ from their default and that the method does not use."""
        return [
            name
            for name, default in LAYER_SETTINGS.items()
            if name not in self.settings and settings.get(name, default) != default
        ]

    def used(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings without those that the method does not use."""
        return {name: value for name, value in settings.items() if name in self.settings or name not in LAYER_SETTINGS}

    def default_block_size(self, pattern: Pattern) -> int:
        """Return the default block size for a pattern, a multiple of the pattern's group."""
        size = self.group_block_size if pattern.group_zeros and self.group_block_size else self.block_size
        return max(pattern.group, size // pattern.group * pattern.group)


@dataclass(frozen=True, kw_only=True, slots=True)
class RefinementRow(Row):
    """A refinement; ``source`` is a function (Problem, Solution, amount) → Solution of :mod:`thanos.solvers.problem`.

    The field of a :class:`~thanos.recipe.repair.Repair` with the same name is the amount, a whole number, 0 for off. The
    problem has the factor of the damped Hessian, whatever the method needs.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class PatternRow(Row):
    """A sparsity pattern; ``source`` is a subclass of :class:`~thanos.patterns.base.Pattern`.

    Attributes:
        name: spelling in a recipe; capitals stand for numbers, as in ``N:M``.
        examples: patterns of the class that reports and :func:`~thanos.inspect_checkpoint` show, most common first.
        other_names: names that other tools give to the first example, for "did you mean".
        matrix_name: spelling for a single matrix; empty for ``name``, None if the pattern is only for a whole model.
    """

    examples: tuple[str, ...]
    other_names: tuple[str, ...] = ()
    matrix_name: str | None = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class EffortRow(Named):
    """A preset: values for the repair settings that a recipe leaves out.

    The fields below ``scope`` are those of :class:`~thanos.recipe.repair.Repair`.

    Attributes:
        scope: scope of an unstructured budget; None for the method's own.
        dense_target: fraction α of the dense model's outputs in the target that a layer is fitted to, in [0, 1]; 0 is off.
        sequential: whether a block's layers are pruned in the order of the forward pass.
        refit: conjugate-gradient steps on the remaining weights; 0 is off.
        tune: epochs of training of a pruned block; 0 is off.
    """

    scope: str | None = None
    dense_target: float | Literal["auto"] = 0.0
    sequential: bool = False
    refit: int = 0
    tune: int = 0
