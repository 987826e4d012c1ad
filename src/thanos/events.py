"""What the engine tells whoever watches: a stream of small records, from which the display and the log are drawn.

The log, ``events.jsonl``, is described in docs/formats.md.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Phase = Literal[
    "load", "calibration", "verify", "statistics", "solve", "write", "propagate", "evaluate", "tasks", "finish", "draw"
]  # fmt: skip


LOG_NAME = "events.jsonl"


RUN_NAME = "run.json"
"""Which run it is: in the work folder, and afterwards beside the model."""


LOG_SCHEMA = 1
"""Raised when a reader of the old format would misread the new one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One step of a run.

    Args:
        kind: ``phase`` (a phase begins), ``progress`` (``done`` of ``total`` units of the phase), ``layer`` (a layer
            was pruned), ``block`` (a block is complete) or ``note`` (a line that a person should read).
        phase: the phase that is running.
        seconds: since the run began, or since it was resumed.
        block: index of the decoder block, from 0; None outside the blocks.
        blocks: number of decoder blocks.
        layer: full module name, for ``layer``.
        done: units finished in this phase (sequences, layers or tensors).
        total: units in this phase.
        tokens: tokens processed so far in this phase.
        error: relative layer error after compensation, for ``layer``; the mean so far, for ``block``.
        replayed: the block was finished by an earlier run; its outputs alone are computed again.
        message: for ``note``.
        host_bytes: resident memory of the process now; like the three below at most a tenth of a second old, and for ``block``
            no older than the event.
        host_peak_bytes: its peak so far.
        device_bytes: memory allocated on the CUDA device now; None without one.
        device_peak_bytes: its peak so far.
    """

    kind: Literal["phase", "progress", "layer", "block", "note"]
    phase: Phase
    seconds: float = 0.0
    block: int | None = None
    blocks: int = 0
    layer: str = ""
    done: int = 0
    total: int = 0
    tokens: int = 0
    error: float | None = None
    replayed: bool = False
    message: str = ""
    host_bytes: int = 0
    host_peak_bytes: int = 0
    device_bytes: int | None = None
    device_peak_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: ``kind``, ``phase``, ``seconds``, and whatever is not its default."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default or field.name == "seconds"
        }


def read_events(lines: Iterable[str]) -> Iterator[Event]:
    """Return the events of a log; a last line without its end is left out.

    Raises:
        ValueError: the schema is not this version's, or a line is no event.
    """
    for line in lines:
        if not line.endswith("\n"):
            return
        values = json.loads(line)
        if values.get("kind") != "run":
            yield Event(**values)
        elif values.get("schema") != LOG_SCHEMA:
            raise ValueError(f"the log has schema {values.get('schema')!r}; this version reads {LOG_SCHEMA}")


Watcher = Callable[[Event], None]
