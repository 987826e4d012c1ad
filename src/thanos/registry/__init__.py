"""The registry: the methods, refinements, patterns and efforts that a recipe can name, and where their code is.

A method or a pattern is one file and one row here. A refinement also needs a field of
:class:`~thanos.recipe.repair.Repair`, its amount. An effort, a preset of a recipe's repair, is one row. Rows are plain values,
so reading them does not import torch. The code of a row is imported when it is used. A file outside this package adds rows
with :func:`register_method` and :func:`register_pattern`. The command line, and every process that it starts, imports the
modules that the environment variable ``THANOS_PLUGINS`` names, separated by commas. docs/add-a-method.md shows both ways.
"""

from __future__ import annotations

from thanos.errors import RecipeError
from thanos.patterns.base import Pattern
from thanos.registry.pattern_rows import PATTERNS as PATTERNS
from thanos.registry.rows import LAYER_SETTINGS as LAYER_SETTINGS
from thanos.registry.rows import SCOPES as SCOPES
from thanos.registry.rows import EffortRow as EffortRow
from thanos.registry.rows import MethodRow as MethodRow
from thanos.registry.rows import Needs as Needs
from thanos.registry.rows import PatternRow as PatternRow
from thanos.registry.rows import RefinementRow as RefinementRow
from thanos.registry.table import Table
from thanos.registry.table import imported as imported
from thanos.system.suggestions import near_pattern

METHODS: tuple[MethodRow, ...] = (
    MethodRow(
        name="thanos",
        title="Thanos",
        help="removes many weights of a row in one step; the remaining ones compensate exactly",
        source="thanos.solvers.methods.thanos:thanos",
        needs=Needs.FACTOR,
        in_paper=True,
        compensates=True,
        settings=("block_size", "damping"),
        group_block_size=512,
        colour="#d1490c",
        dark_colour="#ff8a4c",
        marker="o",
        cost="thanos.solvers.methods.thanos:cost",
        reference_class="Thanos",
    ),
    MethodRow(
        name="sparsegpt",
        title="SparseGPT",
        help="removes weights column by column; the columns to the right compensate",
        source="thanos.solvers.methods.sparsegpt:sparsegpt",
        needs=Needs.FACTOR,
        in_paper=True,
        compensates=True,
        settings=("block_size", "damping"),
        colour="#0072b2",
        dark_colour="#62b8f0",
        marker="s",
        cost="thanos.solvers.methods.sparsegpt:cost",
        reference_class="SparseGPT",
    ),
    MethodRow(
        name="wanda",
        title="Wanda",
        help="ranks the weights of a row by |W|·‖X‖; no compensation",
        source="thanos.solvers.methods.scored:wanda",
        needs=Needs.NORMS,
        scope="row",
        in_paper=True,
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
        in_paper=True,
        colour="#a4518a",
        dark_colour="#e59fcd",
        marker="D",
    ),
    MethodRow(
        name="admm",
        title="ADMM",
        help="chooses mask and weights together, in many steps, then refits the weights; slow, least error",
        source="thanos.solvers.methods.admm:admm",
        needs=Needs.FACTOR,
        compensates=True,
        settings=("damping",),
        colour="#8a6d00",
        dark_colour="#e3c04f",
        marker="v",
        cost="thanos.solvers.methods.admm:cost",
    ),
)
"""The methods of this package; the first is the default."""

REFINEMENTS: tuple[RefinementRow, ...] = (
    RefinementRow(
        name="refit",
        title="Refit",
        help="the best weights for the chosen mask, by conjugate gradients",
        source="thanos.solvers.refine.refit:refit",
    ),
)
"""The refinements of this package, in the order in which they are applied after the method."""

EFFORTS: tuple[EffortRow, ...] = (
    EffortRow(name="fast", title="fast", help="the method alone"),
    EffortRow(
        name="high",
        title="high",
        help="dense targets, layers in the order of the forward pass, refit, one budget for each row",
        scope="row",
        dense_target="auto",
        sequential=True,
        refit=20,
    ),
    EffortRow(
        name="max",
        title="max",
        help="high, and each block tuned",
        scope="row",
        dense_target="auto",
        sequential=True,
        refit=20,
        tune=10,
    ),
)
"""The presets of repair; the first is the default, with every part off."""

DEFAULT_METHOD = METHODS[0].name
DEFAULT_PATTERN = PATTERNS[0].name
DEFAULT_EFFORT = EFFORTS[0].name

_methods = Table("method", METHODS)
_refinements = Table("refinement", REFINEMENTS)
_patterns = Table("pattern", PATTERNS)
_efforts = Table("effort", EFFORTS)

register_method = _methods.register
register_pattern = _patterns.register
methods = _methods.rows
refinements = _refinements.rows
patterns = _patterns.rows
method = _methods.get
find_method = _methods.find
efforts = _efforts.rows
effort = _efforts.get


def method_names() -> tuple[str, ...]:
    """Return the names of all methods."""
    return tuple(row.name for row in methods())


def effort_names() -> tuple[str, ...]:
    """Return the names of all efforts."""
    return tuple(row.name for row in efforts())


def blockwise_methods() -> tuple[str, ...]:
    """Return the names of the methods that update the remaining weights, block of columns by block of columns."""
    return tuple(row.name for row in methods() if row.compensates and "block_size" in row.settings)


def reference_classes() -> dict[str, str]:
    """Return name → the solver's class in the reference repository, of the methods that have one."""
    return {row.name: row.reference_class for row in methods() if row.reference_class}


def method_title(name: str) -> str:
    """Return a method's title. A name that this version does not have is returned unchanged."""
    row = find_method(name)
    return name if row is None else row.title


def method_without_inputs(pattern: Pattern) -> MethodRow:
    """Return the method for layers whose inputs are unknown: the first that needs no inputs and supports the pattern."""
    able = (row for row in methods() if not row.needs_inputs)
    name = pattern_row(pattern).name
    return next(row for row in able if row.patterns is None or name in row.patterns)


def stand_in_method(pattern: Pattern) -> MethodRow:
    """Return the cheapest method that uses the inputs: the first that needs only their norms and supports the pattern.

    If there is none, return the first that supports the pattern.
    """
    name = pattern_row(pattern).name
    able = [row for row in methods() if row.patterns is None or name in row.patterns]
    return next((row for row in able if row.needs is Needs.NORMS), able[0])


def parse_pattern(text: str | Pattern) -> Pattern:
    """Return the pattern that a text names, such as ``unstructured``, ``2:4`` or ``columns``.

    Raises:
        RecipeError: the text names no registered pattern, or an impossible one.
    """
    if isinstance(text, Pattern):
        return text
    for row in patterns() if isinstance(text, str) else ():
        pattern = row.load().parse(text)
        if pattern is not None:
            return pattern
    others = {row.examples[0]: row.other_names for row in patterns()}
    hint = near_pattern(text, DEFAULT_PATTERN, others)
    raise RecipeError(f"pattern {text!r} is unknown; choose {pattern_help()}{hint}")


def pattern_row(pattern: Pattern) -> PatternRow:
    """Return the row of a pattern's class. Raises RecipeError if the class is not registered."""
    for row in patterns():
        if row.load() is type(pattern):
            return row
    raise RecipeError(f"pattern {pattern} is not registered; call register_pattern with its class first")


def check_pattern(row: MethodRow, pattern: Pattern) -> None:
    """Raise RecipeError, which lists the patterns that a method supports, if it does not support ``pattern``."""
    other = pattern_row(pattern)
    if row.patterns is not None and other.name not in row.patterns:
        raise RecipeError(
            f"method {row.name} cannot do pattern {pattern} ({other.title}); choose {_either(row.patterns)}, or another method"
        )


def pattern_help() -> str:
    """Return the spellings of all patterns in words, with an example for a family of patterns such as ``N:M``."""
    return _either([_form(row) for row in patterns()])


def required_patterns() -> str:
    """Return the spellings of the patterns that ``inspect --require`` can check, in words."""
    return _either([row.name for row in patterns() if row.load().can_be_required])


def example_patterns(*, required: bool = False) -> tuple[str, ...]:
    """Return the example patterns of all rows, in order; with ``required`` only those that a matrix can violate."""
    rows = [row for row in patterns() if row.load().can_be_required or not required]
    return tuple(example for row in rows for example in row.examples)


def _either(words: tuple[str, ...] | list[str]) -> str:
    *others, last = words
    return f"{', '.join(others)}{',' * (len(others) > 1)} or {last}" if others else last


def _form(row: PatternRow) -> str:
    known = row.name in row.examples
    return row.name if known else f"{row.name} such as {row.examples[0]} ({row.help})"
