"""Passes that end early: at the last layer whose input is wanted, from the first batch on if the order of calls is known."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn

from thanos.engine.block_calls import _Stop
from thanos.engine.early_end import stopping_after
from thanos.model.layers import LinearLayer


class Block(nn.Module):
    """Three layers in a row; ``reached`` counts how many were called in a pass."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.twice, self.reached = twice, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.reached = 0
        for layer in [*self.layers, *([self.layers[0]] if self.twice else [])]:
            hidden = layer(hidden)
            self.reached += 1
        return hidden

    def linear(self, *indices: int) -> list[LinearLayer]:
        return [LinearLayer(f"layers.{index}", self.layers[index], 0, False) for index in indices]


def reached(block: Block) -> int:
    with suppress(_Stop):
        block(torch.zeros(1, 2))
    return block.reached


def test_the_first_batch_is_whole_until_the_order_is_known() -> None:
    block, calls = Block(), list[str]()
    everything = block.linear(0, 1, 2)
    with stopping_after(block.linear(0), everything, calls) as batch_ended:
        assert reached(block) == 3
        batch_ended()
        assert calls == ["layers.0", "layers.1", "layers.2"]
        assert reached(block) == 0
    with stopping_after(block.linear(1, 0), everything, calls) as batch_ended:
        assert reached(block) == 1
        batch_ended()
        assert reached(block) == 1
    assert calls == ["layers.0", "layers.1", "layers.2"]
    with stopping_after(block.linear(1)) as batch_ended:  # on its own
        assert reached(block) == 3
        batch_ended()
        assert reached(block) == 1
    assert reached(block) == 3


@pytest.mark.parametrize("known", [True, False])
def test_a_layer_that_is_called_twice_ends_nothing(known: bool) -> None:
    block = Block(twice=True)
    calls = ["layers.0", "layers.1", "layers.2", "layers.0"] if known else []
    with stopping_after(block.linear(0, 1), block.linear(0, 1, 2), calls) as batch_ended:
        for _ in range(2):
            assert reached(block) == 4
            batch_ended()
    with stopping_after(block.linear(1), block.linear(0, 1, 2), calls):
        assert reached(block) == 1


def test_a_pass_ends_at_the_first_layer_that_reads_the_last_input() -> None:
    """Layers 1 and 2 read the same tensor: once that is known, layer 1 need not run."""

    class Fork(Block):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            self.reached = 0
            hidden = self.layers[0](hidden)
            self.reached = 1
            first = self.layers[1](hidden)
            self.reached = 2
            return first + self.layers[2](hidden)

    block, seen = Fork(), list[torch.Tensor]()
    layers = block.linear(0, 1, 2)
    block.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with stopping_after(layers, layers, ["layers.0", "layers.1", "layers.2"]) as batch_ended:
        assert reached(block) == 2
        batch_ended()
        assert reached(block) == 1
        batch_ended()
        assert reached(block) == 1
    assert len(seen) == 3
    with stopping_after(block.linear(2), layers, ["layers.0", "layers.1", "layers.2"]) as batch_ended:
        for _ in range(2):  # layer 1 reads the same input, and has no hook
            assert reached(block) == 2
            batch_ended()
