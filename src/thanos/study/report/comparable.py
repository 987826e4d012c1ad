"""The cells of a model that can be compared: same evaluation, same dtype, same tasks, and each cell and seed once.

The report uses the evaluation, dtype and tasks of most cells. It lists the other cells as left out (:class:`LeftOut`).
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from thanos.study.store import CellRecord


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Cells that the comparisons leave out, entirely or only their zero-shot accuracies.

    Attributes:
        reason: how they differ, as a predicate for "N cells that …".
        records: the cells.
    """

    reason: str
    records: tuple[CellRecord, ...]


def select_cells(records: Sequence[CellRecord]) -> tuple[list[CellRecord], list[LeftOut]]:
    """Return the cells that can be compared, in the given order, and the cells that are left out."""
    left_out: list[LeftOut] = []

    def keep(cells: list[CellRecord], what: Callable[[CellRecord], Any], reason: str) -> list[CellRecord]:
        shared = most_common(what, cells)
        odd = tuple(record for record in cells if what(record) not in (shared, None))
        if odd:
            left_out.append(LeftOut(reason.format(*shared), odd))
        return [record for record in cells if what(record) in (shared, None)]

    kept = keep(list(records), _evaluation_of, "had another evaluation text or other windows than most")
    kept = keep(kept, _dtype_of, "ran in another dtype than most ({})")
    same_tasks = {record.key for record in keep(kept, _tasks_of, "had other zero-shot tasks than most, not shown")}
    kept = [r if r.key in same_tasks else dataclasses.replace(r, zero_shot=None) for r in kept]
    kept, again = _once(kept)
    if again:
        reason = "repeated a cell and seed of another record with as many or more results"
        left_out.append(LeftOut(reason, again))
    return kept, left_out


def most_common(what: Callable[[CellRecord], Any], records: Iterable[CellRecord]) -> Any:
    """Return the most common value of the function ``what`` over records, as a tuple; None if it is None for all."""
    counts = Counter(json.dumps(value) for record in records if (value := what(record)) is not None)
    if not counts:
        return None
    return _tuples(json.loads(max(counts, key=lambda text: (counts[text], text))))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def _evaluation_of(record: CellRecord) -> tuple[Any, ...] | None:
    """Return the settings that comparable perplexities share; None for a cell that was not evaluated."""
    found = record.evaluation
    return None if found is None else (found["text_sha256"], found["sequence_length"], found["windows"])


def _dtype_of(record: CellRecord) -> tuple[Any, ...] | None:
    found = record.asked.get("dtype")
    return None if found is None else (found,)


def _tasks_of(record: CellRecord) -> tuple[Any, ...] | None:
    """Return the tasks and their numbers of documents; averages over different ones are not comparable."""
    found = record.zero_shot
    return (
        None if found is None else tuple(sorted((name, task.get("samples")) for name, task in found["tasks"].items()))
    )


def _once(records: Sequence[CellRecord]) -> tuple[list[CellRecord], tuple[CellRecord, ...]]:
    """Return one record of each cell and seed, and the other records. The one with the most results is used, else the last."""
    chosen: dict[str, CellRecord] = {}
    for record in records:
        cell = json.dumps(record.cell, sort_keys=True)
        if cell not in chosen or _completeness(record) >= _completeness(chosen[cell]):
            chosen[cell] = record
    kept = {record.key for record in chosen.values()}
    return [r for r in records if r.key in kept], tuple(r for r in records if r.key not in kept)


def _completeness(record: CellRecord) -> tuple[bool, bool, bool]:
    compared = (record.evaluation or {}).get("kl_divergence") is not None
    return record.zero_shot is not None, record.evaluation is not None, compared


def is_cost_only(record: CellRecord) -> bool:
    """Whether the study lists the model in ``cost_only``, so that it was not evaluated."""
    return record.asked.get("evaluation", {}) is None


def calibration_of(record: CellRecord) -> tuple[Any, ...]:
    """Return text, number and length of the calibration sequences."""
    return (record.cell["calibration"], record.cell["samples"], record.cell["sequence_length"])


def damping_of(record: CellRecord) -> tuple[Any, ...] | None:
    """Return the damping; None for a method without damping, which can be compared with rows of any damping."""
    return None if record.cell["damping"] is None else (record.cell["damping"],)
