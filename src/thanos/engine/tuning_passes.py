"""Passes of a block that is tuned: its error on given sequences, and the gradients of a batch, in parts that fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from thanos.engine.block_error import token_errors
from thanos.engine.block_runner import BATCH_TOKENS
from thanos.engine.distributed import World
from thanos.engine.tuned_parameters import Masters, Tunable
from thanos.system.memory import free_device_bytes

BATCH = 8
"""Number of sequences in a step of tuning, over all processes."""

FREE_FRACTION = 0.7
"""Fraction of the device's free memory that the activations of one pass may use."""


class Forward(Protocol):
    """A block as a function of its parameters."""

    def __call__(self, parameters: Mapping[str, Tensor], hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the block's outputs, (B, T, d).

        Args:
            parameters: parameter name → value, for those that differ from the block's own. In training they are float32
                whatever dtype the block holds.
            hidden: inputs, (B, T, d); float32 in training.
            rows: indices of the batch among this process's sequences, B of them.
        """
        ...


Reader = Callable[[Sequence[Sequence[int]]], Iterator[tuple[Tensor, Tensor]]]
"""Takes lists of rows; yields the inputs and the wanted outputs of each list, both (B, T, d) on the device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A block to tune, and its sequences.

    A position is the index of a sequence among those of all processes; a row is its index among those of this process.

    Attributes:
        forward: the block.
        tunables: the parameters to tune, with their current values.
        read: reader of this process's sequences.
        training: positions of the sequences to train on.
        held_out: positions of the sequences on which the error is measured, and nothing is trained.
        mine: positions of this process's sequences; row r is position ``mine[r]``.
        device: device of the parameters.
        by_token: whether the error is the mean of the tokens' relative errors, not that of all tokens together.
    """

    forward: Forward
    tunables: Sequence[Tunable]
    read: Reader
    training: Sequence[int]
    held_out: Sequence[int]
    mine: range
    device: torch.device
    by_token: bool = False

    def rows(self, positions: Sequence[int]) -> list[int]:
        """Return the rows of those positions that this process holds."""
        return [position - self.mine.start for position in positions if position in self.mine]


@dataclass(frozen=True, slots=True)
class Measured:
    """Sums over the sequences of all processes.

    Attributes:
        difference: ‖F(X̂) − F*(X*)‖²; by token, the sum of the tokens' relative squared errors.
        power: ‖F*(X*)‖²; by token, the number of tokens.
        entries: number of entries of F*(X*); by token, the number of tokens.
    """

    difference: float
    power: float
    entries: float

    @property
    def error(self) -> float:
        """The relative error, ``difference / power``; 0 if both are 0, infinite if only the power is."""
        if self.power:
            return self.difference / self.power
        return math.inf if self.difference else self.difference

    @property
    def mean_square(self) -> float:
        """Mean square of the wanted outputs; by token 1."""
        return self.power / self.entries


class TuningPasses:
    """Runs a block on batches.

    Args:
        work: the block and its sequences.
        world: the processes that share the work.

    Attributes:
        size: largest number of sequences in one pass with gradients. None until the first one. Only the last bits of the
            gradients depend on it.
    """

    def __init__(self, work: Work, world: World) -> None:
        self._work, self._world = work, world
        self.size: int | None = None

    def read(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], Tensor | None, Tensor | None]]:
        """Yield each batch of positions with this process's inputs and wanted outputs; None for both if it has none."""
        rows = [self._work.rows(batch) for batch in batches]
        reader = self._work.read([some for some in rows if some])
        for batch, some in zip(batches, rows, strict=True):
            yield (batch, *next(reader)) if some else (batch, None, None)

    def measure(
        self, parameters: Mapping[str, Tensor], positions: Sequence[int], *, training: bool = False
    ) -> Measured:
        """Measure the block's error on sequences of all processes at ``positions``.

        ``parameters`` are as for :class:`Forward`; empty for the block as it is. With ``training``, the block runs in float32
        or mixed precision, as in training.
        """
        device = self._work.device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for batch, inputs, targets in self.read(_consecutive(positions, BATCH)):
            if inputs is None or targets is None:
                continue
            rows = self._work.rows(batch)
            for part in _slices(len(rows), max(1, BATCH_TOKENS[device.type] // inputs.shape[1])):
                hidden, wanted = inputs[part], targets[part].float()
                with torch.no_grad(), deterministic(device), precision(device) if training else nullcontext():
                    outputs = self._work.forward(parameters, hidden.float() if training else hidden, rows[part])
                errors = squared_errors(outputs.float(), wanted, by_token=self._work.by_token)
                sums[0] += errors.sum(dtype=torch.float64)
                sums[1] += errors.numel() if self._work.by_token else wanted.square().sum(dtype=torch.float64)
                sums[2] += errors.numel()
        return Measured(*self._world.sum_(sums).tolist())

    def gradients(
        self, masters: Masters, batch: Sequence[int], inputs: Tensor | None, targets: Tensor | None, mean_square: float
    ) -> Tensor:
        """Set the gradients of a batch's loss, the mean of :func:`squared_errors` of all processes divided by ``mean_square``.

        Args:
            masters: the parameters.
            batch: positions of the batch's sequences.
            inputs: inputs of this process's sequences among them, (B, T, d); None if it has none.
            targets: their wanted outputs.
            mean_square: divisor of the mean: :attr:`Measured.mean_square` of typical sequences.

        Returns:
            The loss, a scalar on the device.
        """
        loss = torch.zeros((), dtype=torch.float32, device=self._work.device)
        masters.gradient.zero_()
        if inputs is not None and targets is not None:
            entries = targets[0, :, 0].numel() if self._work.by_token else targets[0].numel()
            scale = 1.0 / (mean_square * entries * len(batch))
            loss = self._backward(masters, inputs, targets, self._work.rows(batch), scale)
        if self._world.size > 1:
            self._world.sum_(masters.gradient)
            self._world.sum_(loss)
        return loss

    def _backward(self, masters: Masters, inputs: Tensor, targets: Tensor, rows: list[int], scale: float) -> Tensor:
        """Add the gradients of this process's sequences; return the sum of their losses. Halve the parts if memory runs out."""
        if self.size is None:
            self.size = self._fitting(masters, inputs[:1], targets[:1], rows[:1])
        while True:
            try:
                parts = [
                    self._backward_part(masters, inputs[part], targets[part], rows[part], scale)
                    for part in _slices(len(rows), self.size)
                ]
                return torch.stack(parts).sum()
            except torch.OutOfMemoryError:
                if self.size <= 1:
                    raise
            # Outside the except block: inside it, the error's traceback still refers to the failed pass.
            self.size = min(self.size, len(rows)) // 2 or 1
            masters.gradient.zero_()
            torch.cuda.empty_cache()

    def _backward_part(
        self, masters: Masters, inputs: Tensor, targets: Tensor, rows: list[int], scale: float
    ) -> Tensor:
        device = self._work.device
        with torch.enable_grad(), deterministic(device):
            with precision(device):
                outputs = self._work.forward(masters.leaves, inputs.float(), rows)
            loss = squared_errors(outputs.float(), targets.float(), by_token=self._work.by_token).sum() * scale
            loss.backward()
        return loss.detach()

    def _fitting(self, masters: Masters, inputs: Tensor, targets: Tensor, rows: list[int]) -> int:
        """Return how many sequences fit in one pass with gradients: by measured memory on CUDA, by a fixed rule on the CPU."""
        device = self._work.device
        if device.type != "cuda":  # fixed, since a resumed run must end in the same bits
            return max(1, BATCH_TOKENS["cpu"] // inputs.shape[1])
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self._backward_part(masters, inputs, targets, rows, 1.0)
        torch.cuda.synchronize(device)
        taken = torch.cuda.max_memory_allocated(device) - before
        masters.gradient.zero_()
        return max(1, min(BATCH, int(FREE_FRACTION * free_device_bytes(device) / max(1, taken))))


def squared_errors(outputs: Tensor, wanted: Tensor, *, by_token: bool) -> Tensor:
    """Return the entries' squared errors, (B, T, d); with ``by_token`` the tokens' relative squared errors, (B, T)."""
    errors = (outputs - wanted).square()
    return token_errors(errors.sum(-1), wanted.square().sum(-1)) if by_token else errors


def precision(device: torch.device) -> AbstractContextManager[object]:
    """Return the context of passes in training: float32; on CUDA, if it has bfloat16, products in bfloat16."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On the CPU, select deterministic kernels. Otherwise some sums of a backward pass are atomic additions of threads."""
    if device.type != "cpu":
        yield
        return
    switch: Any = torch.utils.deterministic  # the type stubs lack its one property
    mode, fills = torch.get_deterministic_debug_mode(), switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = False  # it would cost time, and nothing reads such memory
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        switch.fill_uninitialized_memory = fills


def _slices(count: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _consecutive(positions: Sequence[int], size: int) -> list[Sequence[int]]:
    return [positions[first : first + size] for first in range(0, len(positions), size)]
