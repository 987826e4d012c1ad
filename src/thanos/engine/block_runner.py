"""Forward passes of single blocks over all calibration sequences, in batches that fit in the device's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thanos.engine.activations import Activations, choose_tier
from thanos.engine.block_calls import BlockCalls
from thanos.engine.data_flow import DataFlow
from thanos.engine.early_end import stopping_after, stopping_at
from thanos.engine.stream_states import StreamStates
from thanos.errors import ResourceError
from thanos.model.attention import fast_attention
from thanos.model.layers import LinearLayer
from thanos.system.memory import free_device_bytes

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Largest number of tokens in a forward pass. More use more memory and gain little speed: a CPU's caches cannot hold them."""

_BATCH_FRACTION = 0.7
"""Fraction of the device's free memory that one batch may use. The rest is for the next batch and the next block's weights."""


@dataclass(frozen=True, slots=True)
class Step:
    """Progress of a propagating pass.

    Attributes:
        done: number of sequences whose outputs are stored.
        note: a warning for the user, one line; empty if there is none.
    """

    done: int
    note: str = ""


class Passes(StreamStates):
    """Runs blocks over the calibration sequences, and keeps the sequences' hidden states between blocks.

    Args:
        model: the meta model.
        blocks: its decoder blocks.
        ids: calibration token ids, (samples, T) int64, on the CPU.
        device: device on which the blocks run.
        folder: folder for the file of hidden states, if they are kept on the disk.
        tier: storage tier of the hidden states; see :func:`~thanos.engine.activations.choose_tier`.
        data_flow: the model's data flow; default: computed by :meth:`record`.

    Attributes:
        batch: number of sequences in a forward pass; the last bits of results depend on it. None until the first pass, which
            chooses it by a number of tokens, on CUDA also by free memory. A resumed run sets it to the size in the journal.
        starts: batch sizes of the last propagating pass: pairs (first sequence, batch size), each valid from that sequence
            on. More than one pair if the device ran out of memory during the pass.
        fits: number of sequences that fit in the device's memory together, as measured; None before, and on the CPU.
        streams: number of streams of hidden states that one batch may hold at the same time: 2 with a dense stream.
        buffers: see :class:`~thanos.engine.stream_states.StreamStates`.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        ids: Tensor,
        device: torch.device,
        folder: Path,
        *,
        tier: str = "auto",
        data_flow: DataFlow | None = None,
    ) -> None:
        super().__init__(ids, device, folder, tier)
        self._model, self._blocks = model, blocks
        self.batch: int | None = None
        self.starts: list[tuple[int, int]] = []
        self.fits: int | None = None
        self.streams = 1
        self._calls = BlockCalls(blocks, data_flow)
        self._own_calls: BlockCalls | None = None

    def record(self) -> None:
        """Run the modules before the first block on every sequence; keep the first block's inputs and all blocks' arguments."""
        for index in range(len(self._ids)):
            hidden = self._calls.record(self._model, self._row(index))
            if self.streams > 1 and self._calls.shares:
                # The values that blocks store for later blocks differ between the streams.
                self._own_calls = self._own_calls or BlockCalls(self._blocks, self._calls.data_flow)
                self._own_calls.record(self._model, self._row(index))
            if self._states is None:
                needed = hidden.nbytes * len(self._ids)
                tier = choose_tier(needed, self._device, self._folder, self._tier_setting)
                self._states = Activations(len(self._ids), hidden, tier, self._device, self._folder, self.boundary)
            self._states.write(index, hidden)

    def reaches(self, index: int) -> bool:
        """Return whether text reaches block ``index``. The model never calls the others, so the loop skips them."""
        return self._calls.reaches(index)

    @property
    def shares(self) -> bool:
        """Whether blocks store values for later blocks, so that every module must run in each pass."""
        return self._calls.shares

    def settle_batch(self, index: int) -> None:
        """Choose the batch size if there is none yet. On CUDA that runs the block, so call it before hooks are registered."""
        self.settled(index)

    def observe(
        self, index: int, layers: Sequence[LinearLayer], most: int | None = None, calls: Sequence[str] = ()
    ) -> Iterator[int]:
        """Run block ``index`` only for the hooks on ``layers``; yield the number of finished sequences after each batch.

        From the second batch on, the pass ends when the inputs of all these layers have been seen. The rest of the block would
        be discarded. With ``calls``, the names of the layers in the order of their calls, the first batch ends early too, at
        the last of ``layers``. With ``most``, the pass stops after the batch that brings the finished sequences to this number.
        Call :meth:`settle_batch` before you register the hooks. After a torch.OutOfMemoryError start again with :meth:`halve`.
        """
        size = self.settled(index)
        names = [layer.name for layer in layers]
        with stopping_after(layers, calls=list(calls)) as batch_ended:
            for first, hidden in self._activations.batches(size):
                with self.branches.used(first, len(hidden), names):
                    self.observe_batch(index, hidden, first)
                batch_ended()
                done = first + len(hidden)
                yield done
                if most is not None and done >= most:
                    return

    def observe_batch(self, index: int, hidden: Tensor, first: int) -> None:
        """Run block ``index`` like :meth:`run`, only for the hooks on it; a hook may end the pass."""
        with fast_attention(self._device, hidden.dtype):
            self._calls.observe(index, hidden, first)

    def run(self, index: int, hidden: Tensor, first: int | Sequence[int], *, keep: bool = False) -> Tensor:
        """See :meth:`~thanos.engine.block_calls.BlockCalls.run`; with the fast attention kernels."""
        with fast_attention(self._device, hidden.dtype):
            return self._calls.run(index, hidden, first, keep=keep)

    def run_other(self, index: int, hidden: Tensor, first: int, *, keep: bool = False) -> Tensor:
        """The same as :meth:`run` for another stream: values that its blocks store for later blocks are kept separately."""
        with fast_attention(self._device, hidden.dtype):
            return (self._own_calls or self._calls).run(index, hidden, first, keep=keep)

    def observe_other(self, index: int, hidden: Tensor, first: int) -> None:
        """The same as :meth:`run_other`, only for the hooks on the block; a hook may end the pass."""
        with fast_attention(self._device, hidden.dtype):
            (self._own_calls or self._calls).observe(index, hidden, first)

    def propagate(self, index: int, starts: Sequence[tuple[int, int]] = ()) -> Iterator[Step]:
        """Run block ``index``; its outputs become the next block's inputs. Yield a step after each batch.

        If the device runs out of memory, the batch size is halved for the failed batch and all later ones, and a step with a
        note reports it.

        Args:
            index: index of the block.
            starts: batch sizes of an earlier pass, as in :attr:`starts`. With them the outputs equal that pass's bit for bit.

        Raises:
            ResourceError: one sequence does not fit.
        """
        self.starts = []

        def run(index: int, hidden: Tensor, first: int) -> Tensor:
            with self.branches.used(first, len(hidden), keep=False):
                return self.run(index, hidden, first, keep=True)

        yield from self.through(index, self._activations, self._activations, run, starts, self.starts)

    def through(
        self,
        index: int,
        source: Activations,
        target: Activations,
        run: Callable[[int, Tensor, int], Tensor],
        starts: Sequence[tuple[int, int]],
        used: list[tuple[int, int]],
    ) -> Iterator[Step]:
        """Run block ``index`` on all sequences of ``source``, and store the outputs in ``target``, which may be ``source``.

        Args:
            index: index of the block.
            source: the inputs.
            target: storage for the outputs.
            run: function that runs the block and keeps the values that it stores; see :meth:`run`.
            starts: see :meth:`propagate`.
            used: the batch sizes are added to this list, in the form of :attr:`starts`.

        Raises:
            ResourceError: one sequence does not fit.
        """
        sizes, first = dict(starts), 0
        while first < len(self._ids):
            self.batch = sizes.get(first, self.batch)
            size = self.settled(index)
            end = min((start for start in sizes if start > first), default=len(self._ids))
            used.append((first, size))
            try:
                for begin, hidden in source.batches(size, first):
                    target.write(begin, run(index, hidden, begin))
                    first = begin + len(hidden)
                    yield Step(first)
                    if first >= end:
                        break
            except torch.OutOfMemoryError as error:
                line = self.halve(error)
                yield Step(first, line)
        target.flush()

    def observe_tail(self, layer: LinearLayer, most: int | None = None) -> Iterator[int]:
        """Run the modules after the blocks up to the input of ``layer``, one sequence at a time, for the hooks on it.

        Yield the number of finished sequences. With ``most``, stop when this many are finished.
        """
        with stopping_at(layer):
            for index, hidden in self._activations.batches(1):
                self.observe_tail_of(index, hidden)
                yield index + 1
                if index + 1 == most:
                    return

    def observe_tail_of(self, index: int, hidden: Tensor) -> Any:
        """Run the modules after the blocks on sequence ``index``, for the hooks on them; return what the model returns.

        Args:
            index: the sequence.
            hidden: the last block's outputs, (1, T, d); those of some tokens suffice.
        """
        return self._calls.run_tail(self._model, self._row(index)[:, : hidden.shape[1]], hidden)

    def halve(self, error: torch.OutOfMemoryError) -> str:
        """Halve the batch size after ``error``; return the note for the user.

        Raises:
            ResourceError: a batch is one sequence already.
        """
        if self.batch is None or self.batch <= 1:
            raise self._too_small() from error
        before, self.batch = self.batch, self.batch // 2
        error.__traceback__ = None  # its frames refer to the failed batch and would keep it in memory
        torch.cuda.empty_cache()
        return f"out of memory on the device: batches of {before} sequences become batches of {self.batch}"

    def batches_that_fit(self, index: int) -> int:
        """Measure the block's peak memory for one sequence; return how many sequences fit in addition to the Hessians."""
        columns = [module.in_features for module in self._blocks[index].modules() if isinstance(module, nn.Linear)]
        # One (b, b) float32 Hessian per linear layer, plus one of the widest layer for copies and matrix products.
        hessians = 4 * (sum(size**2 for size in columns) + max(columns, default=0) ** 2)
        hidden = self._example(self._activations)
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            self.run(index, hidden, 0)
        except torch.OutOfMemoryError as error:
            raise self._too_small() from error
        torch.cuda.synchronize(self._device)
        taken = torch.cuda.max_memory_allocated(self._device) - before + 2 * hidden.nbytes
        return int(_BATCH_FRACTION * (free_device_bytes(self._device) - hessians) / (taken * self.streams))

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _too_small(self) -> ResourceError:
        return ResourceError(
            f"out of memory on the device with one sequence of {self._ids.shape[1]} tokens: lower --sequence-length, or use a "
            "device with more memory or --device cpu"
        )

    @staticmethod
    def _example(states: Activations) -> Tensor:
        return next(hidden for _, hidden in states.batches(1))

    def settled(self, index: int) -> int:
        """Return the batch size; see :meth:`settle_batch`."""
        if self.batch is None:
            self.batch = most_sequences(*self.shape, self._device)
            if self._device.type == "cuda":
                self.fits = max(1, self.batches_that_fit(index))
                self.batch = min(self.batch, self.fits)
        return self.batch


def most_sequences(samples: int, length: int, device: torch.device) -> int:
    """Return the number of sequences in a forward pass if memory does not limit it."""
    return min(samples, max(1, BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]) // length))
