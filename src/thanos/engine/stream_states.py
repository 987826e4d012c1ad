"""The hidden states of a stream between two blocks: of all calibration sequences of this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from thanos.engine.activations import Activations, choose_tier, has_spare_room
from thanos.engine.branches import BranchInputs


class StreamStates:
    """The hidden states of all sequences in one stream, and storage for further streams.

    Args:
        ids: calibration token ids, (samples, T) int64, on the CPU.
        device: device on which the blocks run.
        folder: folder for the file of hidden states, if they are kept on the disk.
        tier: storage tier of the hidden states; see :func:`~thanos.engine.activations.choose_tier`.

    Attributes:
        buffers: number of buffers of hidden states of all sequences: one, or three with a dense stream.
        boundary: index of a sequence with which a batch must begin, namely the first held-out one; None for no such limit. It
            is set before :meth:`record` if a block runs several times: then no batch mixes held-out sequences with others, so
            that each pass has the same batches.
        planned_samples: number of sequences for which the inputs of a branch must fit in memory to be kept. None for the
            sequences of this object. A trial sets it to the number of the planned run.
        branches: the kept inputs of branches in this stream.
    """

    def __init__(self, ids: Tensor, device: torch.device, folder: Path, tier: str) -> None:
        self._ids, self._device, self._folder, self._tier_setting = ids, device, folder, tier
        self._states: Activations | None = None
        self.buffers = 1
        self.boundary: int | None = None
        self.planned_samples: int | None = None
        self._all_branches: list[BranchInputs] = []
        self.branches = self.new_branches()

    @property
    def shape(self) -> tuple[int, int]:
        """Number of sequences, and their length in tokens: (samples, T)."""
        samples, length = self._ids.shape
        return samples, length

    @property
    def tier(self) -> str:
        """Storage tier of the hidden states; empty before :meth:`record`."""
        return "" if self._states is None else self._states.tier

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states."""
        return self._activations.dtype

    @property
    def state_bytes(self) -> int:
        """Size of the hidden states of all sequences in all buffers, in bytes; 0 before :meth:`record`."""
        return 0 if self._states is None else self._states.nbytes * self.buffers

    @property
    def device(self) -> torch.device:
        """Device on which the blocks run."""
        return self._device

    def batches(self, size: int, first: int = 0, end: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the batch's first sequence, hidden states (≤ size, T, d) on the device), for sequences [first, end).

        Do not modify the states.
        """
        return self._activations.batches(size, first, end)

    def gather(self, batches: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """Yield the hidden states (B, T, d) of each list of sequences, on the device."""
        return self._activations.gather(batches)

    def storage_like(self) -> Activations:
        """Return storage for another stream of hidden states of all sequences, in the tier that has room."""
        states = self._activations
        return states.empty_like(
            choose_tier(states.nbytes, self._device, self._folder, self._tier_setting), self._folder
        )

    def new_branches(self) -> BranchInputs:
        """Return storage for the kept branch inputs of a stream. This object counts, spills and closes all these storages."""
        self._all_branches.append(BranchInputs(self._spare))
        return self._all_branches[-1]

    @property
    def branch_bytes(self) -> list[int]:
        """Bytes of each storage of kept branch inputs, of all streams. :meth:`close` does not change them."""
        return [size for branches in self._all_branches for size in branches.sizes]

    @property
    def kept_bytes(self) -> int:
        """Bytes of the storage of kept branch inputs that exists now, of all streams together."""
        return sum(branches.nbytes for branches in self._all_branches)

    def close_branches(self) -> None:
        """Forget the kept branch inputs of all streams, and free their memory."""
        for branches in self._all_branches:
            branches.close()

    def _spare(self, like: Tensor) -> Activations | None:
        """Return storage for other states of all sequences, from those of one, in the tier of the hidden states.

        None if memory has no room, see :func:`~thanos.engine.activations.has_spare_room`, or the tier is the disk: reading
        from it takes about as long as computing again.
        """
        tier, needed = self._activations.tier, like.nbytes * (self.planned_samples or len(self._ids))
        if tier == "disk" or not has_spare_room(tier, needed, self._device):
            return None
        return Activations(len(self._ids), like, tier, self._device, self._folder, self.boundary)

    def copied(self) -> Activations:
        """Return a copy of the hidden states of all sequences."""
        copy = self.storage_like()
        copy.fill_from(self._activations)
        return copy

    def off_device(self, states: Activations) -> Activations:
        """Return the same hidden states in host memory or on the disk, and free ``states``, which are on the device."""
        tier = choose_tier(states.nbytes, torch.device("cpu"), self._folder)
        moved = states.empty_like(tier, self._folder)
        moved.fill_from(states)
        states.close()
        return moved

    def spill(self) -> str | None:
        """Move the hidden states from the device to host memory or disk; return a note for the user, else None.

        The kept branch inputs are forgotten.
        """
        self.close_branches()
        states = self._activations
        if states.tier != "device":
            return None
        self._states = moved = self.off_device(states)
        torch.cuda.empty_cache()
        return f"out of memory on the device: the activations move to the {moved.tier}"

    def close(self) -> None:
        """Free the hidden states and the kept inputs of branches."""
        self.close_branches()
        if self._states is not None:
            self._states.close()

    @property
    def _activations(self) -> Activations:
        assert self._states is not None
        return self._states

    def _row(self, index: int) -> Tensor:
        return self._ids[index : index + 1].to(self._device)
