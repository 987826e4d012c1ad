"""What the rows of the registry say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from thanos.patterns.base import Pattern
from thanos.registry.table import Row

LAYER_SETTINGS: dict[str, Any] = {"block_size": None, "damping": 0.01}
"""The settings of a layer that only some methods use, with their defaults. The damping is added to the Hessian's diagonal, as
a fraction of its mean; the default is SparseGPT's, kept by Thanos (paper, section 5)."""


class Needs(StrEnum):
    """What a method has to know about a layer's inputs X, (a, b); each includes those before it."""

    NOTHING = "nothing"
    NORMS = "norms"
    """The columns' norms ‖X_j‖₂, (b,): the diagonal of XᵀX."""
    GRAM = "gram"
    """XᵀX, (b, b)."""
    FACTOR = "factor"
    """The triangular factor of the damped XᵀX, (b, b)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodRow(Row):
    """A pruning method; ``source`` is a function :class:`~thanos.solvers.problem.Problem` → ``Solution``.

    Attributes:
        needs: what it has to know about a layer's inputs.
        compensates: whether it changes the weights that stay.
        settings: those of :data:`LAYER_SETTINGS` that it uses; others are refused.
        block_size: default number of columns handled together.
        group_block_size: the same for patterns that decide groups of a row (n:m); None for ``block_size``.
        patterns: names of the patterns that it can do; None for all.
        colour: in figures on white, ``#rrggbb``; empty to have one assigned.
        dark_colour: the same on a dark page.
        marker: in figures, as matplotlib names it; empty to have one assigned.
        cost: a function (pattern, :class:`~thanos.solvers.cost.Size`) → part of the solve → :class:`~thanos.solvers.cost.Cost`.
        memory: a function (pattern, Size) → bytes that it holds besides the weight, the masks and the factor.
        reference_class: the solver's class in the method's reference repository, for ``bench layer --peer``; empty without one.
    """

    needs: Needs
    compensates: bool = False
    settings: tuple[str, ...] = ()
    block_size: int = 128
    group_block_size: int | None = None
    patterns: tuple[str, ...] | None = None
    colour: str = ""
    dark_colour: str = ""
    marker: str = ""
    cost: str | Callable[..., Any] = "thanos.solvers.cost:scoring"
    memory: str | Callable[..., Any] = "thanos.solvers.cost:sorting_bytes"
    reference_class: str = ""

    @property
    def needs_inputs(self) -> bool:
        """Whether it has to know anything about the inputs."""
        return self.needs is not Needs.NOTHING

    @property
    def needs_factor(self) -> bool:
        """Whether it needs the factor of the damped Hessian."""
        return self.needs is Needs.FACTOR

    def unused(self, settings: Mapping[str, Any]) -> list[str]:
        """Return the names of settings that differ from their default and that the method does not use."""
        return [
            name
            for name, default in LAYER_SETTINGS.items()
            if name not in self.settings and settings.get(name, default) != default
        ]

    def used(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings without those that the method does not use."""
        return {name: value for name, value in settings.items() if name in self.settings or name not in LAYER_SETTINGS}

    def default_block_size(self, pattern: Pattern) -> int:
        """Return the block size that goes with a pattern: a multiple of its group."""
        size = self.group_block_size if pattern.group_zeros and self.group_block_size else self.block_size
        return max(pattern.group, size // pattern.group * pattern.group)


@dataclass(frozen=True, kw_only=True, slots=True)
class PatternRow(Row):
    """A sparsity pattern; ``source`` is a subclass of :class:`~thanos.patterns.base.Pattern`.

    Attributes:
        name: how it is written; a class of patterns in capitals, ``N:M``.
        examples: the patterns of the class that reports and :func:`~thanos.inspect_checkpoint` show, most common first.
        other_names: what other tools call the first of them, for "did you mean".
    """

    examples: tuple[str, ...]
    other_names: tuple[str, ...] = ()
