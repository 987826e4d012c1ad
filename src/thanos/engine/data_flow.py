"""The data flow between a model's decoder blocks: which blocks text reaches, and what each passes to the next.

The loop runs the blocks one by one. The result equals the model's only under these conditions: the model calls each block at
most once, in the order of the list; a block's input is the output of the block called before it; its other arguments do not
depend on other blocks; it shares no parameter with another module.

Forward passes of a few tokens check this without weights in memory: linear layers return zeros, and all other parameters are
zero. The blocks run only in the first pass. The output of each block is replaced by random numbers, and the next block's
input must equal them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from thanos.engine.block_arguments import (
    Arguments,
    changed_values,
    copied,
    hidden_states,
    holds_unread,
    mappings,
    same_arguments,
    shapes,
    shared_values,
    unread,
    with_entries,
)
from thanos.engine.weightless import replaced_forwards, some_ids, weightless
from thanos.errors import ModelError


@dataclass(frozen=True, slots=True)
class DataFlow:
    """The data flow between a model's decoder blocks.

    Attributes:
        reached: indices of the blocks that text reaches, in the order of their calls; they ascend.
        forms: index of each reached block → form of its return value: None for the hidden states alone, else a tuple or list
            whose first entry is a placeholder for the hidden states.
        shares: whether a block stores values for later blocks in a mapping that all blocks receive, as Gemma 4 does with keys
            and values. The later block cannot run before the earlier one.
    """

    reached: tuple[int, ...]
    forms: dict[int, Any]
    shares: bool = False

    def returned(self, index: int, hidden: Tensor) -> Any:
        """Return hidden states in the form that block ``index`` returns: alone, or as first entry of a tuple or list."""
        form = self.forms[index]
        if form is None:
            return hidden
        return with_entries(form, [hidden, *form[1:]])


@dataclass(slots=True)
class _Trace:
    """The block calls of one forward pass, in order.

    Attributes:
        blocks: index of the called block, by call.
        inputs: its hidden states, by call.
        arguments: its other arguments, by call.
        forms: see :class:`DataFlow`.
        stored: index of the block → :func:`~thanos.engine.block_arguments.shapes` of the values that it stored for later
            blocks, for each mapping among its arguments.
    """

    blocks: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    arguments: list[Arguments] = field(default_factory=list)
    forms: dict[int, Any] = field(default_factory=dict)
    stored: dict[int, list[dict[Any, Any]]] = field(default_factory=dict)


def trace_data_flow(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> DataFlow:
    """Determine which blocks text reaches, and check that running them one by one gives the model's result.

    The model's parameters may be on the meta device. The forward passes run on ``device`` and need little memory. Raises
    ModelError, which names the model's class and the reason, if the blocks cannot be run one by one.
    """
    _check_owned(model, blocks)
    ids = some_ids(model, device)
    with torch.inference_mode(), weightless(model, device):
        full = _traced(model, blocks, ids, None)
        if not full.blocks:
            name = next(name for name, module in model.named_modules() if module is blocks[0])
            where = name.rpartition(".")[0]
            _refuse(model, f"text reaches none of its {len(blocks)} blocks in {where}, the list with most weights")
        stubbed = _traced(model, blocks, ids, full.forms)
        pair = _traced(model, blocks, ids.expand(2, -1), full.forms)
        if full.stored:
            _check_parts(model, full.stored, _traced(model, blocks, ids.expand(2, -1), None).stored)
    _check_independent(model, full, stubbed)
    one, two = full.inputs[0].shape, pair.inputs[0].shape
    if one[0] != 1 or two != (2, *one[1:]):
        _refuse(
            model,
            f"the hidden states of 1 and 2 sequences have the shapes {list(one)} and {list(two)}; the first size must be the "
            "number of sequences",
        )
    return DataFlow(tuple(full.blocks), full.forms, bool(full.stored))


def _refuse(model: nn.Module, reason: str) -> NoReturn:
    raise ModelError(f"{type(model).__name__} cannot be pruned block by block: {reason}")


def _check_owned(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Refuse parameters that a block shares with another block, or with anything outside the blocks."""
    names = {id(module): name for name, module in model.named_modules()}
    owners: dict[int, tuple[int | None, str]] = {}

    def claim(block: int | None, name: str, parameter: nn.Parameter) -> None:
        other, first = owners.setdefault(id(parameter), (block, name))
        if other != block:
            _refuse(model, f"{first} and {name} are one parameter, and a block must have its own")

    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters(remove_duplicate=False):
            claim(index, f"{names[id(block)].rpartition('.')[0]}.{index}.{name}", parameter)
    inside = {id(module) for block in blocks for module in block.modules()}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if id(module) not in inside:
            for name, parameter in module.named_parameters(recurse=False):
                claim(None, f"{prefix}.{name}" if prefix else name, parameter)


def _traced(model: nn.Module, blocks: Sequence[nn.Module], ids: Tensor, forms: dict[int, Any] | None) -> _Trace:
    """Run a model on ids and record the calls of its blocks.

    Without ``forms`` the blocks run. With ``forms`` they only return random hidden states in the given form.
    """
    trace, generator = (
        _Trace(forms=dict(forms or {})),
        torch.Generator(ids.device).manual_seed(0 if forms is None else 1),
    )
    returned: list[Tensor] = []

    def make(index: int, real: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            states, others, named, _ = hidden_states(args, kwargs)
            _check_call(model, index, trace.blocks, states, returned)
            trace.blocks.append(index)
            trace.inputs.append(states.clone())
            trace.arguments.append(copied(others, named))
            output_like = states
            if forms is None:
                shared = shared_values(args, kwargs)
                output_like, trace.forms[index] = _form(
                    model, index, states, _attempt(model, index, real, args, kwargs)
                )
                stored = changed_values(shared, args, kwargs)
                if any(stored):
                    trace.stored[index] = [shapes(values) for values in stored]
                if any(known.keys() - now.keys() for known, now in zip(shared, mappings(args, kwargs), strict=True)):
                    _refuse(model, f"block {index} removes values that later blocks receive")
            # Drawn in float32 and converted: not every device can draw bfloat16 and float16.
            noise = torch.randn(states.shape, generator=generator, device=ids.device).to(output_like.dtype)
            returned[:] = [noise]
            return DataFlow((), trace.forms).returned(index, noise)

        return forward

    try:
        with replaced_forwards(blocks, make):
            model(input_ids=ids, use_cache=False)
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # An error after the last block is ignored: the loop does not run those modules, unless a layer there is pruned.
        if not trace.blocks or trace.blocks[-1] != len(blocks) - 1:
            where = f"after block {trace.blocks[-1]}" if trace.blocks else "before the first block"
            _refuse_error(model, f"its code {where} fails", error)
    return trace


def _check_call(model: nn.Module, index: int, before: list[int], states: Any, returned: list[Tensor]) -> None:
    """Refuse a call of block ``index`` that the loop would not make: repeated, out of order, or on another input."""
    if index in before:
        _refuse(model, f"block {index} is called twice")
    if before and index < before[-1]:
        _refuse(model, f"block {index} is called after block {before[-1]}")
    if not isinstance(states, Tensor) or states.dim() < 2 or not states.is_floating_point():
        _refuse(model, f"the first argument of block {index} is not a tensor of hidden states")
    if returned and not (states.shape == returned[0].shape and torch.equal(states, returned[0])):
        _refuse(model, f"the input of block {index} is not the output of block {before[-1]}")


def _attempt(
    model: nn.Module, index: int, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a block; refuse it if it reads an :data:`~thanos.engine.block_arguments.UNREAD` value or modifies its arguments."""
    before = copied(args, kwargs)
    try:
        output = real(*args, **kwargs)
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if holds_unread([*args, *kwargs.values()]):
            _refuse(model, f"block {index} reads values that another block returns in addition to its hidden states")
        _refuse_error(model, f"block {index} fails", error)
    if not same_arguments(before, (args, kwargs)):
        _refuse(model, f"block {index} writes into its arguments")
    return output


def _form(model: nn.Module, index: int, states: Tensor, output: Any) -> tuple[Tensor, Any]:
    """Return a block's output hidden states and the form of its return value; see :class:`DataFlow`."""
    several = isinstance(output, tuple | list)
    first = output[0] if several and output else output
    if not isinstance(first, Tensor):
        _refuse(model, f"block {index} returns {type(first).__name__}, not hidden states")
    if first.shape != states.shape:
        _refuse(
            model, f"block {index} turns hidden states of shape {list(states.shape)} into shape {list(first.shape)}"
        )
    if not several:
        return first, None
    return first, with_entries(output, [None, *(unread(value) for value in output[1:])])


def _check_independent(model: nn.Module, full: _Trace, stubbed: _Trace) -> None:
    """Refuse a model if the order of its block calls, or a block's arguments, depend on the outputs of other blocks."""
    if full.blocks != stubbed.blocks:
        _refuse(model, "which blocks it calls depends on their outputs")
    for index, one, other in zip(full.blocks, full.arguments, stubbed.arguments, strict=True):
        if not same_arguments(one, other):
            _refuse(
                model, f"an argument of block {index}, other than its hidden states, depends on the blocks before it"
            )


def _check_parts(model: nn.Module, one: dict[int, list[dict[Any, Any]]], two: dict[int, list[dict[Any, Any]]]) -> None:
    """Refuse a model in which a block stores a tensor for later blocks that has no part for each sequence.

    Args:
        model: the model.
        one: :attr:`_Trace.stored` for one sequence.
        two: the same for two sequences.
    """

    def fits(small: Any, large: Any) -> bool:
        if isinstance(small, torch.Size):
            return isinstance(large, torch.Size) and len(small) > 0 and large == (2 * small[0], *small[1:])
        if isinstance(small, dict):
            return small.keys() == large.keys() and all(fits(small[key], large[key]) for key in small)
        return not isinstance(small, list) or (isinstance(large, list) and all(map(fits, small, large)))

    for index, stored in one.items():
        if not fits(stored, two.get(index)):
            _refuse(
                model, f"block {index} stores tensors for later blocks whose first size is not the number of sequences"
            )


def _refuse_error(model: nn.Module, what: str, error: Exception) -> NoReturn:
    line = " ".join(str(error).split())[:200]
    try:
        _refuse(model, f"{what} with {type(error).__name__}: {line}")
    except ModelError as refusal:
        raise refusal from error
