"""The recipe: everything that shapes a pruning run, validated once.

One frozen dataclass serves Python, the TOML file and the command line.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thanos.errors import RecipeError
from thanos.patterns.nm import NM
from thanos.patterns.parse import Pattern, parse_pattern
from thanos.settings import TEXT_SOURCES, Heading, setting
from thanos.system.suggestions import near, near_dtype, near_number, near_whole
from thanos.system.user_paths import expanded

METHODS = ("thanos", "sparsegpt", "wanda", "magnitude")

DEFAULT_SPARSITY = 0.5
"""The share of weights removed by the unstructured and columns patterns; the setting that the field compares at."""

DEFAULT_DAMPING = 0.01
"""Added to the Hessian's diagonal as a share of its mean; SparseGPT's value, kept by Thanos (paper, section 5)."""

DEFAULT_BLOCK_SIZE = 128
DEFAULT_BLOCK_SIZE_NM = 512
"""Columns per block: the paper's choices for unstructured and for n:m sparsity."""

_OTHER_NAMES = {
    "sequence_length": ("seqlen", "seq_len", "max_length"),
    "samples": ("nsamples", "n_samples", "num_samples"),
    "sparsity": ("sparsity_ratio", "ratio"),
    "damping": ("percdamp", "dampening"),
    "targets": ("target",),
    "override": ("overrides",),
}
"""Names that other tools give to the same settings."""

_LAYER_FIELDS = ("method", "pattern", "sparsity", "outlier_rows", "keep_budget", "block_size", "damping")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRecipe:
    """What is done to one weight matrix. Build it to have it checked.

    Each field's metadata has its :class:`~thanos.settings.Setting`, from which the command line makes an option.

    Args:
        method: one of :data:`METHODS`.
        pattern: ``unstructured``, ``columns`` or ``N:M`` (at most N non-zeros in M consecutive inputs).
        sparsity: share of the matrix's entries that become zero, in [0, 1). Follows from the pattern for n:m;
            None means the default (0.5 for the other two).
        outlier_rows: share of output rows left dense, in [0, 1).
        keep_budget: let the other rows make up for the outlier rows, so that the matrix as a whole has the sparsity it would
            have without them; see :class:`~thanos.solvers.budget.Budget`. For n:m it needs an even n: the rows with the least
            output energy keep n/2 of m.
        block_size: input columns handled together (Thanos, SparseGPT); None means 128, or 512 for Thanos with n:m.
        damping: share of the Hessian's mean diagonal added to its diagonal, at least 0.

    Raises:
        RecipeError: a value is outside its range or contradicts another.
    """

    method: str = setting("thanos", "Pruning method", Heading.METHOD, "NAME", choices=lambda: METHODS)
    pattern: str = setting(
        "unstructured",
        "Which weights may go",
        Heading.METHOD,
        "PATTERN",
        choices=lambda: ("unstructured (any)", "columns (whole input columns)", "N:M (at most N of M weights stay)"),
    )
    sparsity: float | None = setting(
        None,
        "Fraction of the weights to remove",
        Heading.METHOD,
        "FRACTION",
        lowest=0,
        below=1,
        default=f"{DEFAULT_SPARSITY}; N:M implies its own",
    )
    outlier_rows: float = setting(
        0.0, "Fraction of the output rows to leave dense", Heading.METHOD, "FRACTION", lowest=0, below=1
    )
    keep_budget: bool = setting(
        False, "Remove more from the other rows, so that outlier rows do not lower the sparsity", Heading.METHOD
    )
    block_size: int | None = setting(
        None,
        "Input columns that thanos and sparsegpt handle together",
        Heading.METHOD,
        "COLUMNS",
        lowest=1,
        default=f"{DEFAULT_BLOCK_SIZE}; {DEFAULT_BLOCK_SIZE_NM} for thanos with N:M",
    )
    damping: float = setting(
        DEFAULT_DAMPING,
        "Added to the diagonal of the Hessian, as a fraction of its mean",
        Heading.METHOD,
        "FRACTION",
        lowest=0,
    )

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            hint = near(self.method, METHODS)
            raise RecipeError(f"method {self.method!r} is unknown; choose one of {', '.join(METHODS)}{hint}")
        pattern = parse_pattern(self.pattern)
        object.__setattr__(self, "pattern", str(pattern))
        _check_number("outlier_rows", self.outlier_rows, 0.0, 1.0)
        _check_number("damping", self.damping, 0.0, None)
        if not isinstance(self.keep_budget, bool):
            raise RecipeError(f"keep_budget must be true or false; got {self.keep_budget!r}")
        if self.keep_budget and isinstance(pattern, NM) and self.outlier_rows > 0:
            self._check_halves(pattern)
        if self.sparsity is not None:
            _check_number("sparsity", self.sparsity, 0.0, 1.0)
        implied = pattern.sparsity
        if implied is None:
            self._check_room(DEFAULT_SPARSITY if self.sparsity is None else self.sparsity)
        elif self.sparsity is not None and abs(self.sparsity - implied) > 1e-9:
            raise RecipeError(
                f"sparsity {self.sparsity} contradicts pattern {pattern}, which removes {implied:.4g} of the weights; "
                "leave sparsity out or choose another pattern"
            )
        if self.block_size is not None:
            if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
                raise RecipeError(
                    f"block_size must be a whole number of columns, at least 1; got {self.block_size!r}"
                    f"{near_whole(self.block_size)}"
                )
            pattern.check_block_size(self.block_size)

    def _check_room(self, sparsity: float) -> None:
        if self.outlier_rows > 0 and sparsity >= 1 - self.outlier_rows:
            raise RecipeError(
                f"sparsity {sparsity} is impossible with outlier_rows {self.outlier_rows}: the rows that may be pruned "
                f"hold only {1 - self.outlier_rows:.4g} of the weights; lower one of the two"
            )

    def _check_halves(self, pattern: NM) -> None:
        if pattern.n % 2:
            raise RecipeError(
                f"keep_budget with outlier_rows gives some rows half of the non-zeros, but {pattern} keeps an odd number of "
                f"{pattern.n}; choose a pattern with an even one, such as 2:4, or leave keep_budget out"
            )
        # Every outlier row needs 2(m − n)/n halved rows beside it.
        most = pattern.n / (2 * pattern.m - pattern.n)
        if self.outlier_rows > most:
            raise RecipeError(
                f"outlier_rows {self.outlier_rows} is too much for keep_budget with pattern {pattern}: the other rows can make "
                f"up for at most {most:.4g}; lower outlier_rows or leave keep_budget out"
            )

    @property
    def parsed_pattern(self) -> Pattern:
        """The pattern as an object."""
        return parse_pattern(self.pattern)

    @property
    def resolved_sparsity(self) -> float:
        """The share of removed weights asked for: the pattern's own for n:m (before outlier rows), else the setting."""
        implied = self.parsed_pattern.sparsity
        if implied is not None:
            return implied
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    @property
    def resolved_block_size(self) -> int:
        """The block size that is used: the setting, or the paper's default for the method and pattern."""
        if self.block_size is not None:
            return self.block_size
        pattern = self.parsed_pattern
        wide = self.method == "thanos" and isinstance(pattern, NM)
        m = pattern.group
        return max(m, (DEFAULT_BLOCK_SIZE_NM if wide else DEFAULT_BLOCK_SIZE) // m * m)


@dataclass(frozen=True, kw_only=True, slots=True)
class Override:
    """Other settings for the layers whose name matches a glob, or ``skip`` to leave them dense.

    Args:
        match: a glob over full module names such as ``model.layers.*.mlp.down_proj`` or ``*.down_proj``.
        skip: leave these layers dense.
        settings: the fields of :class:`LayerRecipe` that differ from the recipe's.
    """

    match: str
    skip: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            raise RecipeError(f"an override needs match, a glob over layer names; got {self.match!r}")
        if not isinstance(self.skip, bool):
            raise RecipeError(f"skip in the override of {self.match!r} must be true or false; got {self.skip!r}")
        unknown = sorted(set(self.settings) - set(_LAYER_FIELDS))
        if unknown:
            raise RecipeError(
                f"the override of {self.match!r} has unknown settings {', '.join(unknown)}; "
                f"allowed are skip, {', '.join(_LAYER_FIELDS)}{_hints(unknown, _LAYER_FIELDS)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe(LayerRecipe):
    """Everything that shapes a run: :class:`LayerRecipe` plus calibration, device and which layers.

    Args:
        calibration: a source of text: ``c4``, ``wikitext2``, ``pydoc``, ``self`` or a local file.
        samples: number of calibration sequences.
        sequence_length: tokens per calibration sequence.
        seed: of the calibration draw.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: in which the model runs during calibration: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or
            ``float16``. The checkpoint that is written keeps its own dtype.
        targets: globs over module names; empty means every linear layer of the decoder blocks.
        skip: globs over module names that stay dense.
        overrides: per-layer settings, in order; a later match wins.
        trust_remote_code: let transformers run Python code that a checkpoint carries.

    Raises:
        RecipeError: a value is outside its range or contradicts another.
    """

    calibration: str = setting(
        "c4", f"Calibration text: {TEXT_SOURCES}; or self, generated by the model", Heading.CALIBRATION, "SOURCE"
    )
    samples: int = setting(128, "Number of calibration sequences", Heading.CALIBRATION, "N", lowest=1)
    sequence_length: int = setting(2048, "Tokens per calibration sequence", Heading.CALIBRATION, "TOKENS", lowest=2)
    seed: int = setting(0, "Seed of the draw of calibration sequences", Heading.CALIBRATION, "N", lowest=0)
    device: str = setting(
        "auto", "auto, cpu, cuda or cuda:N", Heading.RUN, "DEVICE", default="auto, which is CUDA if there is any"
    )
    dtype: str = setting(
        "auto",
        "Data type in which the model runs",
        Heading.RUN,
        "DTYPE",
        choices=lambda: DTYPES,
        default="auto, the checkpoint's",
    )
    targets: tuple[str, ...] = setting(
        (), "Prune only layers whose name matches", Heading.WHAT, "GLOB", default="every linear layer of the blocks"
    )
    skip: tuple[str, ...] = setting((), "Leave layers dense whose name matches", Heading.WHAT, "GLOB")
    overrides: tuple[Override, ...] = ()
    trust_remote_code: bool = setting(
        False,
        "Run Python code that comes with the checkpoint",
        Heading.RUN,
        default="transformers' own code, or refuse",
    )

    def __post_init__(self) -> None:
        LayerRecipe.__post_init__(self)
        for name, lowest in (("samples", 1), ("sequence_length", 2), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise RecipeError(f"{name} must be a whole number, at least {lowest}; got {value!r}{near_whole(value)}")
        if self.dtype not in DTYPES:
            hint = near_dtype(self.dtype, DTYPES)
            raise RecipeError(f"dtype {self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}{hint}")
        for name in ("calibration", "device"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise RecipeError(f"{name} must be a name; got {getattr(self, name)!r}")
        for name in ("targets", "skip"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(isinstance(glob, str) and glob for glob in value):
                raise RecipeError(f"{name} must be a list of globs over layer names; got {value!r}")
            object.__setattr__(self, name, tuple(value))
        if not isinstance(self.trust_remote_code, bool):
            raise RecipeError(f"trust_remote_code must be true or false; got {self.trust_remote_code!r}")
        object.__setattr__(self, "overrides", tuple(self.overrides))
        for override in self.overrides:
            self._merged([override])

    def _merged(self, overrides: Iterable[Override]) -> LayerRecipe:
        values: dict[str, Any] = {name: getattr(self, name) for name in _LAYER_FIELDS}
        for override in overrides:
            values |= _suited(values["pattern"], override.settings)
        return LayerRecipe(**values)

    def suited(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return changes of fields such that another pattern brings its own sparsity and block size.

        Those of the recipe were given for its own pattern: without new ones beside it, the new pattern's defaults hold.

        Raises:
            RecipeError: the pattern is malformed.
        """
        return _suited(self.pattern, changes)

    def for_layer(self, name: str) -> LayerRecipe | None:
        """Return what to do to the layer called ``name`` (full module name); None where an override skips it."""
        found = [override for override in self.overrides if matches(name, override.match)]
        return None if found and found[-1].skip else self._merged(found)

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with the given fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values (None, numbers, strings, lists, dicts) under the names of the TOML file."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "overrides"}
        values["targets"], values["skip"] = list(self.targets), list(self.skip)
        values["override"] = [
            {"match": o.match, **({"skip": True} if o.skip else {}), **o.settings} for o in self.overrides
        ]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain values, as :meth:`to_dict` gives them; unknown names are refused."""
        values = _underscored(values)
        known = {f.name for f in dataclasses.fields(cls)} - {"overrides"} | {"override"}
        unknown = sorted(set(values) - known)
        if unknown:
            raise RecipeError(
                f"unknown settings: {', '.join(unknown)}; allowed are {', '.join(sorted(known))}{_hints(unknown, known)}"
            )
        overrides = values.pop("override", [])
        if not isinstance(overrides, list | tuple) or not all(isinstance(o, Mapping) for o in overrides):
            raise RecipeError("override must be a list of tables ([[override]])")
        built = []
        for table in overrides:
            settings = _underscored(table)
            match, skip = settings.pop("match", ""), settings.pop("skip", False)
            built.append(Override(match=match, skip=skip, settings=settings))
        for name in ("targets", "skip"):
            if not isinstance(values.get(name, []), list | tuple):
                raise RecipeError(f"{name} must be a list of globs, for example [{json.dumps(str(values[name]))}]")
        return cls(**values, overrides=tuple(built))

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """Read a recipe from a TOML file with the same names as the options."""
        path = expanded(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            inside = f", such as {path / 'recipe.toml'}" if (path / "recipe.toml").is_file() else ""
            raise RecipeError(f"recipe {path} cannot be read: {error.strerror}; give a TOML file{inside}") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"recipe {path} is not valid TOML: it is no text in UTF-8; give another file") from error
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(
                f'recipe {path} is not valid TOML: {error}; a setting is a line such as sparsity = 0.5 or method = "wanda"'
            ) from error
        try:
            return cls.from_dict(values)
        except RecipeError as error:
            raise RecipeError(f"recipe {path}: {error}") from error

    def to_toml(self) -> str:
        """Return the recipe as TOML text that :meth:`from_toml` reads back to an equal recipe."""
        values = self.to_dict()
        overrides = values.pop("override")
        lines = [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
        for table in overrides:
            lines += ["", "[[override]]"]
            lines += [f"{name} = {_toml(value)}" for name, value in table.items() if value is not None]
        return "\n".join(lines) + "\n"


DTYPES = ("auto", "float32", "bfloat16", "float16")


def matches(name: str, glob: str) -> bool:
    """Tell whether a full module name, or its end from a dot on, matches a glob: ``q_proj`` is every q_proj."""
    return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name, f"*.{glob}")


def check_globs(recipe: Recipe) -> None:
    """Refuse globs that can match no layer, since no layer's name holds such characters, before a model is opened to see that.

    Raises:
        RecipeError: one has blanks, commas or the signs of a regular expression or a path.
    """
    overrides = [("match", override.match) for override in recipe.overrides]
    for name, glob in [*(("targets", g) for g in recipe.targets), *(("skip", g) for g in recipe.skip), *overrides]:
        allowed = "a glob over layer names has letters, digits, _, -, dots, and *, ?, [abc] or [!abc]"
        if "," in glob or glob != "".join(glob.split()):
            raise RecipeError(f"{name} {glob!r} looks like several globs; give each alone: {allowed}")
        strange = [letter for letter in dict.fromkeys(glob) if letter in "^$|()\\{}+/:;'\"="]
        if strange:
            raise RecipeError(f"{name} {glob!r} has {' '.join(strange)}; {allowed}, such as *.mlp.* or q_proj")
        if glob.count("[") != glob.count("]"):
            raise RecipeError(f"{name} {glob!r} has a bracket without its partner; {allowed}")


def _toml(value: Any) -> str:
    # TOML's basic strings, booleans, numbers and arrays of strings are written exactly as JSON writes them,
    # save for DEL, which JSON leaves bare and TOML forbids.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _hints(unknown: Iterable[str], known: Iterable[str]) -> str:
    known = [*known]
    return "".join(near(name, known, _OTHER_NAMES) for name in unknown)


def _underscored(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        name = name.replace("-", "_")
        if name in found:
            raise RecipeError(f"{name} is given twice, once with a hyphen and once with an underscore; leave one out")
        found[name] = value
    return found


def _suited(pattern: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return changes with the sparsity and block size that go with ``pattern`` dropped, where they bring another pattern."""
    if str(parse_pattern(changes.get("pattern", pattern))) == str(parse_pattern(pattern)):
        return dict(changes)
    return {"sparsity": None, "block_size": None, **changes}


def _check_number(name: str, value: Any, lowest: float, below: float | None) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and value >= lowest
    if not ok or (below is not None and not value < below) or value == float("inf"):
        allowed = f"at least {lowest:g}" if below is None else f"at least {lowest:g} and below {below:g}"
        hint = near_number(value, share=below is not None)
        raise RecipeError(f"{name} must be a number, {allowed}; got {value!r}{hint}")
