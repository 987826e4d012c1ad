"""What text does in a model: found out before any work, carried where the loop can carry it, and refused where it cannot."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from helpers import tiny_model, windows
from thanos.engine.block_calls import BlockCalls
from thanos.engine.block_runner import Passes
from thanos.engine.picture import draw_picture
from thanos.errors import ModelError, ResourceError
from thanos.model.layers import find_blocks

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
        "an argument of block 1 besides its hidden states depends on the blocks before it",
    ),
    "second output": (
        lambda: Toy(pairs, Reader),
        "block 1 reads what another block returns beside its hidden states",
    ),
    "length": (
        lambda: Toy(in_order, Halving),
        r"block 0 turns hidden states of shape \[1, 8, 4\] into shape \[1, 4, 4\]",
    ),
    "list": (lambda: Toy(in_a_list, Appending), "block 0 writes into its arguments"),
    "in place": (lambda: Toy(in_place, Adding), "block 0 writes into its arguments"),
    "batch": (lambda: Toy(turned), r"hidden states of 1 and 2 sequences are \[8, 1, 4\] and \[8, 2, 4\]"),
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
        draw_picture(toy, list(toy.layers), CPU)
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
    picture = draw_picture(toy, list(toy.layers), CPU)
    assert picture.shares == isinstance(toy.layers[0], Writing)
    calls = BlockCalls(list(toy.layers), picture)
    hidden = torch.cat([calls.record(toy, row[None]) for row in ids])
    assert [calls.reaches(index) for index in range(3)] == [index in reached for index in range(3)]
    for index in reached:
        hidden = torch.cat([calls.run(index, hidden[:3], 0), calls.run(index, hidden[3:], 3)])
    torch.testing.assert_close(hidden, expected)
    calls.run_tail(toy, ids, hidden)  # a model that unpacks what its blocks return gets just that


@torch.inference_mode()
def test_batches_stay_as_they_are_where_blocks_leave_something_for_later_ones(tmp_path: Path) -> None:
    toy = Toy(with_one(dict), Writing)
    passes = Passes(toy, list(toy.layers), torch.arange(32).view(4, 8), CPU, tmp_path)
    passes.batch = 4
    passes.record()
    assert "batches of 2" in passes.halve(torch.OutOfMemoryError())  # no block has run yet
    list(passes.propagate(0))
    with pytest.raises(ResourceError, match="batches of 2 sequences, which this model does not let become smaller"):
        passes.halve(torch.OutOfMemoryError())


@torch.inference_mode()
def test_a_text_that_reaches_other_blocks_is_refused() -> None:
    def walk(toy: Any, hidden: Tensor) -> Tensor:
        return in_order(toy, hidden) if hidden.shape[1] == 8 else middle_left_out(toy, hidden)

    toy = Toy(walk)
    calls = BlockCalls(list(toy.layers), draw_picture(toy, list(toy.layers), CPU))
    with pytest.raises(ModelError, match="which blocks it calls depends on the text"):
        calls.record(toy, torch.arange(9)[None])


def tensors(model: nn.Module) -> Iterator[tuple[str, int]]:
    for name, module in model.named_modules():
        for attribute, tensor in (module._parameters | module._buffers).items():
            yield f"{name}.{attribute}", id(tensor)


@pytest.mark.parametrize("architecture", ["llama", "gpt-2", "bloom", "olmoe"])
def test_the_model_and_the_random_numbers_are_as_before(architecture: str) -> None:
    model = tiny_model(architecture)
    ids, before = windows(2, 12), dict(tensors(model))
    logits, state = model(input_ids=ids).logits, torch.get_rng_state()
    picture = draw_picture(model, find_blocks(model)[1], CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(tensors(model)) == before
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert picture.reached == tuple(range(len(find_blocks(model)[1])))


def test_the_model_is_as_before_after_a_refusal() -> None:
    toy = Toy(between)
    before = dict(tensors(toy))
    with pytest.raises(ModelError):
        draw_picture(toy, list(toy.layers), CPU)
    assert dict(tensors(toy)) == before
    assert not any("forward" in vars(module) for module in toy.modules())


def test_no_weight_is_needed() -> None:
    model = tiny_model("llama").to("meta")
    rotary = model.model.rotary_emb  # buffers are computed when a meta model is built
    for name, buffer in tiny_model("llama").model.rotary_emb.named_buffers():
        rotary._buffers[name] = buffer
    assert draw_picture(model, find_blocks(model)[1], CPU).reached == (0, 1, 2)
    assert all(parameter.is_meta for parameter in model.parameters())
