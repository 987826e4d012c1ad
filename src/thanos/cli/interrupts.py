"""The early end of a command, by a signal or an error, and the hint to resume it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from thanos.errors import ResourceError, UserError, recurs, resource_errors

if TYPE_CHECKING:
    from thanos.run.work_folder import WorkFolder


class EndedEarly(Exception):  # noqa: N818  an interruption is not an error
    """Wraps the exception that ended a run, since the argument parser would swallow an interruption.

    Attributes:
        error: exception that ended the run.
        finished: number of finished blocks that were kept, or of other units of work.
        blocks: total number of these units.
        unit: the name of the unit, in the plural.
        prepared: whether a resumed run can reuse something although no unit is finished.
        same: whether the same command continues, without ``--resume``.
    """

    def __init__(
        self,
        error: BaseException,
        finished: int,
        blocks: int,
        unit: str = "blocks",
        prepared: bool = False,
        *,
        same: bool = False,
    ) -> None:
        super().__init__(str(error))
        self.prepared, self.same = prepared, same
        self.error, self.finished, self.blocks, self.unit = error, finished, blocks, unit

    def hint(self, again: str) -> str:
        """Return the end of the error line: the number of finished blocks and the command to resume, if that can help."""
        if (self.finished or self.prepared) and not recurs(self.error):
            how = "the same command continues" if self.same else f"continue with: {again}"
            return f"; {self.finished} of {self.blocks} {self.unit} are finished, {how}"
        return "; no files are left" if isinstance(self.error, KeyboardInterrupt) else ""


@contextmanager
def resumable(work: WorkFolder) -> Iterator[None]:
    """Raise EndedEarly, with the number of finished blocks, if the enclosed run ends early and can be resumed.

    An error of the request itself is raised unchanged. The finished blocks are in the work folder.
    """
    try:
        with resource_errors():
            yield
    except (KeyboardInterrupt, Exception) as error:
        if needs_another_request(error):
            raise
        raise EndedEarly(error, work.finished, work.run.get(work.unit, 0), work.unit, work.prepared) from error


def needs_another_request(error: BaseException) -> bool:
    """Return whether an error ends the same request every time, so that resuming cannot help."""
    return isinstance(error, UserError) and not isinstance(error, ResourceError)


@contextmanager
def terminable() -> Iterator[list[int]]:
    """Handle SIGTERM, which schedulers send, like Ctrl-C. Yield a list that contains the signal once it has arrived."""
    received: list[int] = []

    def terminate(number: int, _: Any) -> None:
        if received:  # make and schedulers send it again, while the first one is being handled
            return
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield received
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
