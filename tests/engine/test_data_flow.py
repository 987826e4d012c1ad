"""What text does in a model: found out before any work, carried where the loop can carry it, and refused where it cannot."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from thanos.engine.block_calls import BlockCalls
from thanos.engine.block_runner import Passes
from thanos.engine.data_flow import trace_data_flow
from thanos.errors import ModelError

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, extra: Any = None) -> Any:
        return hidden_states + self.linear(hidden_states).tanh() + (0.0 if extra is None else extra)


class Pair(Block):
    """Returns something beside its hidden states, and hands on, unread, what it is given."""

    def forward(self, hidden_states: Tensor, extra: Any = None) -> Any:
        hidden = super().forward(hidden_states)
        return hidden, hidden.mean() if extra is None else extra


class Reader(Block):
    """Reads what the block before it returned beside its hidden states."""

    def forward(self, hidden_states: Tensor, extra: Any = None) -> Any:
        return super().forward(hidden_states, extra), self.linear(hidden_states)


class Fields(NamedTuple):
    hidden: Tensor
    flag: bool
    parts: list[Tensor]


class Named(Block):
    def forward(self, hidden_states: Tensor, extra: Any = None) -> Any:
        return Fields(super().forward(hidden_states, extra), True, [hidden_states])


class Halving(Block):
    def forward(self, hidden_states: Tensor, extra: Any = None) -> Any:
        return super().forward(hidden_states)[:, ::2]


class Writing(Block):
    """Leaves something for later blocks in a mapping that all are given, and reads it."""

    def forward(self, hidden_states: Tensor, extra: Any = None) -> Any:
        before = extra.get("states", 0.0)
        extra["states"] = hidden = super().forward(hidden_states, before)
        return hidden


class Turning(Block):
    """Stores the sequences along the second dimension."""

    def forward(self, hidden_states: Tensor, extra: Any = None) -> Any:
        extra["states"] = hidden_states.transpose(0, 1)
        return super().forward(hidden_states)


class Removing(Block):
    """Stores something, or removes what is there."""

    def forward(self, hidden_states: Tensor, extra: Any = None) -> Any:
        if "states" in extra:
            del extra["states"]
        else:
            extra["states"] = hidden_states.clone()
        return super().forward(hidden_states)


class Appending(Block):
    def forward(self, hidden_states: Tensor, extra: Any = None) -> Any:
        extra.append(hidden_states)
        return super().forward(hidden_states)


class Adding(Block):
    def forward(self, hidden_states: Tensor, extra: Any = None) -> Any:
        return super().forward(hidden_states, extra.add_(1.0))


class Mapping(Block):
    def forward(self, hidden_states: Tensor, extra: Any = None) -> Any:
        return {"hidden_states": super().forward(hidden_states)}


class Failing(Block):
    def forward(self, hidden_states: Tensor, extra: Any = None) -> Any:
        raise NotImplementedError("not\n  on this device")


class Toy(nn.Module):
    """A model of three blocks, which ``walk`` calls on the embeddings (B, T, 4)."""

    def __init__(self, walk: Callable[[Any, Tensor], Any], block: type[Block] = Block) -> None:
        super().__init__()
        self.embed, self.layers, self.walk = nn.Embedding(40, 4), nn.ModuleList(block() for _ in range(3)), walk

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        assert not use_cache
        return self.walk(self, self.embed(input_ids))


def in_order(toy: Any, hidden: Tensor) -> Tensor:
    for layer in toy.layers:
        hidden = layer(hidden)
    return hidden


def twice(toy: Any, hidden: Tensor) -> Tensor:
    return in_order(toy, in_order(toy, hidden))


def backwards(toy: Any, hidden: Tensor) -> Tensor:
    for layer in reversed(toy.layers):
        hidden = layer(hidden)
    return hidden


def between(toy: Any, hidden: Tensor) -> Tensor:
    for layer in toy.layers:
        hidden = layer(hidden) * 2
    return hidden


def parallel(toy: Any, hidden: Tensor) -> Tensor:
    return sum((layer(hidden) for layer in toy.layers), hidden)


def by_argument(toy: Any, hidden: Tensor) -> Tensor:
    for layer in toy.layers:
        hidden = layer(hidden, hidden.mean())
    return hidden


def pairs(toy: Any, hidden: Tensor) -> Tensor:
    second = None
    for layer in toy.layers:
        hidden, second = layer(hidden, extra=second)
    return hidden


def with_one(make: Callable[[], Any]) -> Callable[[Any, Tensor], Tensor]:
    """Hand all blocks one object."""

    def walk(toy: Any, hidden: Tensor) -> Tensor:
        shared = make()
        for layer in toy.layers:
            hidden = layer(hidden, extra=shared)
        return hidden

    return walk


in_a_list, in_place = with_one(list), with_one(lambda: torch.zeros(()))


def turned(toy: Any, hidden: Tensor) -> Tensor:
    return in_order(toy, hidden.transpose(0, 1))


def middle_left_out(toy: Any, hidden: Tensor) -> Tensor:
    return toy.layers[2](hidden_states=toy.layers[0](hidden_states=hidden))


def by_outputs(toy: Any, hidden: Tensor) -> Tensor:
    hidden = toy.layers[0](hidden)
    return toy.layers[1 if bool(hidden.sum() > 0) else 2](hidden)


def shared_module() -> Toy:
    toy = Toy(in_order)
    toy.layers[2].linear = toy.layers[0].linear
    return toy


def shared_parameter() -> Toy:
    toy = Toy(in_order)
    toy.layers[2].get_submodule("linear").bias = toy.layers[1].get_parameter("linear.bias")
    return toy


def shared_with_outside() -> Toy:
    toy = Toy(in_order)
    toy.head = nn.Linear(4, 4)
    toy.layers[1].get_submodule("linear").weight = toy.head.weight
    return toy


def one_block() -> Toy:
    toy = Toy(in_order)
    toy.layers = nn.ModuleList([toy.layers[0]] * 2)
    return toy


REFUSED: dict[str, tuple[Callable[[], Toy], str]] = {
    "twice": (lambda: Toy(twice), "block 0 is called twice"),
    "backwards": (lambda: Toy(backwards), "block 1 is called after block 2"),
    "never": (
        lambda: Toy(lambda _, hidden: hidden),
        "text reaches none of its 3 blocks in layers, the list with most weights",
    ),
    "between": (lambda: Toy(between), "the input of block 1 is not the output of block 0"),
    "parallel": (lambda: Toy(parallel), "the input of block 1 is not the output of block 0"),
    "by argument": (
        lambda: Toy(by_argument),
        "an argument of block 1, other than its hidden states, depends on the blocks before it",
    ),
    "second output": (
        lambda: Toy(pairs, Reader),
        "block 1 reads values that another block returns in addition to its hidden states",
    ),
    "length": (
        lambda: Toy(in_order, Halving),
        r"block 0 turns hidden states of shape \[1, 8, 4\] into shape \[1, 4, 4\]",
    ),
    "list": (lambda: Toy(in_a_list, Appending), "block 0 writes into its arguments"),
    "in place": (lambda: Toy(in_place, Adding), "block 0 writes into its arguments"),
    "batch": (lambda: Toy(turned), r"hidden states of 1 and 2 sequences have the shapes \[8, 1, 4\] and \[8, 2, 4\]"),
    "stored parts": (
        lambda: Toy(with_one(dict), Turning),
        "block 0 stores tensors for later blocks whose first size is not the number of sequences",
    ),
    "stored and removed": (
        lambda: Toy(with_one(dict), Removing),
        "block 1 removes values that later blocks receive",
    ),
    "mapping": (lambda: Toy(in_order, Mapping), "block 0 returns dict, not hidden states"),
    "failing": (lambda: Toy(in_order, Failing), "block 0 fails with NotImplementedError: not on this device$"),
    "module": (shared_module, r"layers.0.linear.weight and layers.2.linear.weight are one parameter"),
    "parameter": (shared_parameter, r"layers.1.linear.bias and layers.2.linear.bias are one parameter"),
    "outside": (shared_with_outside, r"layers.1.linear.weight and head.weight are one parameter"),
    "one block": (one_block, r"layers.0.linear.weight and layers.1.linear.weight are one parameter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_loop_would_get_wrong_is_refused_in_one_line(name: str) -> None:
    make, reason = REFUSED[name]
    toy = make()
    with pytest.raises(ModelError, match=f"^Toy cannot be pruned block by block: .*{reason}") as refusal:
        trace_data_flow(toy, list(toy.layers), CPU)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("toy", "reached"),
    [
        (Toy(in_order), (0, 1, 2)),
        (Toy(pairs, Pair), (0, 1, 2)),
        (Toy(lambda toy, hidden: [hidden := layer(hidden).hidden for layer in toy.layers][-1], Named), (0, 1, 2)),
        (Toy(middle_left_out), (0, 2)),
        (Toy(with_one(dict), Writing), (0, 1, 2)),
        (Toy(with_one(UserDict), Writing), (0, 1, 2)),
    ],
    ids=["plain", "pairs", "named tuple", "left out, by keyword", "dictionary", "like a dictionary"],
)
@torch.inference_mode()
def test_what_the_loop_can_carry_equals_the_whole_model(toy: Toy, reached: tuple[int, ...]) -> None:
    ids = torch.arange(35).view(5, 7)
    expected = toy(ids)
    data_flow = trace_data_flow(toy, list(toy.layers), CPU)
    assert data_flow.shares == isinstance(toy.layers[0], Writing)
    calls = BlockCalls(list(toy.layers), data_flow)
    hidden = torch.cat([calls.record(toy, row[None]) for row in ids])
    assert [calls.reaches(index) for index in range(3)] == [index in reached for index in range(3)]
    for index in reached:
        hidden = torch.cat([calls.run(index, hidden[:3], 0, keep=True), calls.run(index, hidden[3:], 3, keep=True)])
    torch.testing.assert_close(hidden, expected)
    calls.run_tail(toy, ids, hidden)  # a model that unpacks what its blocks return gets just that


@pytest.mark.parametrize("shared", [dict, UserDict])
@torch.inference_mode()
def test_what_blocks_store_is_kept_for_each_sequence(shared: Callable[[], Any]) -> None:
    """Batches may differ from block to block, and a pass that keeps nothing changes nothing."""
    toy, ids = Toy(with_one(shared), Writing), torch.arange(35).view(5, 7)
    expected = toy(ids)
    calls = BlockCalls(list(toy.layers))
    hidden = torch.cat([calls.record(toy, row[None]) for row in ids])
    for index, batches in enumerate([[[0, 1], [2, 3, 4]], [[4, 0], [1], [3, 2]], [[2, 0, 3, 4, 1]]]):
        calls.run(index, hidden[:2] + 1.0, 0)  # nothing is kept
        outputs = torch.empty_like(hidden)
        for batch in batches:
            outputs[batch] = calls.run(index, hidden[batch], batch, keep=True)
        calls.observe(index, hidden[2:] - 1.0, 2)
        hidden = outputs
    torch.testing.assert_close(hidden, expected)


@torch.inference_mode()
def test_batches_may_become_smaller_after_a_block_has_stored_something(tmp_path: Path) -> None:
    toy, ids = Toy(with_one(dict), Writing), torch.arange(32).view(4, 8)
    passes = Passes(toy, list(toy.layers), ids, CPU, tmp_path)
    passes.batch = 4
    passes.record()
    for index in range(3):
        list(passes.propagate(index))
        passes.batch = 3 if index else passes.batch
        passes.halve(torch.OutOfMemoryError())
    torch.testing.assert_close(torch.cat([states for _, states in passes.batches(2)]), toy(ids))
