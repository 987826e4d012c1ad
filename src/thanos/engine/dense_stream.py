"""The dense stream: the hidden states of the unpruned model for every calibration sequence, block by block.

It runs in parallel to the pruned stream (:class:`~thanos.engine.block_runner.Passes`) and exists only if a layer's repair needs
it. One block of the model is in memory, in two versions: the dense version keeps the tensors that were loaded from the
checkpoint, and shares them with the pruned version until a stage replaces them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from thanos.engine.activations import Activations
from thanos.engine.block_runner import Passes, Step
from thanos.engine.weights import ModelWeights


class DenseStream:
    """The hidden states of the dense model, X*, and the dense version of the current block, F*.

    Two buffers hold the inputs and the outputs of the current block for all sequences of this process. Their storage tiers are
    chosen like that of the pruned stream.

    Args:
        runner: the pruned stream, before :meth:`~thanos.engine.block_runner.Passes.record`.
        weights: the model's parameters.

    Attributes:
        starts: batch sizes of the pass that gave the current block's outputs; see
            :class:`~thanos.engine.block_runner.Passes`.
        branches: the kept inputs of branches in this stream.
    """

    def __init__(self, runner: Passes, weights: ModelWeights) -> None:
        self._runner, self._weights = runner, weights
        runner.streams, runner.buffers = 2, 3
        self.starts: list[tuple[int, int]] = []
        self.branches = runner.new_branches()
        self._states: Activations | None = None
        self._outputs: Activations | None = None
        self._known = False
        self._dense: dict[str, Tensor] = {}

    # --- use by the loop --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Take the first block's inputs from the pruned stream: up to there, the models are the same."""
        self._states = self._runner.copied()

    def hold(self, names: Sequence[str]) -> None:
        """Take the current values of parameters as the dense version. Call it when they are loaded, before the stages.

        Matrices are shared with the model, so a stage must not modify a parameter in place; vectors are copied.
        """
        self._dense = {}
        for name in names:
            held = self._weights.parameter(name)
            value = held.detach().clone() if held.dim() < 2 else held.detach()
            is_parameter = isinstance(held, nn.Parameter)
            self._dense[name] = nn.Parameter(value, requires_grad=False) if is_parameter else value

    def advance(
        self, index: int, starts: Sequence[tuple[int, int]] = (), beyond: Mapping[int, Sequence[str]] | None = None
    ) -> Iterator[Step]:
        """Compute the outputs of block ``index`` for all sequences; yield a step after each batch.

        ``starts`` and the errors are as for :meth:`~thanos.engine.block_runner.Passes.propagate`. ``beyond`` has
        the blocks right after this one that the pruned model leaves out: index → names of parameters. They run as well, and the
        outputs become those of the last of them.
        """
        self._outputs = self._outputs or self._runner.storage_like()
        self.starts = []

        def run(index: int, hidden: Tensor, first: int) -> Tensor:
            with self.branches.used(first, len(hidden)):
                return self.run(index, hidden, first, keep=True)

        yield from self._runner.through(index, self._inputs, self._outputs, run, starts, self.starts)
        for later, names in (beyond or {}).items():
            self._weights.load(names)
            states, other = self._outputs, partial(self._runner.run_other, keep=True)
            yield from self._runner.through(later, states, states, other, tuple(self.starts), [])
            self._weights.release(names)
        self._known = True

    def turn(self) -> None:
        """Make the outputs the next block's inputs, and free the dense version of the block."""
        assert self._known, "the outputs of the block were not computed"
        self._states, self._outputs, self._known = self._outputs, self._states, False
        self._dense = {}

    def spill(self) -> str | None:
        """Move the hidden states from the device to host memory or disk; return a note for the user, else None."""
        if self.tier != "device":
            return None
        for name in ("_states", "_outputs"):
            states: Activations | None = getattr(self, name)
            if states is not None and states.tier == "device":
                setattr(self, name, self._runner.off_device(states))
        torch.cuda.empty_cache()
        return f"out of memory on the device: the activations of the dense model move to the {self.tier}"

    def close(self) -> None:
        """Free the hidden states and the dense version of the block."""
        for states in (self._states, self._outputs):
            if states is not None:
                states.close()
        self._states = self._outputs = None
        self._dense, self._known = {}, False

    # --- use by the stages ------------------------------------------------------------------------------------------

    @property
    def tier(self) -> str:
        """Storage tier of the hidden states: ``device`` if any of them are there, else that of the inputs."""
        known = [states.tier for states in (self._states, self._outputs) if states is not None]
        return "device" if "device" in known else known[0] if known else ""

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Inside the context, the modules have the parameters of the dense version."""
        with self._weights.replaced(self._dense):
            yield

    @torch.no_grad()
    def run(self, index: int, hidden: Tensor, first: int, *, keep: bool = False) -> Tensor:
        """Return the dense block's outputs, (B, T, d), for inputs (B, T, d) of the sequences from ``first`` on.

        ``keep`` is that of :meth:`~thanos.engine.block_calls.BlockCalls.run`.
        """
        with self.weights():
            return self._runner.run_other(index, hidden, first, keep=keep)

    def inputs(self, size: int, first: int = 0, end: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the batch's first sequence, X* (≤ size, T, d) on the device), for sequences [first, end)."""
        return self._inputs.batches(size, first, end)

    def outputs(self, size: int, first: int = 0, end: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the batch's first sequence, F*(X*) (≤ size, T, d) on the device), for sequences [first, end)."""
        assert self._outputs is not None
        assert self._known, "the outputs of the block were not computed"
        return self._outputs.batches(size, first, end)

    def gather_outputs(self, batches: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """Yield F*(X*), (B, T, d), of each list of sequences, on the device."""
        assert self._outputs is not None, "the outputs of the block were not computed"
        return self._outputs.gather(batches)

    @property
    def _inputs(self) -> Activations:
        assert self._states is not None, "the dense stream has not begun"
        return self._states
