"""Running block by block is running the model, whatever the batch and the architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import ARCHITECTURES, tiny_model, windows
from thanos.engine.block_calls import BlockCalls, stop
from thanos.model.layers import find_blocks

LENGTH = 40  # beyond the sliding window of 24 that some of the tiny models have


def record(model: Any, ids: Tensor) -> tuple[BlockCalls, Tensor]:
    calls = BlockCalls(find_blocks(model)[1])
    return calls, torch.cat([calls.record(model, row[None]) for row in ids])


def block_inputs(model: Any, ids: Tensor) -> list[Tensor]:
    """What every block is handed, and the last one returns, when the whole model runs; from plain hooks."""
    seen: list[Tensor] = []
    blocks = find_blocks(model)[1]

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).clone())

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple | list) else output).clone())

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(after))
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


# BLOOM hands its blocks a bias of (batch · heads, 1, T); XGLM refuses a mask that is not (batch, 1, T, T);
# the first GPT's blocks return a list.
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "bloom", "openai-gpt", "xglm", "gemma-4"])
@torch.inference_mode()
def test_block_by_block_gives_the_whole_models_hidden_states_and_logits(architecture: str) -> None:
    model, ids = tiny_model(architecture), windows(5, LENGTH)
    logits = model(input_ids=ids, use_cache=False).logits
    expected = block_inputs(model, ids)
    calls, first = record(model, ids)
    torch.testing.assert_close(first, expected[0], rtol=1e-6, atol=1e-6)
    for batch in (1, 2, 3, 5):
        hidden = first
        for index in range(len(find_blocks(model)[1])):
            # Gemma 4: what a block stores is divided among the sequences, so the next one can have other batches.
            starts = range(0, len(ids), batch if index % 2 else 2)
            hidden = torch.cat([calls.run(index, hidden[i : i + starts.step], i, keep=True) for i in starts])
            torch.testing.assert_close(hidden, expected[index + 1], rtol=1e-4, atol=1e-5)
            picked = [3, 0, 4][:batch]  # in any order
            some = calls.run(index, expected[index][picked], picked)
            torch.testing.assert_close(some, expected[index + 1][picked], rtol=1e-4, atol=1e-5)
        seen: list[Tensor] = []
        handle = model.get_output_embeddings().register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
        calls.run_tail(model, ids, hidden)
        handle.remove()
        got = seen[0]
        if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
            got = torch.tanh(got / cap) * cap
        torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["mistral", "gemma-2", "gemma-3"])
@torch.inference_mode()
def test_the_sliding_window_matters_in_these_tests(architecture: str) -> None:
    # Otherwise the test above would not see a window that is lost: a model with a wider window must differ.
    ids = windows(1, LENGTH)
    narrow, wide = tiny_model(architecture), tiny_model(architecture, sliding_window=200)
    assert not torch.allclose(narrow(input_ids=ids).logits, wide(input_ids=ids).logits, atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gemma-3", "gpt-2"])
@torch.inference_mode()
def test_one_sequence_at_a_time_is_bit_identical(architecture: str) -> None:
    model, ids = tiny_model(architecture), windows(3, LENGTH)
    calls, hidden = record(model, ids)
    for index in range(len(find_blocks(model)[1])):
        hidden = torch.cat([calls.run(index, hidden[i : i + 1], i) for i in range(3)])
    for i in range(3):
        assert torch.equal(hidden[i : i + 1], block_inputs(model, ids[i : i + 1])[-1])


@pytest.mark.parametrize("architecture", ["llama", "gpt-2", "opt-125m"])
@torch.inference_mode()
def test_the_model_is_as_before_after_recording(architecture: str) -> None:
    model, ids = tiny_model(architecture), windows(2, 8)
    before = model(input_ids=ids).logits
    calls, hidden = record(model, ids)
    calls.run_tail(model, ids, hidden)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_error_while_recording_is_not_swallowed_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    calls = BlockCalls(find_blocks(model)[1])
    with pytest.raises(IndexError):
        calls.record(model, torch.tensor([[99999]]))
    assert not any("forward" in vars(module) for module in model.modules())


class Doubling(nn.Module):
    """A block in the old style: it returns a tuple, and is handed something that differs between sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, offset: Tensor, flags: list[Tensor], *, scale: float) -> tuple[Tensor]:
        return (self.linear(hidden_states) * scale + offset + flags[0],)


class OldStyle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(9, 4), nn.ModuleList([Doubling(), Doubling()])

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden = self.embed(input_ids)
        offset = input_ids[..., None].float() / 10
        for number, layer in enumerate(self.layers):
            (hidden,) = layer(hidden, offset, [offset * 2, offset], scale=2.0 + number)
        return hidden


@torch.inference_mode()
def test_blocks_that_return_tuples_and_arguments_that_differ_between_sequences() -> None:
    model, ids = OldStyle(), torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3], [7, 8, 0]])
    calls, hidden = record(model, ids)
    for index in range(2):
        hidden = torch.cat([calls.run(index, hidden[:3], 0), calls.run(index, hidden[3:], 3)])
    torch.testing.assert_close(hidden, model(ids))
    seen: list[Tensor] = []
    calls.run_tail(model, ids, hidden)  # unpacks a tuple, so this would raise if it were handed a tensor
    assert seen == []


@torch.inference_mode()
def test_stop_ends_a_pass_early_and_only_that() -> None:
    model, ids = tiny_model("llama"), windows(1, 8)
    calls, hidden = record(model, ids)
    reached: list[int] = []
    norm = model.model.norm.register_forward_pre_hook(lambda *_: stop())
    head = model.lm_head.register_forward_pre_hook(lambda *_: reached.append(1))
    calls.run_tail(model, ids, hidden)
    assert not reached
    norm.remove()
    calls.run_tail(model, ids, hidden)
    assert reached
    head.remove()


@torch.inference_mode()
def test_arguments_are_kept_once_for_all_sequences() -> None:
    # 64 sequences of one length share their masks and positions: the arguments may not grow with their number.
    model, ids = tiny_model("gemma-2"), windows(64, LENGTH)
    calls, _ = record(model, ids)

    def tensors(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, dict):
            value = list(value.values())
        return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []

    kept = {id(t): t.nbytes for t in tensors(calls._calls)}
    one = BlockCalls(find_blocks(model)[1])
    one.record(model, ids[:1])
    assert sum(kept.values()) == sum({id(t): t.nbytes for t in tensors(one._calls)}.values())
