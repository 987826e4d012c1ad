"""How a command ends before its time: by a signal or an error, and whether it can be resumed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thanos.errors import recurs


class EndedEarly(Exception):  # noqa: N818  what it holds may be no error
    """Carries what ended a run past the argument parser, which would swallow an interruption.

    Attributes:
        error: what ended it.
        finished: number of finished blocks that were kept.
        blocks: number of all blocks.
    """

    def __init__(self, error: BaseException, finished: int, blocks: int) -> None:
        super().__init__(str(error))
        self.error, self.finished, self.blocks = error, finished, blocks

    def hint(self, again: str) -> str:
        """Return the end of a line, which says what is left and the command that goes on with it, if that is of any use."""
        if self.finished and not recurs(self.error):
            return f"; {self.finished} of {self.blocks} blocks are finished, go on with: {again}"
        return "; nothing was left behind" if isinstance(self.error, KeyboardInterrupt) else ""


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Tell, if the run inside ends early, what is left of it beside ``out``."""
    from thanos.errors import ResourceError, UserError, resource_errors
    from thanos.run.work_folder import WorkFolder

    try:
        with resource_errors():
            yield
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, UserError) and not isinstance(error, ResourceError):
            raise  # the request itself must change
        work = WorkFolder(out)
        raise EndedEarly(error, work.finished, work.run.get("blocks", 0)) from error


@contextmanager
def terminable() -> Iterator[list[int]]:
    """Let SIGTERM, which schedulers send, end what is inside as Ctrl-C does; the list given holds it then."""
    received: list[int] = []

    def terminate(number: int, _: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield received
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
