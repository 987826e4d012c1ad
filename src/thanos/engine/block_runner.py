"""Forward passes of single blocks over all calibration sequences, in batches that fill the device and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from thanos.engine.activations import Activations, choose_place
from thanos.engine.block_calls import BlockCalls, stop
from thanos.engine.picture import Picture
from thanos.errors import ResourceError
from thanos.model.attention import fast_attention
from thanos.model.layers import LinearLayer
from thanos.system.memory import free_device_bytes

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Most tokens of a forward pass. More take memory, and are expected to gain little; on the CPU they
leave its caches."""

_BATCH_SHARE = 0.7
"""Share of the device's free memory that one batch may take; the next batch and the next block's weights come beside it."""


class Passes:
    """Runs blocks over the calibration sequences, whose hidden states it keeps between blocks.

    Args:
        model: the meta model.
        blocks: its decoder blocks.
        ids: calibration token ids, (samples, T) int64, on the CPU.
        device: where blocks run.
        folder: where a file of hidden states may be made.
        place: for the hidden states; see :func:`~thanos.engine.activations.choose_place`.
        picture: what text does in the model; default: drawn by :meth:`record`.

    Attributes:
        batch: sequences of a forward pass; results depend on it in their last bits. None until the first pass, which chooses
            it by memory; a resumed run sets what it was.
        starts: (first sequence, batch size) from which that size held, in the last propagating pass: more than one entry where
            the device ran out of memory on the way.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        ids: Tensor,
        device: torch.device,
        folder: Path,
        *,
        place: str = "auto",
        picture: Picture | None = None,
    ) -> None:
        self._model, self._blocks, self._ids, self._device, self._folder = model, blocks, ids, device, folder
        self._asked = place
        self.batch: int | None = None
        self.starts: list[tuple[int, int]] = []
        self._calls = BlockCalls(blocks, picture)
        self._states: Activations | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(samples, T)."""
        samples, length = self._ids.shape
        return samples, length

    @property
    def place(self) -> str:
        """Where the hidden states are kept."""
        return "" if self._states is None else self._states.place

    @property
    def state_bytes(self) -> int:
        """Bytes of the hidden states of all sequences."""
        return 0 if self._states is None else self._states.nbytes

    def record(self) -> None:
        """Run what comes before the first block, for every sequence; keep that block's inputs and all arguments."""
        for index in range(len(self._ids)):
            hidden = self._calls.record(self._model, self._row(index))
            if self._states is None:
                needed = hidden.nbytes * len(self._ids)
                place = choose_place(needed, self._device, self._folder, self._asked)
                self._states = Activations(len(self._ids), hidden, place, self._device, self._folder)
            self._states.write(index, hidden)

    def reaches(self, index: int) -> bool:
        """Tell whether text reaches block ``index``; where it does not, the hidden states pass it by."""
        return self._calls.reaches(index)

    def settle_batch(self, index: int) -> None:
        """Choose how many sequences go at once; on CUDA that runs the block, so hooks must not listen yet."""
        self._batch_size(index)

    def observe(self, index: int, layers: Sequence[LinearLayer]) -> Iterator[int]:
        """Run block ``index`` for the hooks on ``layers`` alone; yields the number of sequences done.

        A batch ends at the last layer that a hook waits for: what follows in the block, at least that layer's own product,
        would be thrown away.

        Call :meth:`settle_batch` before the hooks are there.

        Raises:
            torch.OutOfMemoryError: the device has no room; start again after :meth:`halve`.
        """
        size = self._batch_size(index)
        with _stopping_after(layers) as batch_ended:
            for first, hidden in self._activations.batches(size):
                with fast_attention(self._device, hidden.dtype):
                    self._calls.observe(index, hidden, first)
                batch_ended()
                yield min(first + size, len(self._ids))

    def propagate(self, index: int, starts: Sequence[tuple[int, int]] = ()) -> Iterator[int | str]:
        """Run block ``index``; its outputs become the next block's inputs. Yields the number of sequences done.

        Where the device has no room, the failed batch and those after it go in halves, and a line saying so is yielded.

        Args:
            index: of the block.
            starts: batch sizes to use, as an earlier pass left them in :attr:`starts`; its outputs come out bit for bit.

        Raises:
            ResourceError: not even one sequence fits.
        """
        sizes, first, self.starts = dict(starts), 0, []
        while first < len(self._ids):
            self.batch = sizes.get(first, self.batch)
            size, end = (
                self._batch_size(index),
                min((start for start in sizes if start > first), default=len(self._ids)),
            )
            self.starts.append((first, size))
            try:
                for begin, hidden in self._activations.batches(size, first):
                    self._activations.write(begin, self._run(index, hidden, begin))
                    first = min(begin + size, len(self._ids))
                    yield first
                    if first >= end:
                        break
            except torch.OutOfMemoryError as error:
                line = self.halve(error)
                yield line
        self._activations.flush()

    def run_tail(self) -> Iterator[int]:
        """Run what follows the blocks, one sequence at a time, until a hook stops it; yields the number done."""
        for index, hidden in self._activations.batches(1):
            self._calls.run_tail(self._model, self._row(index), hidden)
            yield index + 1

    def halve(self, error: torch.OutOfMemoryError) -> str:
        """Make batches half as large after ``error``; return a line that says so.

        Raises:
            ResourceError: a batch is one sequence already, or batches must stay as they are.
        """
        if self.batch is None or self.batch <= 1:
            raise self._too_small() from error
        if self._calls.shares and self.starts:  # what earlier blocks left for later ones is that of the batches of then
            raise ResourceError(
                f"out of memory on the device with batches of {self.batch} sequences, which this model does not let become "
                "smaller on the way: lower --samples or --sequence-length"
            ) from error
        before, self.batch = self.batch, self.batch // 2
        error.__traceback__ = None  # its frames hold the failed batch, which would stay in memory
        torch.cuda.empty_cache()
        return f"out of memory on the device: batches of {before} sequences become batches of {self.batch}"

    def spill(self) -> str | None:
        """Move the hidden states from the device to the host; return a line that says so, None where they are not there."""
        states = self._activations
        if states.place != "device":
            return None
        place = choose_place(states.nbytes, torch.device("cpu"), self._folder)
        moved = Activations(len(self._ids), self._example(states), place, self._device, self._folder)
        for first, hidden in states.batches(1):
            moved.write(first, hidden)
        moved.flush()
        states.close()
        self._states = moved
        torch.cuda.empty_cache()
        return f"out of memory on the device: the activations move to the {place}"

    def batches_that_fit(self, index: int) -> int:
        """Measure what one sequence takes on its way through the block; return how many fit beside the Hessians."""
        columns = [module.in_features for module in self._blocks[index].modules() if isinstance(module, nn.Linear)]
        # As much again as the widest for what copying and multiplying may take beside them.
        hessians = 4 * (sum(size**2 for size in columns) + max(columns, default=0) ** 2)
        hidden = self._example(self._activations)
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            self._run(index, hidden, 0)
        except torch.OutOfMemoryError as error:
            raise self._too_small() from error
        torch.cuda.synchronize(self._device)
        taken = torch.cuda.max_memory_allocated(self._device) - before + 2 * hidden.nbytes
        return int(_BATCH_SHARE * (free_device_bytes(self._device) - hessians) / taken)

    def close(self) -> None:
        """Let the hidden states go."""
        if self._states is not None:
            self._states.close()

    # --- helpers ----------------------------------------------------------------------------------------------------

    @property
    def _activations(self) -> Activations:
        assert self._states is not None
        return self._states

    def _run(self, index: int, hidden: Tensor, first: int) -> Tensor:
        with fast_attention(self._device, hidden.dtype):
            return self._calls.run(index, hidden, first)

    def _too_small(self) -> ResourceError:
        return ResourceError(
            f"out of memory on the device with one sequence of {self._ids.shape[1]} tokens: lower --sequence-length, or use a "
            "device with more memory or --device cpu"
        )

    def _row(self, index: int) -> Tensor:
        return self._ids[index : index + 1].to(self._device)

    @staticmethod
    def _example(states: Activations) -> Tensor:
        return next(hidden for _, hidden in states.batches(1))

    def _batch_size(self, index: int) -> int:
        if self.batch is None:
            self.batch = most_sequences(*self.shape, self._device)
            if self._device.type == "cuda":
                self.batch = max(1, min(self.batch, self.batches_that_fit(index)))
        return self.batch


def most_sequences(samples: int, length: int, device: torch.device) -> int:
    """Return the sequences of a forward pass where memory does not limit them."""
    return min(samples, max(1, BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]) // length))


@contextmanager
def _stopping_after(layers: Sequence[LinearLayer]) -> Iterator[Callable[[], None]]:
    """Learn from the first batch which of the layers is called last, and end later batches there.

    Only where the first batch called every layer once, and none of them is an expert's, whose calls depend on the tokens:
    otherwise something else in the block may still be waited for.
    """
    called: list[str] = []
    handles = [
        layer.module.register_forward_pre_hook(lambda *_, layer=layer: called.append(layer.name)) for layer in layers
    ]
    learned = False

    def batch_ended() -> None:
        nonlocal learned
        if learned:
            return
        learned = True
        while handles:
            handles.pop().remove()
        experts = any(layer.expert for layer in layers)
        if called and not experts and len(called) == len(layers) and set(called) == {layer.name for layer in layers}:
            last = next(layer for layer in layers if layer.name == called[-1])
            handles.append(last.module.register_forward_pre_hook(lambda *_: stop()))

    try:
        yield batch_ended
    finally:
        for handle in handles:
            handle.remove()
