"""Writing a smaller folder from a finished folder whose units are zero, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from thanos.checkpoint.other_files import copy_others
from thanos.errors import ModelError, UserError
from thanos.events import Event, Watcher
from thanos.model.layers import find_blocks
from thanos.model.opening import OpenedModel, open_model
from thanos.model.source import find_local
from thanos.shrink.config import changed_config
from thanos.shrink.units import GROUP, HEADS, NEURONS, units_of
from thanos.shrink.writer import Cut, SmallerFolder, SmallerWriter, cuts_of, plan_smaller
from thanos.system.documents import json_text
from thanos.system.event_stream import EventStream


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
    dropped = frozenset(dropped_blocks)
    cuts, removed = _cuts(opened, kept, head_unit, dropped)
    values = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    config = changed_config(source.config(), values, removed, dropped_blocks, head_unit)
    partial = out.with_name(f".{out.name}.smaller")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        plan, emit = plan_smaller(opened, cuts, dropped), EventStream(on_event)
        emit(Event(kind="phase", phase="write"))
        SmallerWriter(
            opened,
            plan,
            partial,
            cuts=cuts,
            on_progress=lambda done, total: emit(Event(kind="progress", phase="write", done=done, total=total)),
        ).finish()
        (partial / "config.json").write_text(json_text(config), encoding="utf-8")
        copy_others(source.folder, partial, ("config.json",))
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return plan.sizes


def smaller_size(
    opened: OpenedModel,
    kept: Mapping[str, Tensor],
    *,
    head_unit: str = GROUP,
    dropped_blocks: Sequence[int] = (),
) -> SmallerFolder:
    """Return the sizes of the folder that :func:`write_smaller` would write from an opened model. No weight is read."""
    dropped = frozenset(dropped_blocks)
    return plan_smaller(opened, _cuts(opened, kept, head_unit, dropped)[0], dropped).sizes


def _cuts(
    opened: OpenedModel, kept: Mapping[str, Tensor], head_unit: str, dropped: frozenset[int]
) -> tuple[dict[str, Cut], dict[str, int]]:
    """Return name in the checkpoint → cut, and kind → number of units that each writer loses."""
    prefix, blocks = find_blocks(opened.meta_model)
    unmatched = {name for name in kept if not name.startswith(tuple(f"{prefix}.{number}." for number in dropped))}
    cuts: dict[str, Cut] = {}
    removed: dict[str, int] = {}
    for kind in (NEURONS, HEADS):
        if not unmatched:
            break
        writers = {
            f"{prefix}.{number}.{one.writer}": one
            for number, units in enumerate(units_of(opened.meta_model, blocks, kind, head_unit))
            if number not in dropped
            for one in units
        }
        if unmatched.isdisjoint(writers):
            continue
        for writer, units in writers.items():
            if writer not in kept:
                raise ValueError(f"kept lacks {writer}")
            lost = len(units) - len(kept[writer])
            if removed.setdefault(kind, lost) != lost:
                raise ValueError(f"{writer} loses {lost} units, others {removed[kind]}")
            cuts |= cuts_of(opened, writer, units, kept[writer])
        unmatched -= writers.keys()
    if unmatched:
        raise ValueError(f"{min(unmatched)} is not the writer of any units")
    return cuts, {kind: lost for kind, lost in removed.items() if lost}
