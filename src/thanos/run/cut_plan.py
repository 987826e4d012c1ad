"""The predicted cut of a run, for a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from thanos.model.opening import OpenedModel
from thanos.patterns.units import BLOCKS
from thanos.run.cut_sizes import sizes_by_block
from thanos.run.cutting import Cutting
from thanos.shrink.config import changed_sizes
from thanos.shrink.folder import smaller_size
from thanos.shrink.writer import SmallerFolder


def planned_cut(opened: OpenedModel, cutting: Cutting) -> dict[str, Any]:
    """Return the predicted cut of a run.

    Returns:
        The keys of ``cut`` of a report without the removed blocks, and ``config``: field → the number before and after. If
        several splits may be chosen in the run, only ``asked`` and ``multiple_of``, and ``splits``: for each of them
        ``removed`` by kind, and the sizes.
    """
    if not cutting.is_open:
        return cutting.counted() | _sizes(opened, cutting, cutting.removed)
    splits = [{"removed": dict(removed)} | _sizes(opened, cutting, removed) for removed in cutting.candidates]
    return {"asked": cutting.recipe.resolved_sparsity, "multiple_of": cutting.multiple, "splits": splits}


def _sizes(opened: OpenedModel, cutting: Cutting, removed: Mapping[str, int]) -> dict[str, Any]:
    some = {kind: number for kind, number in removed.items() if number and kind != BLOCKS}
    dropped = _smallest_blocks(opened, cutting.drops)
    config = changed_sizes(opened.meta_model.config, some, dropped, cutting.head_unit)
    return cutting.sizes_of(_made(opened, cutting, removed, dropped)) | {
        "config": {name: {"before": before, "after": after} for name, (before, after) in config.items()}
    }


def _made(opened: OpenedModel, cutting: Cutting, removed: Mapping[str, int], dropped: list[int]) -> SmallerFolder:
    """Return the sizes of the smaller folder. They do not depend on which units are removed."""
    kept = {
        name: torch.arange(len(units) - removed[units.kind])
        for name, units in cutting.writers.items()
        if not dropped and removed[units.kind]
    }
    return smaller_size(opened, kept, head_unit=cutting.head_unit, dropped_blocks=dropped)


def _smallest_blocks(opened: OpenedModel, number: int) -> list[int]:
    """Return the blocks of the fewest bytes, never the first. So only the files' headers can be larger than predicted.

    Their bytes depend on the positions of the removed blocks: a few bytes for each file.
    """
    sizes = sizes_by_block(opened)
    return sorted(sorted(range(1, len(sizes)), key=lambda index: sizes[index][1])[:number])
