"""Running one decoder block alone, on the inputs and arguments that the whole model would give it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn


class _Stop(Exception):  # noqa: N818  it is a signal, not an error
    """Ends a forward pass whose remainder is not needed."""


class _Interned:
    """Keeps one copy of equal tensors: most arguments (positions, masks) are the same for every sequence."""

    _LOOK_BACK = 16

    def __init__(self) -> None:
        self._known: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._seen:
                self._seen[id(value)] = value, self._find(value)
            return self._seen[id(value)][1]
        if isinstance(value, tuple | list):
            return type(value)(self(item) for item in value)
        return value

    def forget(self) -> None:
        """Let go of tensors that were not kept; within one sequence a tensor is compared once, not once a block."""
        self._seen.clear()

    def _find(self, value: Tensor) -> Tensor:
        known = self._known.setdefault((value.shape, value.dtype), [])
        for tensor in known[: self._LOOK_BACK]:
            if torch.equal(tensor, value):
                return tensor
        known.append(value)
        return value


class BlockCalls:
    """The arguments of every block, besides its hidden states, for every calibration sequence.

    They are recorded one sequence at a time, so that any batch can be put together afterwards: an argument that differs
    between sequences, or that grows with the batch (BLOOM's position biases, (heads, 1, T) a sequence), is concatenated;
    any other is passed once. Which arguments grow is seen from a batch of two.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        self._blocks = blocks
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []  # [sequence][block]
        self._intern = _Interned()
        self._tuple = False  # whether a block returns (hidden states, ...) instead of the hidden states
        self._of_two: list[tuple[Any, Any]] = []  # [block], the shapes of its arguments for a batch of two

    def record(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Run the model on one sequence, ids (1, T), up to the first block; return that block's input (1, T, d)."""
        try:
            hidden = self._record(model, ids)
        except (TypeError, AttributeError, IndexError):
            if self._tuple or self._calls:
                raise
            self._tuple = True  # the model unpacks what its blocks return
            hidden = self._record(model, ids)
        if not self._of_two:
            self._of_two = self._shapes_of_two(model, ids)
        return hidden

    def _shapes_of_two(self, model: nn.Module, ids: Tensor) -> list[tuple[Any, Any]]:
        pair = BlockCalls(self._blocks)
        pair._tuple = self._tuple
        pair._record(model, ids.expand(2, -1))
        return [
            (_shapes(args), {name: _shapes(value) for name, value in kwargs.items()}) for args, kwargs in pair._calls[0]
        ]

    def _record(self, model: nn.Module, ids: Tensor) -> Tensor:
        hidden: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def recorder(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                states = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
                if not isinstance(states, Tensor) or (hidden and states.shape != hidden[0].shape):
                    raise TypeError("a block was not handed the hidden states of the block before it")
                hidden.append(states)
                arguments = {name: self._intern(value) for name, value in kwargs.items()}
                calls.append((tuple(self._intern(value) for value in args[1:]), arguments))
                if index == len(self._blocks) - 1:
                    raise _Stop
                return (states,) if self._tuple else states

            return forward

        try:
            with _replaced_forwards(self._blocks, recorder):
                _run(model, ids)
        finally:
            self._intern.forget()
        self._calls.append(calls)
        return hidden[0]

    def run(self, index: int, hidden: Tensor, first: int) -> Tensor:
        """Run block ``index`` on hidden states (B, T, d) of the sequences from ``first`` on; same shape out."""
        batch = [sequence[index] for sequence in self._calls[first : first + hidden.shape[0]]]
        of_two = self._of_two[index]
        args = tuple(_join([call[0][i] for call in batch], of_two[0][i]) for i in range(len(batch[0][0])))
        kwargs = {name: _join([call[1][name] for call in batch], of_two[1][name]) for name in batch[0][1]}
        output = self._blocks[index](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple | list) else output

    def observe(self, index: int, hidden: Tensor, first: int) -> None:
        """Run block ``index`` like :meth:`run`, for its hooks alone; one of them may end it by :func:`stop`."""
        with suppress(_Stop):
            self.run(index, hidden, first)

    def run_tail(self, model: nn.Module, ids: Tensor, hidden: Tensor) -> None:
        """Run what follows the blocks, given the last block's outputs for ids; a hook may end it by :func:`stop`."""

        def passer(index: int) -> Callable[..., Any]:
            del index
            return lambda *args, **kwargs: (hidden,) if self._tuple else hidden

        with _replaced_forwards(self._blocks, passer):
            _run(model, ids)


def stop() -> None:
    """End the running forward pass; for hooks that have seen what they need."""
    raise _Stop


def _run(model: nn.Module, ids: Tensor) -> None:
    try:
        model(input_ids=ids, use_cache=False)
    except _Stop:
        return


@contextmanager
def _replaced_forwards(blocks: list[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    # An instance attribute shadows the method, so whatever else a model reads from its blocks stays in place.
    for index, block in enumerate(blocks):
        block.forward = make(index)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _shapes(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_shapes(item) for item in value]
    return value.shape if isinstance(value, Tensor) else None


def _join(values: list[Any], of_two: Any) -> Any:
    """Put one argument together for a batch; ``of_two`` is its shape, or those of its parts, for a batch of two."""
    first = values[0]
    if isinstance(first, Tensor):
        if not all(value is first for value in values):
            return torch.cat(values)
        grows = len(values) > 1 and first.dim() > 0 and of_two[0] == 2 * first.shape[0]
        if not grows:
            return first
        return first.expand(len(values), *first.shape[1:]) if first.shape[0] == 1 else torch.cat(values)
    if isinstance(first, tuple | list):
        return type(first)(_join(list(items), part) for *items, part in zip(*values, of_two, strict=True))
    return first
