"""What a run removes from every block if its pattern removes units: which layers it prunes, and how many units go."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from thanos.engine.records import LayerRecord
from thanos.errors import ModelError, RecipeError
from thanos.events import Event, Watcher
from thanos.model.layers import LinearLayer, find_blocks, linear_layers, select_layers
from thanos.model.opening import OpenedModel
from thanos.patterns.units import BLOCKS, HEADS, NEURONS
from thanos.patterns.units import Units as UnitPattern
from thanos.recipe import LayerRecipe, Recipe
from thanos.recipe.units import HEAD_UNITS
from thanos.registry import parse_pattern
from thanos.run.cut_words import kind_words
from thanos.run.split import splits
from thanos.run.unit_counts import runs_of, units_that_stay
from thanos.run.work_folder import WorkFolder
from thanos.shrink.config import smaller_config
from thanos.shrink.folder import SmallerFolder, write_smaller
from thanos.shrink.units import Units, attention_of, units_of

MULTIPLES = {NEURONS: 64, HEADS: 1, BLOCKS: 1}
"""Kind → the number of which the units that stay are a multiple, unless the recipe says otherwise."""


@dataclass(frozen=True, slots=True)
class Cutting:
    """The units that a run removes from a model.

    Attributes:
        recipe: the recipe.
        writers: full name of each layer that loses columns → its units; if blocks go, the layers that may be fitted to what the
            blocks gave.
        counts: kind → number of units of a writer.
        candidates: the numbers of units that may go, by kind; several if they are to be chosen by error.
        sizes: kind → number of parameters and of bytes of one unit of every writer together.
        block_parameters: number of parameters of the model's blocks.
        bytes: bytes of the tensors of the model before.
        dropped: indices of the blocks that go, ascending; empty until they are chosen.
    """

    recipe: Recipe
    writers: Mapping[str, Units]
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
        """Number of blocks that go."""
        return self.candidates[0].get(BLOCKS, 0)

    @property
    def parameters(self) -> dict[str, int]:
        """Kind → number of parameters of one unit of every writer together."""
        return {kind: size for kind, (size, _) in self.sizes.items()}

    @property
    def target(self) -> float:
        """Number of parameters to remove, if the sparsity is a share of those of the blocks."""
        return self.recipe.resolved_sparsity * self.block_parameters

    @property
    def removed(self) -> Mapping[str, int]:
        """Kind → number of units that go from every writer; of several candidates the largest number of each kind."""
        return {kind: max(one[kind] for one in self.candidates) for kind in self.counts}

    @property
    def head_unit(self) -> str:
        """Which heads go together."""
        return self.recipe.head_unit or HEAD_UNITS[0]

    @property
    def bytes_after(self) -> int:
        """Bytes of the tensors that stay, at most."""
        gone = (sum(self.sizes[kind][1] * number for kind, number in one.items()) for one in self.candidates)
        return self.bytes - min(gone)

    def settings(self, layers: Mapping[LinearLayer, LayerRecipe]) -> dict[LinearLayer, LayerRecipe]:
        """Return the settings of the writers, with the pattern and the sparsity of their units."""
        return {layer: self._settings(layer.name, settings) for layer, settings in layers.items()}

    def _settings(self, name: str, settings: LayerRecipe) -> LayerRecipe:
        units = self.writers[name]
        if self.recipe.parsed_pattern.keeps_all:
            return replace(settings, sparsity=0.0)
        pattern = parse_pattern(units.kind)  # a kind has the name of its pattern
        assert isinstance(pattern, UnitPattern)
        own = pattern.of_writer(len(units), runs_of(units.columns))
        share = self.removed[units.kind] / len(units)
        return replace(settings, pattern=str(own), sparsity=share)

    def kinds(self, layers: Iterable[LinearLayer]) -> dict[LinearLayer, str]:
        """Return the kind of the units of each layer."""
        return {layer: self.writers[layer.name].kind for layer in layers}

    def kept(self, layers: Sequence[LayerRecord]) -> dict[str, Tensor]:
        """Return for each writer the indices of the units that stay, ascending, (units that stay,) int64."""
        import torch

        found = {}
        for layer in () if self.drops else layers:
            units = self.writers[layer.name]
            stays = torch.ones(len(units), dtype=torch.bool)
            stays[layer.removed_units or []] = False
            found[layer.name] = stays.nonzero().squeeze(1)
        return found

    def to_dict(self, made: SmallerFolder) -> dict[str, Any]:
        """Return plain values for the report, with the sizes of what was made."""
        return {
            "asked": self.recipe.resolved_sparsity,
            "units": {
                kind: {"before": count, "after": count - self.removed[kind]} for kind, count in self.counts.items()
            },
            **({"head_unit": self.head_unit} if HEADS in self.counts else {}),
            **({"dropped_blocks": list(self.dropped)} if self.drops else {}),
            "parameters_before": made.dense_parameters,
            "parameters_after": made.parameters,
            "share_of_block_parameters": (made.dense_parameters - made.parameters) / self.block_parameters,
            "bytes_before": made.dense_nbytes,
            "bytes_after": made.nbytes,
        }


def plan_cutting(opened: OpenedModel, recipe: Recipe) -> tuple[Cutting, dict[LinearLayer, LayerRecipe], dict[str, str]]:
    """Return what a run removes, the layers that lose columns with their settings, and the others with the reason.

    Raises:
        ModelError: the model cannot lose such units from all blocks alike, or its config cannot state the smaller size.
        RecipeError: the recipe would remove none or all of the units.
    """
    chosen, left = select_layers(linear_layers(opened.meta_model), recipe)
    writers = _writers(opened, recipe)
    if recipe.parsed_pattern.keeps_all:
        counts, sizes = _blocks(opened)
    else:
        counts = {units.kind: len(units) for units in writers.values()}
        sizes = _sizes(opened, writers)
    cutting = Cutting(
        recipe=recipe,
        writers=writers,
        counts=counts,
        candidates=_candidates(opened, recipe, counts, {kind: size for kind, (size, _) in sizes.items()}),
        sizes=sizes,
        block_parameters=_block_parameters(opened),
        bytes=sum(info.nbytes for info in opened.checkpoint.tensors.values()),
    )
    if missing := writers.keys() - {layer.name for layer in chosen}:
        raise ModelError(f"{min(missing)} is not a linear layer that can be pruned, so no units can be removed")
    why = "loses nothing itself" if cutting.drops else f"has no {' and '.join(counts)} as its inputs"
    layers = {layer: settings for layer, settings in chosen.items() if layer.name in writers}
    left |= {layer.name: why for layer in chosen if layer not in layers}
    return cutting, cutting.settings(layers), left


def write_cut(cutting: Cutting, records: Sequence[LayerRecord], work: WorkFolder, emit: Watcher) -> dict[str, Any]:
    """Write the smaller model from the finished one of full size; return what was cut, for the report.

    Args:
        cutting: the units that go.
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


def _writers(opened: OpenedModel, recipe: Recipe) -> dict[str, Units]:
    """Return the layers that lose columns; if blocks go, those that can be fitted to what the blocks after them gave."""
    name, blocks = find_blocks(opened.meta_model)
    found: dict[str, Units] = {}
    if recipe.parsed_pattern.keeps_all:
        with suppress(ModelError):  # of models that cannot lose neurons
            for index, writers in enumerate(units_of(opened.meta_model, blocks, NEURONS)):
                found |= {f"{name}.{index}.{units.writer}": units for units in writers if len(writers) == 1}
        return found
    for kind in recipe.parsed_pattern.unit_kinds:
        for index, writers in enumerate(units_of(opened.meta_model, blocks, kind, recipe.head_unit or HEAD_UNITS[0])):
            found |= {f"{name}.{index}.{units.writer}": units for units in writers}
    return found


def _candidates(
    opened: OpenedModel, recipe: Recipe, counts: Mapping[str, int], sizes: Mapping[str, int]
) -> tuple[Mapping[str, int], ...]:
    """Return the numbers of units that may go, by kind, that the model's config can state."""

    def check(removed: Mapping[str, int]) -> None:
        some = {kind: number for kind, number in removed.items() if number and kind != BLOCKS}
        blocks = counts.get(BLOCKS, 0)
        dropped = range(blocks - removed.get(BLOCKS, 0), blocks)  # which ones makes no difference to the check
        smaller_config(opened.meta_model.config, some, dropped, recipe.head_unit or HEAD_UNITS[0])

    share, multiple = recipe.resolved_sparsity, recipe.multiple_of
    if len(counts) > 1:
        target = share * _block_parameters(opened)
        return tuple(splits(counts, sizes, target, multiple or MULTIPLES[NEURONS], check))
    ((kind, count),) = counts.items()
    what = _kind_words(opened, recipe, kind, count)
    removed = {kind: count - units_that_stay(count, share, multiple or MULTIPLES[kind], what)}
    check(removed)
    return (removed,)


def _kind_words(opened: OpenedModel, recipe: Recipe, kind: str, count: int) -> str:
    """Return what the units are, in the plural: with grouped-query attention a unit is not one of the config's heads.

    Raises:
        RecipeError: there is one group of heads, and query heads could be removed from it.
    """
    if kind != HEADS or attention_of(opened.meta_model.config.get_text_config(decoder=True)).shared == 1:
        return kind
    unit = recipe.head_unit or HEAD_UNITS[0]
    if count == 1 and unit == HEAD_UNITS[0]:
        raise RecipeError(
            "every block has one key-value head, which has to stay with its query heads; head_unit query removes query heads "
            "alone"
        )
    return kind_words(kind, {"head_unit": unit})


def _sizes(opened: OpenedModel, writers: Mapping[str, Units]) -> dict[str, tuple[int, int]]:
    """Return kind → parameters and bytes that go if every writer loses one unit."""
    sizes: dict[str, tuple[int, int]] = {}
    for name, units in writers.items():
        block = name.removesuffix(units.writer)
        parameters, size = sizes.get(units.kind, (0, 0))
        for one in units.slices:
            weight = opened.meta_model.get_parameter(f"{block}{one.name}")
            entries = one.index.shape[1] * weight.numel() // weight.shape[one.axis]
            parameters += entries
            size += entries * opened.checkpoint.tensors[opened.key_of[f"{block}{one.name}"]].dtype.itemsize
        sizes[units.kind] = (parameters, size)
    return sizes


def _blocks(opened: OpenedModel) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Return the number of blocks, and the parameters and bytes of the smallest, each by kind."""
    name, blocks = find_blocks(opened.meta_model)
    found = []
    for index, block in enumerate(blocks):
        names = [(f"{name}.{index}.{one}", parameter.numel()) for one, parameter in block.named_parameters()]
        size = sum(
            numel * opened.checkpoint.tensors[opened.key_of[one]].dtype.itemsize
            for one, numel in names
            if one in opened.key_of
        )
        found.append((sum(numel for _, numel in names), size))
    return {BLOCKS: len(blocks)}, {BLOCKS: min(found, key=lambda pair: pair[1])}


def _block_parameters(opened: OpenedModel) -> int:
    _, blocks = find_blocks(opened.meta_model)
    return sum(parameter.numel() for block in blocks for parameter in block.parameters())
