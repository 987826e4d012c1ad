"""Writing a smaller folder from a finished folder whose units are zero, one tensor at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from thanos.checkpoint.layout import Checkpoint, Layout, TensorSpec, plan_layout
from thanos.checkpoint.other_files import copy_others
from thanos.checkpoint.reader import parse_shard
from thanos.checkpoint.writer import CheckpointWriter
from thanos.errors import ModelError, UserError
from thanos.events import Event, Watcher
from thanos.model.layers import find_blocks
from thanos.model.opening import OpenedModel, open_model
from thanos.model.source import find_local
from thanos.shrink.config import changed_config
from thanos.shrink.renaming import Renamed, Renaming
from thanos.shrink.units import GROUP, HEADS, NEURONS, Units, units_of
from thanos.system.documents import json_text
from thanos.system.event_stream import EventStream


@dataclass(frozen=True, slots=True)
class SmallerFolder:
    """Sizes of a smaller folder.

    Attributes:
        parameters: number of entries of all tensors.
        nbytes: bytes of the weight files, headers included.
        dense_parameters: number of entries of all tensors of the full-size folder.
        dense_nbytes: bytes of its weight files.
    """

    parameters: int
    nbytes: int
    dense_parameters: int
    dense_nbytes: int


@dataclass(frozen=True, slots=True)
class _Cut:
    """The positions along one axis of a parameter that are kept."""

    axis: int
    stay: Tensor


def write_smaller(
    folder: Path,
    out: Path,
    kept: Mapping[str, Tensor],
    *,
    head_unit: str = GROUP,
    dropped_blocks: Sequence[int] = (),
    trust_remote_code: bool = False,
    on_event: Watcher | None = None,
) -> SmallerFolder:
    """Write a folder without the removed units and blocks. All other entries stay the same, bit by bit.

    Nothing compensates the removal. So the columns of a removed unit in the writer should be zero, and a removed block should
    be close to the identity.

    Args:
        folder: a local folder of safetensors of full size.
        out: the output folder, which must not exist. It appears by one rename when it is complete.
        kept: full name of each writer → indices of the kept units, int64, ascending; as many for every writer of a kind.
        head_unit: the unit of heads; see :func:`~thanos.shrink.units.units_of`.
        dropped_blocks: indices of the removed blocks. ``kept`` need not have their writers.
        trust_remote_code: let transformers run Python code from the checkpoint.
        on_event: function that is called with events of progress.

    Raises:
        ModelError: the folder cannot be read, or its architecture cannot lose these units.
        UserError: ``out`` exists.
        ResourceError: the disk has too little room.
        ValueError: ``kept`` lacks a writer, or has different numbers of units for writers of a kind.
    """
    if out.exists():
        raise UserError(f"{out} exists; give a folder that does not")
    source = find_local(folder, trust_remote_code=trust_remote_code)
    if source is None or source.gguf is not None:
        raise ModelError(f"{folder} is not a local folder of safetensors; give one")
    opened = open_model(source)
    cuts, removed = _cuts(opened, kept, head_unit, frozenset(dropped_blocks))
    values = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    config = changed_config(source.config(), values, removed, dropped_blocks, head_unit)
    partial = out.with_name(f".{out.name}.smaller")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        sizes = _write_tensors(opened, cuts, frozenset(dropped_blocks), partial, EventStream(on_event))
        (partial / "config.json").write_text(json_text(config), encoding="utf-8")
        copy_others(source.folder, partial, ("config.json",))
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return sizes


def smaller_size(
    opened: OpenedModel,
    kept: Mapping[str, Tensor],
    *,
    head_unit: str = GROUP,
    dropped_blocks: Sequence[int] = (),
) -> SmallerFolder:
    """Return the sizes of the folder that :func:`write_smaller` would write from an opened model. No weight is read."""
    dropped = frozenset(dropped_blocks)
    cuts, _ = _cuts(opened, kept, head_unit, dropped)
    return _plan(opened, cuts, dropped).sizes


def _cuts(
    opened: OpenedModel, kept: Mapping[str, Tensor], head_unit: str, dropped: frozenset[int]
) -> tuple[dict[str, _Cut], dict[str, int]]:
    """Return parameter name → cut, and kind → number of units that each writer loses."""
    prefix, blocks = find_blocks(opened.meta_model)
    unmatched = {name for name in kept if not name.startswith(tuple(f"{prefix}.{number}." for number in dropped))}
    cuts: dict[str, _Cut] = {}
    removed: dict[str, int] = {}
    for kind in (NEURONS, HEADS):
        if not unmatched:
            break
        by_block = {
            f"{prefix}.{number}": units
            for number, units in enumerate(units_of(opened.meta_model, blocks, kind, head_unit))
            if number not in dropped
        }
        writers = {f"{block}.{one.writer}": (block, one) for block, units in by_block.items() for one in units}
        if unmatched.isdisjoint(writers):
            continue
        for writer, (block, units) in writers.items():
            if writer not in kept:
                raise ValueError(f"kept lacks {writer}")
            lost = len(units) - len(kept[writer])
            if removed.setdefault(kind, lost) != lost:
                raise ValueError(f"{writer} loses {lost} units, others {removed[kind]}")
            cuts |= {f"{block}.{name}": cut for name, cut in _cuts_of(opened, block, units, kept[writer]).items()}
        unmatched -= writers.keys()
    if unmatched:
        raise ValueError(f"{min(unmatched)} is not the writer of any units")
    return cuts, {kind: lost for kind, lost in removed.items() if lost}


def _cuts_of(opened: OpenedModel, block: str, units: Units, kept: Tensor) -> dict[str, _Cut]:
    """Return parameter name relative to the block → cut, for the units of one writer."""
    removed = torch.ones(len(units), dtype=torch.bool)
    removed[kept] = False
    cuts = {}
    for one in units.slices:
        size = opened.meta_model.get_parameter(f"{block}.{one.name}").shape[one.axis]
        stay = torch.ones(size, dtype=torch.bool)
        stay[one.index[removed].flatten()] = False
        cuts[one.name] = _Cut(one.axis, stay.nonzero().flatten())
    return cuts


@dataclass(frozen=True, slots=True)
class _Plan:
    """The weight files to be written.

    Attributes:
        layout: the tensors under their new names, with the parts of fused ones.
        renamed: new name of a tensor or part → name in the checkpoint.
        cuts: new name → cut, for the tensors that are cut.
        sizes: parameters and bytes before and after.
    """

    layout: Layout
    renamed: dict[str, str]
    cuts: dict[str, _Cut]
    sizes: SmallerFolder


def _plan(opened: OpenedModel, cuts: Mapping[str, _Cut], dropped: frozenset[int]) -> _Plan:
    checkpoint = opened.checkpoint
    cut_of = {opened.key_of[name]: cut for name, cut in cuts.items()}
    new_name = Renaming(opened, dropped)
    wholes, largest = _whole_tensors(checkpoint)
    specs: dict[str, TensorSpec] = {}
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for whole, (spec, names) in wholes.items():
        name = new_name(whole)
        if name is None:
            continue
        shapes = {new_name(part) or part: _new_shape(checkpoint, part, cut_of) for part in names}
        if list(names) != [whole]:
            parts[name] = shapes
        specs[name] = TensorSpec(spec.dtype, _joined(spec.shape, list(shapes.values())))
    layout = plan_layout(specs, largest)
    sizes = SmallerFolder(
        sum(spec.numel for spec in specs.values()),
        layout.nbytes,
        sum(spec.numel for spec, _ in wholes.values()),
        checkpoint.layout.nbytes,
    )
    for name, shapes in parts.items():
        layout.split(name, shapes)
    renamed = {new: key for key in checkpoint.tensors if (new := new_name(key)) is not None}
    return _Plan(layout, renamed, {name: cut_of[key] for name, key in renamed.items() if key in cut_of}, sizes)


def _write_tensors(
    opened: OpenedModel, cuts: Mapping[str, _Cut], dropped: frozenset[int], folder: Path, emit: EventStream
) -> SmallerFolder:
    """Write the weight files."""
    plan = _plan(opened, cuts, dropped)
    writer = CheckpointWriter(plan.layout, Renamed(opened.checkpoint, plan.renamed), folder)
    emit(Event(kind="phase", phase="write"))
    for done, (name, cut) in enumerate(plan.cuts.items(), 1):
        writer.write(name, opened.checkpoint.read(plan.renamed[name]).index_select(cut.axis, cut.stay))
        emit(Event(kind="progress", phase="write", done=done, total=len(plan.cuts)))
    writer.finish()
    return plan.sizes


def _whole_tensors(checkpoint: Checkpoint) -> tuple[dict[str, tuple[TensorSpec, list[str]]], int]:
    """Return the tensors as they are stored in the files, and the largest number of bytes of tensors in one file.

    A tensor has its dtype and shape, and the names of the parts into which the layout splits it, in order. An unsplit tensor
    has only its own name.
    """
    tensors = checkpoint.layout.tensors
    wholes: dict[str, tuple[TensorSpec, list[str]]] = {}
    for shard in checkpoint.layout.shards:
        _, infos = parse_shard(Path(shard.name), shard.header)
        new = [(info.offset, name) for name, info in tensors.items() if info.shard == shard.name and name not in infos]
        for whole, info in infos.items():
            end = info.offset + info.nbytes
            inside = [whole] if whole in tensors else [name for at, name in sorted(new) if info.offset <= at < end]
            wholes[whole] = (TensorSpec(info.dtype, info.shape), inside)
    return wholes, max(shard.size - len(shard.header) for shard in checkpoint.layout.shards)


def _new_shape(checkpoint: Checkpoint, key: str, cut_of: Mapping[str, _Cut]) -> tuple[int, ...]:
    shape = list(checkpoint.tensors[key].shape)
    if key in cut_of:
        shape[cut_of[key].axis] = len(cut_of[key].stay)
    return tuple(shape)


def _joined(whole: tuple[int, ...], parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of a fused tensor (experts, rows, columns) that consists of parts of these shapes.

    A tensor with one part has the part's shape.
    """
    if len(parts) == 1:
        return parts[0]
    columns = parts[0][-1]
    return (whole[0], sum(map(math.prod, parts)) // columns // whole[0], columns)
