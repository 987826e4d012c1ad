"""One run on several processes, through ``torch.distributed``: ``torchrun --nproc-per-node N -m thanos prune …``.

Every process holds the current block and its own contiguous range of the calibration sequences; the ranges differ in length by
at most one. The statistics are summed over the processes in float32, so all processes have the same bits. Each process then
solves its own rows of every layer (:mod:`thanos.solvers.row_shards`) and receives the rows of the others. Only rank 0 reads and
writes the output, and only rank 0 prints.

torchrun starts the processes, and ends all of them when one fails. Tensors are sent by gloo on the CPU and by NCCL between
GPUs, with one GPU per process (:mod:`thanos.engine.joining`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from thanos.calibration.statistics import InputGroup
from thanos.errors import ResourceError, UserError
from thanos.solvers.row_shards import RowShards, row_range

if TYPE_CHECKING:
    from thanos.model.layers import LinearLayer

T = TypeVar("T")

_BUCKET_BYTES = 32 << 20
"""Small statistics are sent together, up to this size. Such a message takes longer to send than to set up."""

LOST = (
    "the connection to another process of this run was lost: the process or its machine has stopped; for the cause see that "
    "process's own message, if there is one"
)


class World(RowShards):
    """The processes of a run. This class represents a single process.

    For the solvers, each process holds one row shard of a weight. Every process must make the same calls in the same order.
    """

    def share(self, count: int) -> range:
        """Return the range of this process's sequences among all ``count``."""
        return row_range(count, self.rank, self.size, 1)

    def from_first(self, make: Callable[[], T]) -> T:
        """Call ``make`` on rank 0 only; return its result on every process. The other processes get a copy."""
        return make()

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """Check that all processes have the same ``facts`` as rank 0. Nothing to check for a single process."""

    def merge(
        self, groups: list[InputGroup], layers: Sequence[LinearLayer], empty: Callable[[list[LinearLayer]], InputGroup]
    ) -> list[InputGroup]:
        """Return the statistics over the sequences of all processes. A layer without statistics in any process is in no group.

        All of this process's ``groups`` have the same accumulators. ``layers`` are those that were observed. ``empty`` makes a
        group without tokens, for layers that share an input.
        """
        del layers, empty
        return groups


SINGLE = World()
"""The single process."""


class Group(World):
    """Several processes, through ``torch.distributed``, which must be initialised."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def from_first(self, make: Callable[[], T]) -> T:
        """See :meth:`World.from_first`."""
        box = [make() if self.rank == 0 else None]
        with lost_peers():
            dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """See :meth:`World.check_equal`. Raises UserError, which names the fact and the first rank that differs from rank 0."""
        everyone: list[Any] = [None] * self.size
        with lost_peers():
            dist.all_gather_object(everyone, dict(facts))
        for rank, other in enumerate(everyone):
            for name, value in everyone[0].items():
                if other[name] != value:
                    raise UserError(
                        f"the processes do not do the same work: {name} is {_brief(value)} in rank 0, but "
                        f"{_brief(other[name])} in rank {rank}; start all with the same command, model files and versions"
                    )

    def merge(
        self, groups: list[InputGroup], layers: Sequence[LinearLayer], empty: Callable[[list[LinearLayer]], InputGroup]
    ) -> list[InputGroup]:
        """See :meth:`World.merge`. A process contributes zeros for an expert that its sequences never reached."""
        # First agree on the groups: all processes must sum the same tensors in the same order.
        seen: list[Any] = [None] * self.size
        with lost_peers():
            dist.all_gather_object(seen, [([layer.name for layer in group.layers], _tokens(group)) for group in groups])
        tokens: dict[tuple[str, ...], list[int]] = {}
        for names, counts in (item for process in seen for item in process):
            known = tokens.get(tuple(names), [0] * len(counts))
            tokens[tuple(names)] = [one + other for one, other in zip(known, counts, strict=True)]
        here = {tuple(layer.name for layer in group.layers): group for group in groups}
        named = {layer.name: layer for layer in layers}
        merged = []
        for names, counts in tokens.items():
            group = here.get(names) or empty([named[name] for name in names])
            group.tokens = counts[0]
            for one, count in zip(group.sums, counts[1:], strict=True):
                one.tokens = count
            merged.append(group)
        for bucket in _buckets([one.sums for group in merged for one in group.sums]):
            self._sum_together(bucket)
        return merged

    def _sum_together(self, tensors: list[Tensor]) -> None:
        if len(tensors) == 1:
            self.sum_(tensors[0])
            return
        flat = self.sum_(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def sum_(self, counts: Tensor) -> Tensor:
        """Replace a tensor, in place, by its sum over all processes; return it."""
        with lost_peers():
            dist.all_reduce(counts)
        return counts

    def before(self, counts: Tensor) -> Tensor:
        """Return the sum of an integer tensor over the processes of lower rank."""
        everyone = [torch.empty_like(counts) for _ in range(self.size)]
        with lost_peers():
            dist.all_gather(everyone, counts.contiguous())
        return torch.stack(everyone)[: self.rank].sum(0)

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """Gather the row shards of all processes, see :func:`~thanos.solvers.row_shards.row_range`: return all ``count`` rows.

        The rows are sent as bytes, since not every backend supports every dtype. Shards are padded to the same length.
        """
        shares = [len(row_range(count, rank, self.size)) for rank in range(self.size)]
        width = rows[:1].numel() if len(rows) else rows.new_empty(1, *rows.shape[1:]).numel()
        mine = torch.zeros(max(shares) * width * rows.element_size(), dtype=torch.uint8, device=rows.device)
        mine[: rows.nbytes] = rows.contiguous().reshape(-1).view(torch.uint8)
        pieces = [torch.empty_like(mine) for _ in range(self.size)]
        with lost_peers():
            dist.all_gather(pieces, mine)
        parts = [
            pieces[rank][: length * width * rows.element_size()].view(rows.dtype) for rank, length in enumerate(shares)
        ]
        return torch.cat(parts).view(count, *rows.shape[1:])


def _tokens(group: InputGroup) -> list[int]:
    return [group.tokens, *(one.tokens for one in group.sums)]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group consecutive tensors into buckets of at most ``_BUCKET_BYTES``; a larger tensor is a bucket of its own."""
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and filled + tensor.nbytes > _BUCKET_BYTES:
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.nbytes
    if bucket:
        yield bucket


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class LostPeerError(ResourceError):
    """Another process of the run has ended, or its connection is lost."""


@contextmanager
def lost_peers() -> Iterator[None]:
    """Raise :class:`LostPeerError` in place of the errors with which a collective reports that a process is lost."""
    try:
        yield
    except (RuntimeError, dist.DistBackendError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise LostPeerError(LOST) from error
