"""The units that a run removes from every block: their number, and the layers that are pruned for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from thanos.errors import ModelError, RecipeError
from thanos.events import Event, Watcher
from thanos.model.layers import LinearLayer, find_blocks, linear_layers, select_layers
from thanos.model.opening import OpenedModel
from thanos.model.source import find_local
from thanos.patterns.units import BLOCKS, HEADS
from thanos.patterns.units import Units as UnitPattern
from thanos.recipe import LayerRecipe, Recipe
from thanos.recipe.units import HEAD_UNITS, default_multiple
from thanos.registry import parse_pattern
from thanos.run.cut_sizes import block_parameters, sizes_by_block, unit_sizes
from thanos.run.cut_words import kind_words
from thanos.run.split import splits
from thanos.run.unit_counts import remaining_units, runs_of
from thanos.shrink.config import changed_config, smaller_config
from thanos.shrink.families import family_of
from thanos.shrink.units import Units, attention_of, units_of
from thanos.shrink.writer import Cut, SmallerFolder, SmallerWriter, cuts_of, plan_smaller
from thanos.system.documents import json_text


@dataclass(frozen=True, slots=True)
class Cutting:
    """The units that a run removes from a model.

    Attributes:
        recipe: the recipe.
        writers: full name of each layer that loses columns → its units; empty if blocks are removed.
        fitted: full names of the layers that may be fitted to the outputs of removed blocks; empty unless blocks are removed.
        counts: kind → number of units of a writer.
        candidates: the numbers of units that may be removed, by kind; several if they are to be chosen by error.
        sizes: kind → number of parameters and of bytes of one unit of every writer together.
        block_parameters: number of parameters of the model's blocks.
        bytes: bytes of the tensors of the model before the cut.
        dropped: indices of the removed blocks, ascending; empty until they are chosen.
    """

    recipe: Recipe
    writers: Mapping[str, Units]
    fitted: frozenset[str]
    counts: Mapping[str, int]
    candidates: tuple[Mapping[str, int], ...]
    sizes: Mapping[str, tuple[int, int]]
    block_parameters: int
    bytes: int
    dropped: tuple[int, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether the numbers of units are still to be chosen."""
        return len(self.candidates) > 1

    @property
    def drops(self) -> int:
        """Number of blocks to remove."""
        return self.candidates[0].get(BLOCKS, 0)

    @property
    def parameters(self) -> dict[str, int]:
        """Kind → number of parameters of one unit of every writer together."""
        return {kind: size for kind, (size, _) in self.sizes.items()}

    @property
    def target(self) -> float:
        """Number of parameters to remove, if the sparsity is a fraction of the blocks' parameters."""
        return self.recipe.resolved_sparsity * self.block_parameters

    @property
    def removed(self) -> Mapping[str, int]:
        """Kind → number of units to remove from every writer; of several candidates the largest number of each kind."""
        return {kind: max(one[kind] for one in self.candidates) for kind in self.counts}

    @property
    def head_unit(self) -> str:
        """The heads that are removed together; see :class:`~thanos.recipe.Recipe`."""
        return self.recipe.head_unit or HEAD_UNITS[0]

    @property
    def bytes_after(self) -> int:
        """Bytes of the remaining tensors, at most."""
        gone = (sum(self.sizes[kind][1] * number for kind, number in one.items()) for one in self.candidates)
        return self.bytes - min(gone)

    def settings(self, layers: Mapping[LinearLayer, LayerRecipe]) -> dict[LinearLayer, LayerRecipe]:
        """Return the settings of the writers, with the pattern and the sparsity of their units."""
        return {layer: self._settings(layer.name, settings) for layer, settings in layers.items()}

    def _settings(self, name: str, settings: LayerRecipe) -> LayerRecipe:
        if self.recipe.parsed_pattern.keeps_all:
            return replace(settings, sparsity=0.0)
        units = self.writers[name]
        pattern = parse_pattern(units.kind)  # a kind has the name of its pattern
        assert isinstance(pattern, UnitPattern)
        own = pattern.of_writer(len(units), runs_of(units.columns))
        share = self.removed[units.kind] / len(units)
        return replace(settings, pattern=str(own), sparsity=share)

    def kinds(self, layers: Iterable[LinearLayer]) -> dict[LinearLayer, str]:
        """Return the kind of the units of each layer."""
        return {layer: self.writers[layer.name].kind for layer in layers}

    @property
    def multiple(self) -> int:
        """The number of remaining units is a multiple of this; with neurons and heads, the number of neurons."""
        return _multiple(self.recipe)

    @property
    def removed_fraction(self) -> float:
        """The removed fraction of the units; with several kinds, of the blocks' parameters."""
        if len(self.counts) > 1:
            return sum(self.removed[kind] * size for kind, size in self.parameters.items()) / self.block_parameters
        ((kind, count),) = self.counts.items()
        return self.removed[kind] / count

    def counted(self) -> dict[str, Any]:
        """Return plain values of the requested and the removed units, as in the report. The number of units must be chosen."""
        return {
            "asked": self.recipe.resolved_sparsity,
            "came": self.removed_fraction,
            "multiple_of": self.multiple,
            "units": {
                kind: {"before": count, "after": count - self.removed[kind]} for kind, count in self.counts.items()
            },
            **({"head_unit": self.head_unit} if HEADS in self.counts else {}),
        }

    def to_dict(self, made: SmallerFolder) -> dict[str, Any]:
        """Return plain values for the report, ``cut``, with the sizes of the smaller folder."""
        return self.counted() | self.sizes_of(made) | ({"dropped_blocks": list(self.dropped)} if self.drops else {})

    def sizes_of(self, made: SmallerFolder) -> dict[str, Any]:
        """Return plain values of the sizes of a smaller folder."""
        return {
            "parameters_before": made.dense_parameters,
            "parameters_after": made.parameters,
            "share_of_block_parameters": (made.dense_parameters - made.parameters) / self.block_parameters,
            "bytes_before": made.dense_nbytes,
            "bytes_after": made.nbytes,
        }


def plan_cutting(opened: OpenedModel, recipe: Recipe) -> tuple[Cutting, dict[LinearLayer, LayerRecipe], dict[str, str]]:
    """Return the units to remove, the layers that lose columns with their settings, and the others with the reason.

    Raises:
        ModelError: not every block can lose as many such units, or the config cannot state the smaller size.
        RecipeError: the recipe would remove none or all of the units.
    """
    chosen, left = select_layers(linear_layers(opened.meta_model), recipe)
    writers, fitted = dict[str, Units](), frozenset[str]()
    if recipe.parsed_pattern.keeps_all:
        fitted, blocks = _fitted(opened), sizes_by_block(opened)
        counts, sizes = {BLOCKS: len(blocks)}, {BLOCKS: min(blocks, key=lambda pair: pair[1])}
    else:
        writers = _writers(opened, recipe)
        counts = {units.kind: len(units) for units in writers.values()}
        sizes = unit_sizes(opened, writers)
    cutting = Cutting(
        recipe=recipe,
        writers=writers,
        fitted=fitted,
        counts=counts,
        candidates=_candidates(opened, recipe, counts, {kind: size for kind, (size, _) in sizes.items()}),
        sizes=sizes,
        block_parameters=block_parameters(opened),
        bytes=sum(info.nbytes for info in opened.checkpoint.tensors.values()),
    )
    names = fitted or writers.keys()
    if missing := names - {layer.name for layer in chosen}:
        raise ModelError(f"{min(missing)} is not a linear layer that can be pruned, so no units can be removed")
    why = "loses nothing itself" if cutting.drops else f"has no {' and '.join(counts)} as its inputs"
    layers = {layer: settings for layer, settings in chosen.items() if layer.name in names}
    left |= {layer.name: why for layer in chosen if layer not in layers}
    return cutting, cutting.settings(layers), left


def smaller_writer(cutting: Cutting, opened: OpenedModel, folder: Path, besides: int, emit: Watcher) -> SmallerWriter:
    """Return the writer of the smaller model.

    Args:
        cutting: the units to remove; their number, or the removed blocks, must be chosen.
        opened: the model of full size.
        folder: the folder to write to.
        besides: see :class:`~thanos.checkpoint.writer.CheckpointWriter`.
        emit: function that is called with events.
    """
    # A split of `width` may remove no unit of a kind.
    losing = {name: units for name, units in cutting.writers.items() if cutting.removed[units.kind]}
    cuts: dict[str, Cut] = {}
    for name, units in losing.items():
        cuts |= cuts_of(opened, name, units, torch.arange(len(units) - cutting.removed[units.kind]))
    return SmallerWriter(
        opened,
        plan_smaller(opened, cuts, frozenset(cutting.dropped)),
        folder,
        besides=besides,
        units=losing,
        on_progress=lambda done, total: emit(Event(kind="progress", phase="finish", done=done, total=total)),
    )


def finish_cut(cutting: Cutting, sizes: SmallerFolder, folder: Path) -> dict[str, Any]:
    """Change the config in a folder from full size to that of the smaller model; return ``cut`` of the report."""
    source = find_local(folder, trust_remote_code=cutting.recipe.trust_remote_code)
    assert source is not None
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    removed = {kind: number for kind, number in cutting.removed.items() if number and kind != BLOCKS}
    config = changed_config(source.config(), values, removed, cutting.dropped, cutting.head_unit)
    (folder / "config.json").write_text(json_text(config), encoding="utf-8")
    return cutting.to_dict(sizes)


def _fitted(opened: OpenedModel) -> frozenset[str]:
    """Return the layers that can be fitted to the outputs of the blocks after them."""
    prefix, blocks = find_blocks(opened.meta_model)
    config: Any = opened.meta_model.config.get_text_config(decoder=True)
    writer = family_of(config.model_type, type(opened.meta_model).__name__).last_writer
    return frozenset(f"{prefix}.{index}.{writer}" for index in range(len(blocks)))


def _writers(opened: OpenedModel, recipe: Recipe) -> dict[str, Units]:
    """Return the layers that lose columns, with their units."""
    name, blocks = find_blocks(opened.meta_model)
    found: dict[str, Units] = {}
    for kind in recipe.parsed_pattern.unit_kinds:
        for index, writers in enumerate(units_of(opened.meta_model, blocks, kind, recipe.head_unit or HEAD_UNITS[0])):
            found |= {f"{name}.{index}.{units.writer}": units for units in writers}
    return found


def _candidates(
    opened: OpenedModel, recipe: Recipe, counts: Mapping[str, int], sizes: Mapping[str, int]
) -> tuple[Mapping[str, int], ...]:
    """Return the numbers of units that may be removed, by kind, that the model's config can state."""

    def check(removed: Mapping[str, int]) -> None:
        some = {kind: number for kind, number in removed.items() if number and kind != BLOCKS}
        blocks = counts.get(BLOCKS, 0)
        dropped = range(blocks - removed.get(BLOCKS, 0), blocks)  # the check does not depend on which ones
        smaller_config(opened.meta_model.config, some, dropped, recipe.head_unit or HEAD_UNITS[0])

    share, multiple = recipe.resolved_sparsity, _multiple(recipe)
    if len(counts) > 1:
        target = share * block_parameters(opened)
        return tuple(splits(counts, sizes, target, multiple, check))
    ((kind, count),) = counts.items()
    what = _kind_words(opened, recipe, kind, count)
    removed = {kind: count - remaining_units(count, share, multiple, what)}
    check(removed)
    return (removed,)


def _multiple(recipe: Recipe) -> int:
    return recipe.multiple_of or default_multiple(recipe.parsed_pattern) or 1


def _kind_words(opened: OpenedModel, recipe: Recipe, kind: str, count: int) -> str:
    """Return the plural of the units: with grouped-query attention a unit is not one of the config's heads.

    Raises:
        RecipeError: there is one group of heads, and query heads could be removed from it.
    """
    if kind != HEADS or attention_of(opened.meta_model.config.get_text_config(decoder=True)).shared == 1:
        return kind
    unit = recipe.head_unit or HEAD_UNITS[0]
    if count == 1 and unit == HEAD_UNITS[0]:
        raise RecipeError(
            "every block has one key-value head, which must stay with its query heads; give head_unit query to remove only "
            "query heads"
        )
    return kind_words(kind, {"head_unit": unit})
