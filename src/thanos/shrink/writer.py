"""Writing the tensors of a smaller model. Each is cut when it is written, so the full-size model needs no room on the disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from thanos.checkpoint.layout import Checkpoint, Layout, TensorSpec, plan_layout
from thanos.checkpoint.reader import parse_shard
from thanos.checkpoint.writer import CheckpointWriter
from thanos.model.opening import OpenedModel
from thanos.shrink.renaming import Renamed, Renaming
from thanos.shrink.units import Units


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
class Cut:
    """The positions along one axis of a tensor that are kept, ascending, int64."""

    axis: int
    stay: Tensor


@dataclass(frozen=True, slots=True)
class SmallerPlan:
    """The weight files of a smaller model. They do not depend on which units are removed, only on their number.

    Attributes:
        layout: the tensors under their new names, with the parts of fused ones.
        new_name: name in the checkpoint → new name, for the tensors that remain.
        cut: names in the checkpoint of the tensors that are cut.
        sizes: parameters and bytes before and after.
    """

    layout: Layout
    new_name: Mapping[str, str]
    cut: frozenset[str]
    sizes: SmallerFolder


class SmallerWriter(CheckpointWriter):
    """The shards of a smaller model, written like those of the full-size one.

    All methods take names and tensors of the full-size model, in which removed units are zeros.

    Args:
        opened: the full-size model; it gives the tensors that are never written.
        plan: from :func:`plan_smaller`.
        folder, besides: see :class:`~thanos.checkpoint.writer.CheckpointWriter`.
        units: full name of each layer that loses units → its units, of which :meth:`removes` names the removed ones.
        cuts: name in the checkpoint → cut, for the tensors whose removed units are known already.
        on_progress: function that :meth:`finish` calls after each tensor, with the numbers of finished and of all tensors.

    Raises:
        ResourceError: the disk has too little room.
    """

    def __init__(
        self,
        opened: OpenedModel,
        plan: SmallerPlan,
        folder: Path,
        *,
        besides: int = 0,
        units: Mapping[str, Units] | None = None,
        cuts: Mapping[str, Cut] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        old_name = {new: name for name, new in plan.new_name.items()}
        super().__init__(plan.layout, Renamed(opened.checkpoint, old_name), folder, besides=besides)
        self._opened, self._plan, self._units, self._on_progress = opened, plan, dict(units or {}), on_progress
        self._cuts = dict(cuts or {})

    @property
    def sizes(self) -> SmallerFolder:
        """Parameters and bytes before and after."""
        return self._plan.sizes

    def removes(self, layer: str, units: Sequence[int]) -> None:
        """See :meth:`CheckpointWriter.removes <thanos.checkpoint.writer.CheckpointWriter.removes>`."""
        if layer in self._units:
            own = self._units[layer]
            self._cuts |= cuts_of(self._opened, layer, own, kept_units(own, units))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the remaining part of a tensor."""
        cut = self._cut(name)
        super().write(self._plan.new_name[name], tensor if cut is None else tensor.index_select(cut.axis, cut.stay))

    def read(self, name: str) -> Tensor:
        """Return a tensor that was written, at its full size, with zeros in the place of the removed units."""
        cut, part = self._cut(name), super().read(self._plan.new_name[name])
        if cut is None:
            return part
        whole = torch.zeros(self._opened.checkpoint.tensors[name].shape, dtype=part.dtype)
        return whole.index_copy_(cut.axis, cut.stay, part)

    def checksum(self, name: str) -> str:
        """Return the checksum of the bytes in the file."""
        return super().checksum(self._plan.new_name[name])

    def take_checksum(self, name: str) -> str:
        """Return the checksum of the bytes that were written for a tensor, and forget it."""
        return super().take_checksum(self._plan.new_name[name])

    def accept(self, name: str) -> None:
        """Count a tensor as written, because an interrupted run wrote it."""
        super().accept(self._plan.new_name[name])

    def finish(self) -> None:
        """Write the rest: cut tensors that were not written, then all others. Write the index, and force all to the disk."""
        new_names = self._plan.new_name.items()
        left = [name for name, new in new_names if name in self._plan.cut and new not in self.written]
        for done, name in enumerate(left, 1):
            self.write(name, self._opened.checkpoint.read(name))
            if self._on_progress is not None:
                self._on_progress(done, len(left))
        super().finish()

    def _cut(self, name: str) -> Cut | None:
        return self._cuts[name] if name in self._plan.cut else None


def kept_units(units: Units, removed: Sequence[int]) -> Tensor:
    """Return the indices of the units that are not removed, ascending, int64."""
    stays = torch.ones(len(units), dtype=torch.bool)
    stays[list(removed)] = False
    return stays.nonzero().flatten()


def cuts_of(opened: OpenedModel, writer: str, units: Units, kept: Tensor) -> dict[str, Cut]:
    """Return name in the checkpoint → cut, for the tensors that are cut with the units of one writer.

    Args:
        opened: the full-size model.
        writer: full name of the writer.
        units: its units.
        kept: indices of the kept units, ascending, int64.
    """
    removed = torch.ones(len(units), dtype=torch.bool)
    removed[kept] = False
    block = writer.removesuffix(units.writer)
    cuts = {}
    for one in units.slices:
        # Not the meta model's shape: a run calls this in another thread, while its block computes with real weights.
        key = opened.key_of[f"{block}{one.name}"]
        stay = torch.ones(opened.checkpoint.tensors[key].shape[one.axis], dtype=torch.bool)
        stay[one.index[removed].flatten()] = False
        cuts[key] = Cut(one.axis, stay.nonzero().flatten())
    return cuts


def plan_smaller(opened: OpenedModel, cuts: Mapping[str, Cut], dropped: frozenset[int]) -> SmallerPlan:
    """Plan the weight files of a smaller model. No weight is read.

    Args:
        opened: the full-size model.
        cuts: name in the checkpoint → cut. Only the number of kept positions matters.
        dropped: indices of the removed blocks.
    """
    checkpoint = opened.checkpoint
    new_name = Renaming(opened, dropped)
    wholes, largest = _whole_tensors(checkpoint)
    specs: dict[str, TensorSpec] = {}
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for whole, (spec, names) in wholes.items():
        name = new_name(whole)
        if name is None:
            continue
        shapes = {new_name(part) or part: _new_shape(checkpoint, part, cuts) for part in names}
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
    names = {key: new for key in checkpoint.tensors if (new := new_name(key)) is not None}
    return SmallerPlan(layout, names, frozenset(cuts.keys() & names.keys()), sizes)


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


def _new_shape(checkpoint: Checkpoint, key: str, cuts: Mapping[str, Cut]) -> tuple[int, ...]:
    shape = list(checkpoint.tensors[key].shape)
    if key in cuts:
        shape[cuts[key].axis] = len(cuts[key].stay)
    return tuple(shape)


def _joined(whole: tuple[int, ...], parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of a fused tensor (experts, rows, columns) that consists of parts of these shapes.

    A tensor with one part has the part's shape.
    """
    if len(parts) == 1:
        return parts[0]
    columns = parts[0][-1]
    return (whole[0], sum(map(math.prod, parts)) // columns // whole[0], columns)
