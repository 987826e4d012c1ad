"""The units that a run removes from every block: their number, and the layers that are pruned for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from thanos.engine.records import LayerRecord
from thanos.errors import ModelError, RecipeError
from thanos.events import Event, Watcher
from thanos.model.layers import LinearLayer, find_blocks, linear_layers, select_layers
from thanos.model.opening import OpenedModel
from thanos.patterns.units import BLOCKS, HEADS
from thanos.patterns.units import Units as UnitPattern
from thanos.recipe import LayerRecipe, Recipe
from thanos.recipe.units import HEAD_UNITS, default_multiple
from thanos.registry import parse_pattern
from thanos.run.cut_sizes import block_parameters, sizes_by_block, unit_sizes
from thanos.run.cut_words import kind_words
from thanos.run.split import splits
from thanos.run.unit_counts import remaining_units, runs_of
from thanos.run.work_folder import WorkFolder
from thanos.shrink.config import smaller_config
from thanos.shrink.families import family_of
from thanos.shrink.folder import SmallerFolder, write_smaller
from thanos.shrink.units import Units, attention_of, units_of


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

    def kept(self, layers: Sequence[LayerRecord]) -> dict[str, Tensor]:
        """Return for each writer the indices of the remaining units, ascending, (remaining units,) int64."""
        import torch

        found = {}
        for layer in () if self.drops else layers:
            units = self.writers[layer.name]
            stays = torch.ones(len(units), dtype=torch.bool)
            stays[layer.removed_units or []] = False
            found[layer.name] = stays.nonzero().squeeze(1)
        return found

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
        """Return plain values for the report, with the sizes of the smaller folder."""
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


def write_cut(cutting: Cutting, records: Sequence[LayerRecord], work: WorkFolder, emit: Watcher) -> dict[str, Any]:
    """Write the smaller model from the finished one of full size; return ``cut`` of the report.

    Args:
        cutting: the units to remove.
        records: records of the writers.
        work: the work folder; ``model`` is complete, and ``unsealed`` becomes the smaller model.
        emit: called with events.
    """
    shutil.rmtree(work.unsealed, ignore_errors=True)  # of a run that ended during this step

    def watch(event: Event) -> None:
        emit(replace(event, phase="finish"))

    made = write_smaller(
        work.model,
        work.unsealed,
        cutting.kept(records),
        head_unit=cutting.head_unit,
        dropped_blocks=cutting.dropped,
        trust_remote_code=cutting.recipe.trust_remote_code,
        on_event=watch,
    )
    return cutting.to_dict(made)


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
