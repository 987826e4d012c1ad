"""The dense stream: it is the dense model's, it costs nothing where nobody needs it, and it is resumed to the byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import thanos
from helpers import packed_windows, save_tiny, tiny_tokenizer
from reports import contents
from thanos.calibration.windows import Calibration
from thanos.engine import block_runner as passes
from thanos.engine import dense_stream, loop
from thanos.engine.routing import Routing
from thanos.engine.stages.base import BlockContext, BlockStage
from thanos.engine.stages.prune import PruneStage
from thanos.errors import RecipeError
from thanos.recipe import Override

SAMPLES, LENGTH = 5, 32
SIZE = 3  # batches of 3 and 2 sequences


def recipe(text: Path, **changes: Any) -> thanos.Recipe:
    settings = {"calibration": str(text), "samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu", "tune": 1}
    return thanos.Recipe(**settings | changes)


def use(monkeypatch: pytest.MonkeyPatch, *stages: BlockStage) -> None:
    monkeypatch.setattr("thanos.run.engine_setup.stages_of", lambda recipe: stages)


@dataclass
class Look:
    """Keeps copies of what a stage is given: per block the pruned and dense inputs, and the dense outputs."""

    name: str = "look"
    pruned: dict[int | None, Tensor] = field(default_factory=dict)
    inputs: dict[int | None, Tensor] = field(default_factory=dict)
    outputs: dict[int | None, Tensor] = field(default_factory=dict)
    again: dict[int | None, Tensor] = field(default_factory=dict)
    held_out: list[int] = field(default_factory=list)

    def __call__(self, context: BlockContext) -> Iterator[thanos.Event]:
        self.held_out = list(context.held_out)
        if context.dense_stream is None:
            return
        found = [(first, x.clone(), d.clone()) for first, x, d in context.pairs(SIZE)]
        assert [first for first, _, _ in found] == [0, 3]
        self.pruned[context.index] = torch.cat([x for _, x, _ in found])
        self.inputs[context.index] = torch.cat([d for _, _, d in found])
        if context.index is not None:
            targets = list(context.targets(SIZE))
            assert torch.equal(torch.cat([x for _, x, _ in targets]), self.pruned[context.index])
            self.outputs[context.index] = torch.cat([y for _, _, y in targets]).clone()
            before = {name: context.weights.parameter(name) for name in context.weights.names}
            with torch.enable_grad():
                again = [context.dense_forward(d, first) for first, _, d in found]
            assert not any(y.requires_grad for y in again)
            self.again[context.index] = torch.cat(again)
            assert all(context.weights.parameter(name) is value for name, value in before.items())
        yield context.event("progress", "solve")


def real_states(folder: Path, text: Path) -> list[Tensor]:
    """The hidden states before each block and after the last, of the whole model as transformers runs it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = packed_windows(tiny_tokenizer(), text.read_text(), SAMPLES, LENGTH)
    blocks = model.get_submodule("model.layers")
    found: list[Tensor] = []
    blocks[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))
    for block in blocks:
        block.register_forward_hook(lambda _, args, out: found.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return found


@pytest.mark.parametrize("architecture", ["llama", "gemma-3", "mixtral", "qwen3-moe"])
def test_the_dense_stream_holds_the_hidden_states_of_the_dense_model(
    architecture: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model", architecture)
    look = Look()
    use(monkeypatch, PruneStage(), look)
    thanos.prune(folder, tmp_path / "out", recipe(text_file))
    expected = real_states(folder, text_file)
    assert list(look.inputs) == list(range(len(expected) - 1))
    for index in look.inputs:
        torch.testing.assert_close(look.inputs[index], expected[index], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(look.outputs[index], expected[index + 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(look.again[index], look.outputs[index], rtol=1e-5, atol=1e-5)
        if index:  # the pruned stream has left the dense one
            assert torch.equal(look.inputs[index], look.outputs[index - 1])
            assert (look.pruned[index] - look.inputs[index]).norm() > 0.01 * look.inputs[index].norm()
    assert torch.equal(look.pruned[0], look.inputs[0])


def test_a_stage_that_uses_none_of_it_writes_the_same_bytes(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thanos.prune(tiny_llama, tmp_path / "off", recipe(text_file, tune=None))
    use(monkeypatch, PruneStage(), Look())
    thanos.prune(tiny_llama, tmp_path / "on", recipe(text_file))
    off, on = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("off", "on"))
    assert off == on


def test_without_repair_there_is_no_dense_stream(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a dense stream was made")

    monkeypatch.setattr(loop, "DenseStream", forbidden)
    look = Look()
    use(monkeypatch, PruneStage(), look)
    thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file, tune=None, refit=3, sequential=True))
    assert look.inputs == {}
    assert look.held_out == []


def test_the_dense_stream_ends_after_the_last_block_that_needs_it(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []
    original = dense_stream.DenseStream.close
    monkeypatch.setattr(
        dense_stream.DenseStream, "close", lambda self: (closed.append(len(look.inputs)), original(self))
    )
    look = Look()
    use(monkeypatch, PruneStage(), look)
    override = Override(match="model.layers.1.*", settings={"tune": 1})
    thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file, tune=None, overrides=(override,)))
    assert list(look.inputs) == [0, 1]
    assert closed[0] == 2


def test_the_layers_after_the_blocks_have_pairs_too(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Look()
    use(monkeypatch, PruneStage(), look)
    settings = recipe(text_file, tune=None, dense_target=0.0, targets=("layers.*", "lm_head"))
    override = Override(match="lm_head", settings={"dense_target": 0.5})
    thanos.prune(tiny_llama, tmp_path / "out", settings.replace(overrides=(override,)))
    expected = real_states(tiny_llama, text_file)
    torch.testing.assert_close(look.inputs[None], expected[-1], rtol=1e-4, atol=1e-4)


# --- held-out sequences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "held_out"), [(None, [4]), (2, [3, 4])])
def test_the_last_sequences_are_held_out(
    given: int | None, held_out: list[int], tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    look = Look()
    use(monkeypatch, look)
    thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file, held_out=given))
    assert look.held_out == held_out


def test_windows_that_are_too_few_to_hold_any_out_are_refused_before_work(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    ids = packed_windows(tiny_tokenizer(), text_file.read_text(), 1, LENGTH)
    windows = Calibration(ids=ids, source="given", rule="packed", seed=0, documents=1)
    with pytest.raises(RecipeError, match="of 1 calibration sequence, 1 would be held out"):
        thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file), calibration=windows)
    assert list(tmp_path.iterdir()) == []


# --- resuming and storage -------------------------------------------------------------------------------------------------


@dataclass
class Follow:
    """Moves a norm's gains by what the dense outputs say, so that the result depends on every bit of the dense stream."""

    name: str = "follow"

    def __call__(self, context: BlockContext) -> Iterator[thanos.Event]:
        if context.index is None:
            return
        total = torch.zeros(())
        for first, hidden, wanted in context.targets(SIZE):
            total += (context.forward(hidden, first) - wanted).square().mean()
        name = f"model.layers.{context.index}.input_layernorm.weight"
        context.put(name, context.dense(name) * (1 + total))
        yield context.note(f"moved by {total.item()!r}", "solve")


class Stop(Exception):  # noqa: N818  it is a signal, not an error
    """Ends a run in a test."""


def stop_in(block: int, phase: str) -> Callable[[thanos.Event], None]:
    def watch(event: thanos.Event) -> None:
        if event.block == block and event.phase == phase:
            raise Stop

    return watch


@pytest.mark.parametrize(("block", "phase"), [(1, "dense"), (1, "solve"), (2, "propagate")])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_resumed_run_replays_both_streams_to_the_byte(
    architecture: str, block: int, phase: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model", architecture, num_hidden_layers=3)
    use(monkeypatch, PruneStage(), Follow())
    monkeypatch.setitem(passes.BATCH_TOKENS, "cpu", 2 * LENGTH)
    thanos.prune(folder, tmp_path / "whole", recipe(text_file))
    with pytest.raises(Stop):
        thanos.prune(folder, tmp_path / "out", recipe(text_file), on_event=stop_in(block, phase))
    monkeypatch.setitem(passes.BATCH_TOKENS, "cpu", 4 * LENGTH)  # a resumed run keeps the batches of the first
    thanos.prune(folder, tmp_path / "out", recipe(text_file), resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_tier_changes_nothing(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, PruneStage(), Follow())
    for tier in ("host", "disk"):
        thanos.prune(tiny_llama, tmp_path / tier, recipe(text_file), activations=tier)
    host, disk = (load_file(tmp_path / tier / "model.safetensors") for tier in ("host", "disk"))
    assert all(torch.equal(host[name], disk[name]) for name in host)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_tier_changes_nothing_and_both_streams_leave_the_device(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, PruneStage(), Follow())
    for tier in ("device", "host", "disk"):
        thanos.prune(tiny_llama, tmp_path / tier, recipe(text_file, device="cuda"), activations=tier)

    spilled: list[str] = []

    @dataclass
    class Spill:
        name: str = "spill"

        def __call__(self, context: BlockContext) -> Iterator[thanos.Event]:
            before = [(x.clone(), y.clone()) for _, x, y in context.targets(SIZE)]
            spilled.extend(context.spill())
            assert not context.on_device
            for (x, y), (_, now, wanted) in zip(before, context.targets(SIZE), strict=True):
                assert torch.equal(x, now)
                assert torch.equal(y, wanted)
            yield context.event("progress", "solve")

    use(monkeypatch, PruneStage(), Follow(), Spill())
    thanos.prune(tiny_llama, tmp_path / "spilled", recipe(text_file, device="cuda"), activations="device")
    assert len(spilled) == 2
    written = [load_file(tmp_path / name / "model.safetensors") for name in ("device", "host", "disk", "spilled")]
    assert all(torch.equal(written[0][name], other[name]) for other in written[1:] for name in written[0])


def test_memory_that_runs_out_halves_the_batches_of_the_dense_pass_too(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, failed = passes.Passes.run_other, []

    def run_other(self: Any, index: int, hidden: Tensor, first: int, **how: bool) -> Tensor:
        if index == 1 and len(hidden) > 3:
            failed.append(first)
            raise torch.OutOfMemoryError("no room")
        return original(self, index, hidden, first, **how)

    monkeypatch.setattr(passes.Passes, "run_other", run_other)
    look = Look()
    use(monkeypatch, PruneStage(), look)
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file))
    assert failed[0] == 0
    torch.testing.assert_close(look.outputs[2], real_states(tiny_llama, text_file)[-1], rtol=1e-4, atol=1e-4)
    assert report.warnings == ["out of memory on the device: batches of 5 sequences become batches of 2"]


# --- mixtures of experts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3-moe"])
def test_with_the_routing_of_another_run_each_expert_gets_the_same_tokens(architecture: str) -> None:
    from helpers import tiny_config
    from thanos.model.meta_model import build_meta_model

    model = build_meta_model(tiny_config(architecture), torch.float32).to_empty(device="cpu")
    with torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    block = model.get_submodule("model.layers.0")
    routing = Routing(block)
    (mixture,) = routing.mixtures
    seen: list[tuple[Tensor, Tensor]] = []
    original = mixture.forward

    def forward(hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        seen.append((hidden, indices))
        return original(hidden, indices, weights)

    mixture.forward = forward
    moe = next(module for module in block.modules() if any(child is mixture for child in module.children()))
    one, other = torch.randn(1, 12, 32), torch.randn(1, 12, 32)
    with routing.record():
        moe(one)
    own = moe(other)
    with routing.replay():
        replayed = moe(other)
    first, alone, again = (experts for _, experts in seen)
    assert torch.equal(first, again)
    assert not torch.equal(first, alone)
    assert torch.equal(seen[2][0].reshape(12, 32), other.reshape(12, 32))
    ownout, output = (out[0] if isinstance(out, tuple) else out for out in (own, replayed))
    assert not torch.equal(ownout, output)
    final = moe(other)
    assert torch.equal(final[0] if isinstance(final, tuple) else final, ownout)  # the hooks are gone
