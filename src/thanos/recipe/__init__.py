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

from thanos import registry
from thanos.errors import RecipeError
from thanos.recipe.layer import DEFAULT_DAMPING as DEFAULT_DAMPING
from thanos.recipe.layer import LAYER_FIELDS, LayerRecipe, check_used, check_values
from thanos.registry import parse_pattern
from thanos.system.suggestions import near, near_dtype, near_whole
from thanos.system.user_paths import expanded

_OTHER_NAMES = {
    "sequence_length": ("seqlen", "seq_len", "max_length"),
    "samples": ("nsamples", "n_samples", "num_samples"),
    "sparsity": ("sparsity_ratio", "ratio"),
    "damping": ("percdamp", "dampening"),
    "targets": ("target",),
    "override": ("overrides",),
}
"""Names that other tools give to the same settings."""


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
        unknown = sorted(set(self.settings) - set(LAYER_FIELDS))
        if unknown:
            raise RecipeError(
                f"the override of {self.match!r} has unknown settings {', '.join(unknown)}; "
                f"allowed are skip, {', '.join(LAYER_FIELDS)}{_hints(unknown, LAYER_FIELDS)}"
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
        measure_error: on which tokens the layers' errors are measured: None, on those that the method needs XᵀX of, or a sample
            of the sequences where it needs less; True, on all; False, only where the method needs XᵀX. Changes no weight.
        trust_remote_code: let transformers run Python code that a checkpoint carries.

    Raises:
        RecipeError: a value is outside its range or contradicts another.
    """

    calibration: str = "c4"
    samples: int = 128
    sequence_length: int = 2048
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    targets: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    measure_error: bool | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "overrides", tuple(self.overrides))
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
        if self.measure_error is not None and not isinstance(self.measure_error, bool):
            raise RecipeError(f"measure_error must be true, false or left out; got {self.measure_error!r}")
        object.__setattr__(self, "overrides", tuple(self.overrides))
        for override in self.overrides:
            own = override.settings.get("method")
            check_values(override.settings)
            where = f" in the override of {override.match!r}"
            check_used(override.settings, self._methods() if own is None else (own,), where)
            self._merged([override])

    def _methods(self) -> tuple[str, ...]:
        return (self.method, *(o.settings["method"] for o in self.overrides if "method" in o.settings))

    def _merged(self, overrides: Iterable[Override]) -> LayerRecipe:
        values: dict[str, Any] = {name: getattr(self, name) for name in LAYER_FIELDS}
        for override in overrides:
            values |= _suited(values["pattern"], override.settings)
        return LayerRecipe(**registry.method(values["method"]).used(values))

    def suited(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return changes of fields such that another pattern or method brings its own defaults.

        The recipe's sparsity and block size were given for its own pattern: without new ones, the new pattern's defaults hold.
        Settings that no method of the changed recipe uses have their defaults too.

        Raises:
            RecipeError: the pattern is malformed, or the method unknown.
        """
        methods = (changes.get("method", self.method), *self._methods()[1:])
        used = {setting for name in methods for setting in registry.method(name).settings}
        unused = {name: default for name, default in registry.LAYER_SETTINGS.items() if name not in used}
        return {**(unused if "method" in changes else {}), **_suited(self.pattern, changes)}

    def for_layer(self, name: str) -> LayerRecipe | None:
        """Return what to do to the layer called ``name`` (full module name); None where an override skips it."""
        matching = [override for override in self.overrides if matches(name, override.match)]
        return None if matching and matching[-1].skip else self._merged(matching)

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
    def from_dict(cls, values: Mapping[str, Any], *, stored: bool = False) -> Recipe:
        """Build a recipe from plain values, as :meth:`to_dict` gives them; unknown names are refused.

        Args:
            values: by name.
            stored: they come from a report or a store: settings that no method uses are dropped rather than refused, since
                earlier versions accepted them.
        """
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
        if stored:
            values, built = _without_unused(values, built)
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
    underscored: dict[str, Any] = {}
    for name, value in values.items():
        name = name.replace("-", "_")
        if name in underscored:
            raise RecipeError(f"{name} is given twice, once with a hyphen and once with an underscore; leave one out")
        underscored[name] = value
    return underscored


def _without_unused(values: dict[str, Any], overrides: list[Override]) -> tuple[dict[str, Any], list[Override]]:
    base = values.get("method", registry.DEFAULT_METHOD)
    rows = [registry.method(name) for name in (base, *(o.settings.get("method", base) for o in overrides))]
    used = {setting for row in rows for setting in row.settings}

    def kept(settings: Mapping[str, Any], allowed: Iterable[str]) -> dict[str, Any]:
        return {
            name: value for name, value in settings.items() if name in allowed or name not in registry.LAYER_SETTINGS
        }

    def of(override: Override) -> Iterable[str]:
        return registry.method(override.settings["method"]).settings if "method" in override.settings else used

    return kept(values, used), [dataclasses.replace(o, settings=kept(o.settings, of(o))) for o in overrides]


def _suited(pattern: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return changes with the sparsity and block size that go with ``pattern`` dropped, where they bring another pattern."""
    if str(parse_pattern(changes.get("pattern", pattern))) == str(parse_pattern(pattern)):
        return dict(changes)
    return {"sparsity": None, "block_size": None, **changes}
