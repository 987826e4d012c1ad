"""The output's shards and the journal, for all processes of a run. Only rank 0 reads and writes the files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from thanos.engine.distributed import World

if TYPE_CHECKING:
    from thanos.checkpoint.writer import CheckpointWriter
    from thanos.engine.records import BlockJournal, BlockRecord


class SharedWriter:
    """The output's shards. Only rank 0 accesses the files: other ranks' writes do nothing, and their reads come from rank 0.

    Args:
        writer: writer of the output on rank 0; None on the other ranks.
        world: the processes of the run.
    """

    def __init__(self, writer: CheckpointWriter | None, world: World) -> None:
        self._writer, self._world = writer, world

    def write(self, name: str, tensor: Tensor) -> None:
        """See :meth:`~thanos.checkpoint.writer.CheckpointWriter.write`."""
        if self._writer is not None:
            self._writer.write(name, tensor)

    def removes(self, layer: str, units: Sequence[int]) -> None:
        """See :meth:`~thanos.checkpoint.writer.CheckpointWriter.removes`."""
        if self._writer is not None:
            self._writer.removes(layer, units)

    def read(self, name: str) -> Tensor:
        """Return a tensor that was written; rank 0 reads it and sends it.

        All processes must read the same names in the same order.
        """
        sent, tensor = self._world.from_first(lambda: (name, self._from_disk(name)))
        assert sent == name, f"this process reads {name}, rank 0 {sent}"
        return tensor

    def _from_disk(self, name: str) -> Tensor:
        assert self._writer is not None
        return self._writer.read(name)


class SharedJournal:
    """The journal of finished blocks; every rank has the records of rank 0.

    Args:
        journal: journal of the run on rank 0; None on the other ranks.
        world: the processes of the run.

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

    def record(self, record: BlockRecord, written: Sequence[str]) -> None:
        """See :meth:`~thanos.engine.records.BlockJournal.record`.

        If a block was solved again with another result, rank 0 drops the records of later blocks. The other ranks follow it.
        """
        if self._journal is not None:
            self._journal.record(record, written)
        held = self._world.from_first(lambda: set(self.finished))
        if self._journal is None:
            self.finished = {block: known for block, known in self.finished.items() if block in held}
