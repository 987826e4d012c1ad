"""Running a single decoder block, with the inputs and arguments that the whole model would pass to it."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thanos.engine.block_arguments import (
    changed_values,
    hidden_states,
    joined,
    mapped,
    mappings,
    shapes,
    shared_values,
    split,
    with_entries,
)
from thanos.engine.data_flow import DataFlow, trace_data_flow
from thanos.engine.weightless import replaced_forwards
from thanos.errors import ModelError


class _Stop(Exception):  # noqa: N818  it is a signal, not an error
    """Ends a forward pass early when the remaining modules are not needed."""


class _Interned:
    """Keeps one copy of equal tensors. Most arguments (positions, masks) are the same for every sequence.

    A mapping is copied once per sequence: all blocks get the same copy, in which they store values for later blocks.
    """

    _LOOK_BACK = 16  # compare with at most this many kept tensors of the same shape and dtype

    def __init__(self) -> None:
        self._known: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._seen: dict[int, tuple[Any, Any]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._seen:
                self._seen[id(value)] = value, self._find(value)
            return self._seen[id(value)][1]
        if isinstance(value, MutableMapping):
            return self._seen.setdefault(id(value), (value, mapped(value, {})))[1]
        if isinstance(value, tuple | list):
            return with_entries(value, [self(item) for item in value])
        return value

    def forget(self) -> None:
        """Free the tensors that were not kept; call it after each sequence.

        Within a sequence they are remembered, so that a tensor that all blocks receive is compared only once.
        """
        self._seen.clear()

    def _find(self, value: Tensor) -> Tensor:
        known = self._known.setdefault((value.shape, value.dtype), [])
        for tensor in known[: self._LOOK_BACK]:
            if torch.equal(tensor, value):
                return tensor
        known.append(value)
        return value


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one block for one sequence, without the hidden states.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        keyword: keyword of the hidden states; empty if they are the first positional argument.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str


class BlockCalls:
    """The arguments of every block that text reaches, except its hidden states, for every calibration sequence.

    They are recorded one sequence at a time, so that any batch can be built afterwards. An argument is concatenated if it
    differs between sequences or if its size grows with the batch (BLOOM's position biases, (heads, 1, T) per sequence). Any
    other argument is passed once. A trial with a batch of two sequences shows which arguments grow.

    Some models pass one mapping to all blocks, in which a block stores values that later blocks read, such as keys and values
    in Gemma 4. Here each sequence has its own mapping, and a batch gets a new one with the joined values of its sequences. So
    any sequences may form a batch, and the values that a pass stores are dropped. With ``keep``, :meth:`run` stores each
    sequence's part.

    Args:
        blocks: the model's decoder blocks.
        data_flow: the model's data flow; default: computed when the first sequence is recorded.
    """

    def __init__(self, blocks: list[nn.Module], data_flow: DataFlow | None = None) -> None:
        self._blocks, self._data_flow = blocks, data_flow
        self._calls: list[dict[int, _Call]] = []  # [sequence][block]
        self._intern = _Interned()
        self._of_two: dict[int, tuple[Any, Any]] = {}  # [block] → shapes of its (args, kwargs) for a batch of two

    def reaches(self, index: int) -> bool:
        """Return whether text reaches block ``index``; True before the first :meth:`record` if no data flow was given."""
        return self._data_flow is None or index in self._data_flow.forms

    @property
    def shares(self) -> bool:
        """Whether blocks store values for later blocks; see :class:`~thanos.engine.data_flow.DataFlow`."""
        return self._data_flow is not None and self._data_flow.shares

    @property
    def data_flow(self) -> DataFlow | None:
        """The model's data flow; None before the first :meth:`record` if none was given."""
        return self._data_flow

    def record(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Run the model on one sequence, ids (1, T), and record the arguments of each block. The blocks do not run.

        Return the first block's input hidden states, (1, T, d). Raises ModelError if the model's blocks cannot be run one by
        one, or this sequence reaches other blocks than the data flow lists.
        """
        if self._data_flow is None:
            self._data_flow = trace_data_flow(model, self._blocks, ids.device)
        hidden = self._record(model, ids)
        if not self._of_two:
            self._of_two = self._shapes_of_two(model, ids)
        return hidden

    def _shapes_of_two(self, model: nn.Module, ids: Tensor) -> dict[int, tuple[Any, Any]]:
        pair = BlockCalls(self._blocks, self._data_flow)
        pair._record(model, ids.expand(2, -1))
        return {
            index: (shapes(call.args), {name: shapes(value) for name, value in call.kwargs.items()})
            for index, call in pair._calls[0].items()
        }

    def _record(self, model: nn.Module, ids: Tensor) -> Tensor:
        hidden: list[Tensor] = []
        calls: dict[int, _Call] = {}
        reached = self._known_flow.reached

        def recorder(index: int, _: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                states, args, kwargs, keyword = hidden_states(args, kwargs)
                if index != reached[len(calls)] or (hidden and states.shape != hidden[0].shape):
                    raise _other_blocks(model)
                hidden.append(states)
                arguments = {name: self._intern(value) for name, value in kwargs.items()}
                calls[index] = _Call(tuple(self._intern(value) for value in args), arguments, keyword)
                if index == reached[-1]:
                    raise _Stop
                return self._known_flow.returned(index, states)

            return forward

        try:
            with replaced_forwards(self._blocks, recorder):
                _run(model, ids)
        finally:
            self._intern.forget()
        if len(calls) < len(reached):
            raise _other_blocks(model)
        self._calls.append(calls)
        return hidden[0]

    def run(self, index: int, hidden: Tensor, first: int | Sequence[int], *, keep: bool = False) -> Tensor:
        """Run block ``index`` on hidden states (B, T, d); return its outputs, (B, T, d).

        Args:
            index: index of the block.
            hidden: the block's inputs.
            first: index of the batch's first sequence, if the others follow it; else the indices of all B sequences.
            keep: let later blocks read what this block stores for them, until it runs with ``keep`` again.
        """
        rows = range(first, first + len(hidden)) if isinstance(first, int) else first
        batch = [self._calls[row][index] for row in rows]
        one, of_two = batch[0], self._of_two[index]
        args = tuple(joined([call.args[i] for call in batch], of_two[0][i]) for i in range(len(one.args)))
        kwargs = {name: joined([call.kwargs[name] for call in batch], of_two[1][name]) for name in one.kwargs}
        before = shared_values(args, kwargs)
        given, named = (args, {one.keyword: hidden, **kwargs}) if one.keyword else ((hidden, *args), kwargs)
        output = self._blocks[index](*given, **named)
        if keep:
            for number, values in enumerate(changed_values(before, args, kwargs)):
                for key, value in values.items():
                    for call, part in zip(batch, split(value, len(batch)), strict=True):
                        mappings(call.args, call.kwargs)[number][key] = part
        return output[0] if isinstance(output, tuple | list) else output

    def observe(self, index: int, hidden: Tensor, first: int) -> None:
        """Run block ``index`` like :meth:`run`, only for the hooks on it; a hook may end the pass with :func:`stop`."""
        with suppress(_Stop):
            self.run(index, hidden, first)

    def run_tail(self, model: nn.Module, ids: Tensor, hidden: Tensor) -> Any:
        """Run the model without its blocks, for the modules after them, such as lm_head; :func:`stop` in a hook ends the pass.

        Args:
            model: the model that holds the blocks.
            ids: token ids of one sequence, (1, T).
            hidden: the last block's outputs for ``ids``, (1, T, d).

        Returns:
            What the model returns; None if a hook ended the pass.
        """

        def passer(index: int, _: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._known_flow.returned(index, hidden)

        with replaced_forwards(self._blocks, passer):
            return _run(model, ids)

    @property
    def _known_flow(self) -> DataFlow:
        assert self._data_flow is not None
        return self._data_flow


def _other_blocks(model: nn.Module) -> ModelError:
    return ModelError(
        f"{type(model).__name__} cannot be pruned block by block: which blocks it calls depends on the text"
    )


def stop() -> None:
    """End the running forward pass. For hooks that need nothing after this point."""
    raise _Stop


def _run(model: nn.Module, ids: Tensor) -> Any:
    try:
        return model(input_ids=ids, use_cache=False)
    except _Stop:
        return None
