"""The table of methods and patterns: what can be named in a recipe, and where its code is.

A method or a pattern is one file and one row here. Rows are plain values, so that reading them imports no torch; the code
behind a row is imported when it is used. A file outside this package adds rows with :func:`register_method` and
:func:`register_pattern`. The command line, and every process that it starts, imports the modules that the environment
variable ``THANOS_PLUGINS`` names, with commas between. docs/add-a-method.md shows both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import import_module
from typing import Any, Generic, TypeVar

from thanos.errors import RecipeError
from thanos.patterns.base import Pattern

PLUGINS_VARIABLE = "THANOS_PLUGINS"

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
class Row:
    """What every kind of row says.

    Attributes:
        name: as it is written in a recipe.
        title: its name for people.
        help: one line, without a full stop.
        source: its code, as ``module:name``, imported when it is used; or the object itself.
    """

    name: str
    title: str
    help: str
    source: str | Callable[..., Any]

    def load(self) -> Any:
        """Return the object that ``source`` names."""
        return imported(self.source)


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

    def check_pattern(self, pattern: Pattern) -> None:
        """Refuse a pattern that the method cannot do.

        Raises:
            RecipeError: names those that it can.
        """
        if self.patterns is not None and (other := pattern_row(pattern)).name not in self.patterns:
            raise RecipeError(
                f"method {self.name} cannot do pattern {pattern} ({other.title}); choose {_either(self.patterns)}, or another "
                "method"
            )

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
    """

    examples: tuple[str, ...]


METHODS: tuple[MethodRow, ...] = (
    MethodRow(
        name="thanos",
        title="Thanos",
        help="removes many weights of a row in one step; the others compensate exactly",
        source="thanos.solvers.methods.thanos:thanos",
        needs=Needs.FACTOR,
        compensates=True,
        settings=("block_size", "damping"),
        group_block_size=512,
        colour="#d1490c",
        dark_colour="#ff8a4c",
        marker="o",
        cost="thanos.solvers.methods.thanos:cost",
        memory="thanos.solvers.methods.thanos:memory",
        reference_class="Thanos",
    ),
    MethodRow(
        name="sparsegpt",
        title="SparseGPT",
        help="goes through the columns; those to the right compensate",
        source="thanos.solvers.methods.sparsegpt:sparsegpt",
        needs=Needs.FACTOR,
        compensates=True,
        settings=("block_size", "damping"),
        colour="#0072b2",
        dark_colour="#62b8f0",
        marker="s",
        cost="thanos.solvers.methods.sparsegpt:cost",
        memory="thanos.solvers.methods.sparsegpt:memory",
        reference_class="SparseGPT",
    ),
    MethodRow(
        name="wanda",
        title="Wanda",
        help="ranks the weights of a row by |W|·‖X‖; nothing compensates",
        source="thanos.solvers.methods.scored:wanda",
        needs=Needs.NORMS,
        colour="#008a63",
        dark_colour="#3fcf9f",
        marker="^",
    ),
    MethodRow(
        name="magnitude",
        title="Magnitude",
        help="ranks all weights of a layer by |W|; needs no inputs",
        source="thanos.solvers.methods.scored:magnitude",
        needs=Needs.NOTHING,
        colour="#a4518a",
        dark_colour="#e59fcd",
        marker="D",
        memory="thanos.solvers.methods.scored:magnitude_bytes",
    ),
)
"""The methods of this package; the first is the default."""

PATTERNS: tuple[PatternRow, ...] = (
    PatternRow(
        name="unstructured",
        title="unstructured",
        help="any weights",
        source="thanos.patterns.unstructured:Unstructured",
        examples=("unstructured",),
    ),
    PatternRow(
        name="N:M",
        title="n:m",
        help="at most N of M weights stay",
        source="thanos.patterns.nm:NM",
        examples=("2:4", "4:8"),
    ),
    PatternRow(
        name="columns",
        title="whole columns",
        help="whole input columns go",
        source="thanos.patterns.columns:Columns",
        examples=("columns",),
    ),
)
"""The patterns of this package; the first is the default."""

DEFAULT_METHOD = METHODS[0].name
DEFAULT_PATTERN = PATTERNS[0].name

R = TypeVar("R", bound=Row)


class Table(Generic[R]):
    """Rows of one kind by name, in order: this package's, then those that other files registered."""

    def __init__(self, kind: str, rows: tuple[R, ...]) -> None:
        self._kind, self._rows = kind, {row.name: row for row in rows}

    def register(self, row: R) -> R:
        """Add a row.

        Raises:
            RecipeError: its name is taken by another.
        """
        if self._rows.get(row.name, row) != row:
            raise RecipeError(f"{self._kind} {row.name} is registered already; choose another name")
        self._rows[row.name] = row
        return row

    def rows(self) -> tuple[R, ...]:
        """Return all rows, those of the plug-ins included."""
        load_plugins()
        return tuple(self._rows.values())

    def get(self, name: Any) -> R:
        """Return the row of a name.

        Raises:
            RecipeError: no row has it.
        """
        row = self.find(name)
        if row is None:
            allowed = ", ".join(row.name for row in self.rows())
            raise RecipeError(f"{self._kind} {name!r} is unknown; choose one of {allowed}")
        return row

    def find(self, name: Any) -> R | None:
        """Return the row of a name; None if no row has it."""
        load_plugins()
        return self._rows.get(name) if isinstance(name, str) else None


_methods = Table("method", METHODS)
_patterns = Table("pattern", PATTERNS)

register_method = _methods.register
register_pattern = _patterns.register
methods = _methods.rows
patterns = _patterns.rows
method = _methods.get
find_method = _methods.find


def method_names() -> tuple[str, ...]:
    """Return the names of all methods."""
    return tuple(row.name for row in methods())


def compensating_methods() -> tuple[str, ...]:
    """Return the names of the methods that change the weights that stay."""
    return tuple(row.name for row in methods() if row.compensates)


def reference_classes() -> dict[str, str]:
    """Return the methods that have a reference repository, and the solver's class in it."""
    return {row.name: row.reference_class for row in methods() if row.reference_class}


def method_title(name: str) -> str:
    """Return a method's name for people; one of another version stays as it is."""
    row = find_method(name)
    return name if row is None else row.title


def method_without_inputs(pattern: Pattern) -> MethodRow:
    """Return the method for layers whose inputs are unknown: the first that needs none and can do the pattern."""
    able = (row for row in methods() if not row.needs_inputs)
    name = pattern_row(pattern).name
    return next(row for row in able if row.patterns is None or name in row.patterns)


def parse_pattern(text: str | Pattern) -> Pattern:
    """Read a pattern, such as ``unstructured``, ``2:4`` or ``columns``.

    Raises:
        RecipeError: no row reads the text, or it names an impossible pattern.
    """
    if isinstance(text, Pattern):
        return text
    for row in patterns() if isinstance(text, str) else ():
        pattern = row.load().parse(text)
        if pattern is not None:
            return pattern
    raise RecipeError(f"pattern {text!r} is unknown; choose {pattern_help()}")


def pattern_row(pattern: Pattern) -> PatternRow:
    """Return the row of a pattern's class."""
    return next(row for row in patterns() if row.load() is type(pattern))


def pattern_help() -> str:
    """Return how each pattern is written, with an example where it is written in several ways."""
    return _either([_form(row) for row in patterns()])


def required_patterns() -> str:
    """Return how the patterns are written that ``inspect --require`` can check."""
    return _either([row.name for row in patterns() if row.load().can_be_required])


def example_patterns(*, required: bool = False) -> tuple[str, ...]:
    """Return the patterns that are shown, in order; with ``required`` only those that a matrix can break."""
    rows = [row for row in patterns() if row.load().can_be_required or not required]
    return tuple(example for row in rows for example in row.examples)


def _form(row: PatternRow) -> str:
    known = row.name in row.examples
    return row.name if known else f"{row.name} such as {row.examples[0]} ({row.help})"


def _either(words: tuple[str, ...] | list[str]) -> str:
    *others, last = words
    return f"{', '.join(others)}{',' * (len(others) > 1)} or {last}" if others else last


@cache
def imported(source: str | Callable[..., Any]) -> Any:
    """Return the object that ``module:name`` names; an object as it is."""
    if not isinstance(source, str):
        return source
    module, _, name = source.partition(":")
    return getattr(import_module(module), name)


_loaded: set[str] = set()


def load_plugins() -> None:
    """Import the modules that ``THANOS_PLUGINS`` names, each once.

    Raises:
        RecipeError: one cannot be imported.
    """
    for name in os.environ.get(PLUGINS_VARIABLE, "").split(","):
        if not (name := name.strip()) or name in _loaded:
            continue
        _loaded.add(name)  # first, since the module itself reads the table
        try:
            import_module(name)
        except Exception as error:
            _loaded.discard(name)
            raise RecipeError(
                f"{PLUGINS_VARIABLE} names {name}, which cannot be imported ({type(error).__name__}: {error}); put its folder "
                "on PYTHONPATH, or correct the variable"
            ) from error
