"""What rank 0 alone touches, as the processes of a run see it: the output's shards, and which blocks are finished."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from thanos.engine.distributed import World

if TYPE_CHECKING:
    from thanos.checkpoint.writer import CheckpointWriter
    from thanos.engine.records import BlockJournal, BlockRecord


class SharedWriter:
    """The output's shards, which rank 0 alone touches: what the others write goes nowhere, what they read comes from it.

    Args:
        writer: of the output; None but for rank 0.
        world: the processes.
    """

    def __init__(self, writer: CheckpointWriter | None, world: World) -> None:
        self._writer, self._world = writer, world

    def write(self, name: str, tensor: Tensor) -> None:
        """See :meth:`~thanos.checkpoint.writer.CheckpointWriter.write`."""
        if self._writer is not None:
            self._writer.write(name, tensor)

    def read(self, name: str) -> Tensor:
        """Return a tensor that was written, to every process."""
        sent, tensor = self._world.from_first(lambda: (name, self._from_disk(name)))
        assert sent == name, f"this process reads {name}, rank 0 {sent}"
        return tensor

    def _from_disk(self, name: str) -> Tensor:
        assert self._writer is not None
        return self._writer.read(name)


class SharedJournal:
    """Which blocks are finished, as rank 0 knows it.

    Args:
        journal: of the run; None but for rank 0.
        world: the processes.

    Attributes:
        finished: see :class:`~thanos.engine.records.BlockJournal`.
    """

    def __init__(self, journal: BlockJournal | None, world: World) -> None:
        self._journal, self._world = journal, world
        known = world.from_first(lambda: dict(self._first.finished))
        self.finished: dict[int | None, BlockRecord] = known if journal is None else journal.finished

    @property
    def _first(self) -> BlockJournal:
        assert self._journal is not None
        return self._journal

    def record(self, block: int | None, **what: Any) -> None:
        """See :meth:`~thanos.engine.records.BlockJournal.record`. A block done again may have made later ones worthless."""
        if self._journal is not None:
            self._journal.record(block, **what)
        held = self._world.from_first(lambda: set(self.finished))
        if self._journal is None:
            self.finished = {number: record for number, record in self.finished.items() if number in held}
