"""The guard of a training: it measures the loss on held-out sequences, and keeps the state with the smallest loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from thanos.engine.distributed import World

HELD_OUT = "held_out"
"""Key of the held-out loss in an entry of the history."""

KINDS = (f"{HELD_OUT}_text", f"{HELD_OUT}_generated")
"""Keys of the losses on the held-out sequences of the text, and on those that the dense model generated."""

ON_DEVICE_BYTES = 2 << 30
"""Size in bytes up to which the best state is kept on the device. A larger state is copied to the host, which takes longer."""


class Guard:
    """The history of the held-out loss, and the state with the smallest loss.

    A state is measured with its weights rounded to the dtypes of the checkpoint, as they would be written.

    Args:
        ids: token ids of all sequences, (n, T), on the CPU.
        first: index of the first held-out sequence; it and all after it are held out.
        generated: number of sequences, the last ones, that the dense model generated to hold them out.
        dtypes: parameter name → dtype in which the checkpoint stores it.
        size: number of sequences in a forward pass.
        device: device of the training.
        world: the processes; each measures a part of the sequences.
        write: function that writes a state to the disk; its arguments are the step and pairs of parameter name and tensor.
            None in processes that write nothing.
        history: the measurements before the interruption if the run is resumed, otherwise empty.

    Attributes:
        history: measurements in order: ``step``, ``epoch``, ``loss`` (mean training loss of the epoch, None for step 0) and
            ``held_out`` (nats per token; None if it is NaN or infinite); with generated sequences also :data:`KINDS`.
    """

    def __init__(
        self,
        ids: Tensor,
        first: int,
        generated: int,
        dtypes: Mapping[str, torch.dtype],
        size: int,
        device: torch.device,
        world: World,
        write: Callable[[int, Iterable[tuple[str, Tensor]]], None] | None,
        history: list[dict[str, Any]],
    ) -> None:
        self._ids, self._dtypes, self._size, self._device = ids, dtypes, size, device
        text = len(ids) - generated
        self._kinds = [rows for rows in (range(first, text), range(text, len(ids))) if rows]
        self._world, self._write = world, write
        self.history = list(history)
        self._unwritten: tuple[int, dict[str, Tensor]] | None = None

    @property
    def best(self) -> dict[str, Any]:
        """The measurement with the smallest held-out loss; of equal ones the first. Step 0 is the model before training."""
        return min(self.history, key=lambda entry: math.inf if entry[HELD_OUT] is None else entry[HELD_OUT])

    def measure(self, module: nn.Module, prefix: str, step: int, epoch: int, loss: float | None) -> dict[str, Any]:
        """Measure the held-out loss, add it to the history, and keep the state if it is the best so far.

        Args:
            module: the module in training; its forward returns the loss of token ids.
            prefix: prefix of the parameter names in the module.
            step: number of finished steps.
            epoch: number of finished epochs.
            loss: mean training loss of the epoch.

        Returns:
            The entry of the history.
        """
        parameters = {name: module.get_parameter(f"{prefix}{name}") for name in self._dtypes}
        with torch.no_grad(), _rounded(parameters, self._dtypes):
            totals = [self._total(module, rows) for rows in self._kinds]
            losses = {HELD_OUT: sum(totals) / sum(map(len, self._kinds))}
            if len(totals) > 1:
                means = (total / len(rows) for total, rows in zip(totals, self._kinds, strict=True))
                losses |= dict(zip(KINDS, means, strict=True))
            finite = {name: value if math.isfinite(value) else None for name, value in losses.items()}
            entry: dict[str, Any] = {"step": step, "epoch": epoch, "loss": loss, **finite}
            self.history.append(entry)
            if step and self.best is entry and entry[HELD_OUT] is not None:
                self._unwritten = (step, self._copies(parameters))
        return entry

    def store(self) -> None:
        """Write the best state to the disk, unless it was written before."""
        if self._unwritten is not None and self._write is not None:
            step, tensors = self._unwritten
            self._write(step, tensors.items())
        self._unwritten = None

    @property
    def unwritten(self) -> Mapping[str, Tensor] | None:
        """The best state by parameter name, in the checkpoint's dtypes. None if it is on the disk, or is the original model."""
        return None if self._unwritten is None else self._unwritten[1]

    def _total(self, module: nn.Module, sequences: range) -> float:
        """Return the sum of the losses of some sequences, each in nats per token."""
        count = len(sequences)
        share = self._world.share(count)
        # Sharded weights need the same number of passes in every process. A process without a sequence left runs one whose loss
        # is not added.
        passes = math.ceil(math.ceil(count / self._world.size) / self._size)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for number in range(passes):
            first = share.start + number * self._size
            rows = range(first, min(first + self._size, share.stop))
            numbers = sequences.start + torch.tensor(list(rows) or [0])
            loss = module(self._ids[numbers].to(self._device), numbers.to(self._device)).double()
            total += len(rows) * loss if len(rows) else 0.0
        return float(self._world.sum_(total))

    def _copies(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies in the checkpoint's dtypes. It is empty in processes that write nothing: they only send shards."""
        size = sum(p.numel() * self._dtypes[name].itemsize for name, p in parameters.items())
        device = self._device if size <= ON_DEVICE_BYTES else torch.device("cpu")
        copies = {}
        for name, parameter in parameters.items():
            tensor = whole(parameter.detach())
            if self._write is not None:
                copies[name] = tensor.to(device, self._dtypes[name], copy=True)
        return copies


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor for a tensor that may be sharded over processes. All processes must call it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


@contextmanager
def _rounded(parameters: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Round parameters to the dtypes in which they are stored, and restore them afterwards."""
    exact = {name: p.detach().clone() for name, p in parameters.items() if dtypes[name] != p.dtype}
    try:
        for name in exact:
            parameters[name].copy_(parameters[name].to(dtypes[name]))
        yield
    finally:
        for name, value in exact.items():
            parameters[name].copy_(value)
