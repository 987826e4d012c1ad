"""The stream of a run's events: add time and memory, pass them on, and log them to ``events.jsonl``."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from thanos._version import __version__
from thanos.events import LOG_SCHEMA, Event
from thanos.system.files import trim
from thanos.system.memory import Memory, host_memory
from thanos.system.meter import PhaseMeter

_FRESH = 0.1
"""Seconds for which a memory reading is reused. A reading takes about a millisecond, a small solve a few milliseconds."""


class EventStream:
    """Adds time and memory to events, writes the log, and passes the events on.

    Args:
        watcher: function called with each event.
        meter: source of the memory readings; None to read the host's memory without phases.
        keep_log: whether :meth:`log_to` will be called. Events before that call are kept for the log.
    """

    def __init__(
        self, watcher: Callable[[Event], None] | None = None, meter: PhaseMeter | None = None, *, keep_log: bool = False
    ) -> None:
        self._watcher, self._meter, self._keeps_log = watcher or (lambda event: None), meter, keep_log
        self._began = time.perf_counter()
        self._descriptor: int | None = None
        self._peak = 0
        self._read: tuple[float, Memory] | None = None
        self._header, self._waiting = _header(), list[Event]()
        self._shown: Callable[[str], str] = str

    def __call__(self, event: Event) -> None:
        """Add time and memory to one event, log it and pass it on."""
        now = time.perf_counter()
        if self._read is None or event.kind == "block" or now - self._read[0] >= _FRESH:
            self._read = now, self._memory()
        seconds = round(now - self._began, 6)  # the log's precision: a replay gives equal events
        event = dataclasses.replace(event, seconds=seconds, **self._read[1]._asdict())
        if self._keeps_log:
            self._log(event)
        self._watcher(event)

    def log_to(self, path: Path, shown: Callable[[str], str] = str) -> None:
        """Append all events of this run to a file, from the first on. An incomplete last line of the file is removed first.

        Args:
            path: the file.
            shown: function that changes the message of a note for the log, for example to remove local folders.
        """
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        trim(self._descriptor)
        self._shown = shown
        waiting, self._waiting = self._waiting, []
        self._write(self._header)
        for event in waiting:
            self._log(event)

    def close(self) -> None:
        """Close the log."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _log(self, event: Event) -> None:
        if self._descriptor is None:
            self._waiting.append(event)
            return
        if event.message:
            event = dataclasses.replace(event, message=self._shown(event.message))
        self._write(json.dumps(event.to_dict(), ensure_ascii=False))

    def _write(self, line: str) -> None:
        assert self._descriptor is not None
        data = line.encode() + b"\n"
        while data:
            data = data[os.write(self._descriptor, data) :]

    def _memory(self) -> Memory:
        memory = Memory(*host_memory()) if self._meter is None else self._meter.memory()
        # The kernel updates its two counters with a delay. Never report a peak below an earlier reading.
        self._peak = max(self._peak, memory.host_peak_bytes, memory.host_bytes)
        return memory._replace(host_peak_bytes=self._peak)


def _header() -> str:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"kind": "run", "schema": LOG_SCHEMA, "thanos_version": __version__, "time": now})
