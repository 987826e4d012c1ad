"""The events of a run: a stream of small records, from which the display and the log are made.

The log, ``events.jsonl``, is described in docs/formats.md.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Phase = Literal[
    "load", "calibration", "allocate", "verify", "dense", "statistics", "choose", "solve", "tune", "write", "propagate",
    "evaluate", "tasks", "generate", "compile", "train", "finish", "draw",
]  # fmt: skip


LOG_NAME = "events.jsonl"


RUN_NAME = "run.json"
"""File that identifies the run. It is in the work folder first, and in the output folder with the model afterwards."""


LOG_SCHEMA = 1
"""Version of the log's format. Increase it if a reader of the old format would misread the new one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One step of a run.

    Args:
        kind: ``phase`` (a phase begins), ``progress`` (``done`` of ``total`` units of the phase), ``layer`` (a layer
            was pruned), ``stage`` (a stage of a block ended), ``block`` (a block is complete), ``epoch`` (a pass over the data
            is complete) or ``note`` (a line that a person should read).
        phase: the phase that is running.
        seconds: seconds since the run began or was resumed.
        block: index of the decoder block, from 0; None outside the blocks.
        blocks: number of decoder blocks.
        layer: full module name of the layer, for ``layer``.
        done: number of units finished in this phase (sequences, layers or tensors).
        total: number of units in this phase.
        tokens: number of tokens processed so far in this phase.
        error: for ``layer``, the relative error of the layer after compensation; for ``block``, the mean error so far; for
            ``stage``, the relative error of the block's outputs against the dense model's.
        stage: for ``stage``, its name; ``dense`` for the error before the first stage.
        loss: for ``progress`` of the phase ``tune``, the mean relative error of the batches in the last finished epoch;
            in a recovery, the training loss of the step, or for ``epoch`` the mean of the epoch.
        held_out: for ``tune``, the lowest relative error of the block on held-out sequences so far; for ``epoch``, the loss on
            held-out sequences.
        held_out_before: for ``tune``, that error before the block was tuned.
        replayed: whether an earlier run finished the block; only its outputs are computed again.
        message: the line of a ``note``.
        host_bytes: resident memory of the process now, in bytes. This and the next three values are at most 0.1 s old; for
            ``block`` they are read at the event.
        host_peak_bytes: peak of ``host_bytes`` so far.
        device_bytes: bytes allocated on the CUDA device now; None without one.
        device_peak_bytes: peak of ``device_bytes`` so far; None without a CUDA device.
    """

    kind: Literal["phase", "progress", "layer", "stage", "block", "epoch", "note"]
    phase: Phase
    seconds: float = 0.0
    block: int | None = None
    blocks: int = 0
    layer: str = ""
    done: int = 0
    total: int = 0
    tokens: int = 0
    error: float | None = None
    stage: str = ""
    loss: float | None = None
    held_out: float | None = None
    held_out_before: float | None = None
    replayed: bool = False
    message: str = ""
    host_bytes: int = 0
    host_peak_bytes: int = 0
    device_bytes: int | None = None
    device_peak_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: ``kind``, ``phase``, ``seconds``, and all other fields that differ from their default."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default or field.name == "seconds"
        }


def read_events(lines: Iterable[str]) -> Iterator[Event]:
    """Yield the events of a log. A last line without a newline is incomplete; it is skipped.

    Raises:
        ValueError: the schema is not this version's, or a line is not JSON.
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
