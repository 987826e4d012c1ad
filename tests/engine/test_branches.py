"""Branches of blocks: found in a run, and skipped where their last layer's input is known, with the same bits as without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import thanos
from helpers import save_tiny, tiny_model, windows
from reports import contents
from thanos.engine import block_runner, stream_states
from thanos.engine.activations import Activations
from thanos.engine.block_calls import BlockCalls
from thanos.engine.branches import Branch, BranchInputs, block_order
from thanos.engine.stages.base import BlockContext
from thanos.model.layers import LinearLayer, find_blocks, linear_layers

CPU = torch.device("cpu")
SAMPLES, LENGTH = 5, 32
LLAMA = {"self_attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}
BRANCHES = {
    "llama": LLAMA,
    "gemma-2": {"mlp": "mlp.down_proj"},  # its eager attention returns its weights, too
    "phi-3": LLAMA,
    "cohere": LLAMA,
    "gpt-2": {"attn": "attn.c_proj", "mlp": "mlp.c_proj"},
    "opt-125m": {"self_attn": "self_attn.out_proj"},  # the rest of its MLP belongs to the block itself
    "gpt-neox": {"attention": "attention.dense", "mlp": "mlp.dense_4h_to_h"},
    "bloom": {},  # they add the residual stream to the layer's output
    "mixtral": {"self_attn": "self_attn.o_proj"},
}


def recipe(text: Path, **changes: Any) -> thanos.Recipe:
    settings = {"calibration": str(text), "samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu"}
    return thanos.Recipe(**settings | {"sequential": True, "dense_target": "auto", "refit": 2} | changes)


# --- found --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", BRANCHES)
def test_a_branch_is_a_module_that_returns_what_its_last_layer_returned(architecture: str) -> None:
    model = tiny_model(architecture)
    if architecture == "gemma-2":
        model.set_attn_implementation("eager")  # transformers 5.17 runs it with sdpa, which returns no weights
    _, blocks = find_blocks(model)
    place = next(name for name, module in model.named_modules() if module is blocks[1])
    calls, block = BlockCalls(blocks), blocks[1]
    layers = [layer for layer in linear_layers(model) if layer.block == 1 and not layer.router]
    with torch.no_grad():
        hidden = calls.record(model, windows(1, 24))
        order = block_order(lambda: calls.run(1, hidden, 0), block, layers, f"{place}.")
    found = {branch.module: branch.layer.removeprefix(f"{place}.") for branch in order.branches}
    assert found == BRANCHES[architecture]
    assert [name for name, module in block.named_modules() if module._forward_hooks or module._forward_pre_hooks] == []
    for branch in order.branches:
        # What does not affect the layer's input: other values of these weights leave its bits as they were.
        weights = dict(model.named_parameters())
        assert f"{branch.layer}.weight" in branch.later
        assert branch.later == {f"{name}.weight" for name in order.calls[order.calls.index(branch.layer) :]}
        with noted_input(model.get_submodule(branch.layer)) as seen, torch.no_grad():
            calls.run(1, hidden, 0)
            before = {name: weights[name].clone() for name in branch.later}
            for name in branch.later:
                weights[name].mul_(2)
            calls.run(1, hidden, 0)
            for name, value in before.items():
                weights[name].copy_(value)
        assert torch.equal(*seen)


@contextmanager
def noted_input(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    with module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())):
        yield seen


class Toy(nn.Module):
    """A block of two layers, of which ``inner`` holds the second one; ``after`` changes what ``inner`` returns."""

    def __init__(self, after: Callable[[Tensor], Any], times: int = 1) -> None:
        super().__init__()
        self.first, self.last, self.inner, self.times = nn.Linear(4, 4), nn.Linear(4, 4), nn.Module(), times
        self.inner.add_module("last", self.last)
        self.inner.forward = lambda states: after(self.last(states))  # type: ignore[method-assign]

    def forward(self, hidden: Tensor) -> Tensor:
        states = result = self.first(hidden)
        for _ in range(self.times):
            result = self.inner(states)
        return hidden + (result[0] if isinstance(result, tuple) else result)


@pytest.mark.parametrize(
    ("after", "times", "entries"),
    [
        (lambda output: output, 1, 0),
        (lambda output: (output, None), 1, 2),
        (lambda output: (output, output.sum()), 1, None),  # something else is returned, too
        (lambda output: output * 2, 1, None),
        (lambda output: output.mul_(2), 1, None),  # the same tensor with other values
        (lambda output: output, 2, None),
    ],
    ids=["tensor", "tuple", "more", "scaled", "in place", "twice"],
)
def test_a_module_that_changes_or_adds_something_is_no_branch(
    after: Callable[[Tensor], Any], times: int, entries: int | None
) -> None:
    toy = Toy(after, times)
    layers = [LinearLayer("b.first", toy.first, 0, False), LinearLayer("b.inner.last", toy.last, 0, False)]
    hidden = torch.randn(1, 3, 4)
    found = block_order(lambda: toy(hidden), toy, layers, "b.").branches
    wanted = [] if entries is None else [Branch("inner", "b.inner.last", frozenset({"b.inner.last.weight"}), entries)]
    assert list(found) == wanted


# --- kept ---------------------------------------------------------------------------------------------------------------------


class Kept:
    """A toy block, the inputs that are kept of it, and counts of the calls of its layers."""

    def __init__(self, folder: Path, room: bool = True) -> None:
        torch.manual_seed(0)
        self.toy = Toy(lambda output: (output, None))
        self.hidden = torch.randn(8, 3, 4)
        self.inputs = BranchInputs(lambda one: Activations(8, one, "host", CPU, folder) if room else None)
        later = frozenset({"b.inner.last.weight"})
        self.inputs.begin(self.toy, [Branch("inner", "b.inner.last", later, 2)], "b.")
        self.calls: Counter[str] = Counter()
        self.toy.inner.register_module("before", nn.Identity())
        for name in ("inner", "inner.last"):
            self.toy.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: self.calls.update([name]))
        own = self.toy.inner.forward
        self.whole = 0

        def forward(states: Tensor) -> Any:
            self.whole += 1
            return own(states)

        self.toy.inner.forward = forward  # type: ignore[method-assign]

    def run(self, first: int, count: int, **how: Any) -> bool:
        """Run a batch, compare its outputs with those without anything kept; return whether the branch ran."""
        hidden = self.hidden[first : first + count]
        expected, before = self.toy(hidden), self.whole
        with torch.no_grad(), self.inputs.used(first, count, **how):
            assert torch.equal(self.toy(hidden), expected)
        return self.whole > before + 0 and self.whole - before == 1


def test_a_batch_is_used_again_while_nothing_before_the_last_layer_changes(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    assert kept.run(0, 3)
    assert not kept.run(0, 3)
    assert kept.run(0, 3, needed=["b.inner.before"])  # a module within the branch is observed
    assert not kept.run(0, 3, needed=["b.inner.last", "b.first"])
    assert not kept.run(0, 3, changed=["b.inner.last.weight"])
    assert kept.run(0, 3, changed=["b.first.weight"])
    assert not kept.run(0, 3)
    kept.inputs.changed("b.inner.last.weight")
    assert not kept.run(0, 3)
    kept.inputs.changed("b.first.weight")
    assert kept.run(0, 3, keep=False)
    assert kept.run(0, 3)
    assert not kept.run(0, 3)
    kept.inputs.begin(kept.toy, [], "b.")
    assert kept.run(0, 3)


def test_only_the_same_batch_is_used_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    assert [kept.run(first, count) for first, count in ((0, 4), (4, 4), (0, 4), (4, 4))] == [True, True, False, False]
    assert kept.run(0, 2)
    assert kept.run(2, 4)  # replaces the batch from 4 on, too
    assert [kept.run(*batch) for batch in ((0, 2), (2, 4), (4, 4))] == [False, False, True]
    assert kept.inputs.sizes == [8 * 3 * 4 * 4]
    kept.inputs.close()
    assert kept.run(4, 4)


def test_without_room_every_pass_runs_the_branch(tmp_path: Path) -> None:
    kept = Kept(tmp_path, room=False)
    assert [kept.run(0, 4) for _ in range(3)] == [True] * 3
    assert kept.inputs.sizes == []


# --- runs ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(stream_states, "has_spare_room", lambda *_: False)
        yield


RUNS: Sequence[tuple[str, dict[str, Any]]] = [
    *((architecture, {}) for architecture in BRANCHES),
    ("llama", {"dense_target": 0}),
    ("llama", {"dense_target": 0.5, "method": "wanda"}),
    ("llama", {"tune": 1}),
    ("llama", {"dtype": "bfloat16"}),
    ("llama", {"targets": ("layers.*", "lm_head")}),
    ("llama", {"pattern": "blocks", "sparsity": 0.34}),
    ("gemma-4", {}),
]


@pytest.mark.parametrize(("architecture", "changes"), RUNS, ids=[f"{name}-{[*c.values()]}" for name, c in RUNS])
def test_results_are_the_same_bytes_whatever_is_kept(
    architecture: str, changes: dict[str, Any], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(block_runner.BATCH_TOKENS, "cpu", 3 * LENGTH)  # batches of 3, 1 and, held out, 1
    folder, settings = save_tiny(tmp_path / "model", architecture), recipe(text_file, **changes)
    thanos.prune(folder, tmp_path / "kept", settings)
    with nothing_kept(monkeypatch):
        thanos.prune(folder, tmp_path / "again", settings)
    kept, again = contents(tmp_path / "kept"), contents(tmp_path / "again")
    assert kept.keys() == again.keys()
    assert {name for name in kept if kept[name] != again[name]} == set()


def calls_in_a_run(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, settings: thanos.Recipe) -> dict[str, int]:
    """Kind of layer → number of sequences that it is called with in the second block, of those of batches."""
    found: Counter[str] = Counter()
    original = BlockContext.find_order

    def find(context: BlockContext) -> None:
        original(context)
        if context.index == 1:
            for name, module in context.module.named_modules():
                if isinstance(module, nn.Linear):
                    kind = name.split(".")[-1]
                    module.register_forward_hook(lambda _, args, out, kind=kind: found.update({kind: len(args[0])}))

    with monkeypatch.context() as patch:
        patch.setattr(BlockContext, "find_order", find)
        thanos.prune(folder, out, settings)
    return dict(found)


def test_what_a_run_at_high_computes(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five sequences of which one is held out; batches of one, so that all but the first end early."""
    monkeypatch.setitem(block_runner.BATCH_TOKENS, "cpu", LENGTH)
    settings, fitted, one = recipe(text_file), 4, 1
    found = calls_in_a_run(monkeypatch, tiny_llama, tmp_path / "kept", settings)
    stream = one  # the run that finds the layers that write into the residual stream
    dense, twice = fitted + one, 2 * fitted
    # The block's error, four candidates, and the first of the next step, which keeps the input of o_proj.
    assert found["v_proj"] == stream + dense + one + 4 * one + fitted + one
    # To the input of o_proj in its own step; to that of v_proj only the first batch needs q and k.
    assert found["q_proj"] == found["v_proj"] + one
    # The steps of gate and up, and of down, in both streams; then the outputs.
    errors = 2 + 4 * 4
    assert found["o_proj"] == stream + dense + errors * one + 2 * twice + fitted + one
    # In the dense stream the input of down_proj is kept.
    assert found["up_proj"] == stream + dense + one + 4 * 3 * one + fitted + one
    assert found["gate_proj"] == found["up_proj"] + one
    assert found["down_proj"] == stream + dense + errors * one + fitted + one
    with nothing_kept(monkeypatch):
        before = calls_in_a_run(monkeypatch, tiny_llama, tmp_path / "again", settings)
    assert all(before[kind] > found[kind] for kind in ("q_proj", "v_proj", "up_proj"))


def test_hidden_states_on_the_disk_keep_nothing_more(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_states, "has_spare_room", lambda *_: pytest.fail("looked for room"))
    thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file), activations="disk")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None
