"""The stage that tunes blocks, on whole models: against hidden states of plain models, resumed, in every architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import thanos
from helpers import ARCHITECTURES, MIXTURES, packed_windows, prose, save_tiny, tiny_model, tiny_tokenizer
from launching import spawn
from reports import contents
from thanos import errors as thanos_errors
from thanos.engine.block_runner import Passes
from thanos.engine.stages import tune as stage_module
from thanos.engine.stages.base import BlockContext
from thanos.engine.stages.tune_cost import tuning_passes
from thanos.model.experts import router_parameters, unfuse
from thanos.model.layers import find_blocks

SAMPLES, HELD_OUT, LENGTH = 24, 4, 48


class Stop(Exception):  # noqa: N818  it is a signal, not an error
    """Ends a run in a test."""


def recipe(text: Path, **changes: Any) -> thanos.Recipe:
    """A recipe whose method compensates nothing, so that a few steps on a few sequences gain something."""
    settings = {"calibration": str(text), "samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu"}
    tuning = {"method": "magnitude", "tune": 3, "held_out": HELD_OUT, "tune_rate": 0.003}
    if changes.get("tune", 1) in (0, None):  # then nothing uses the others
        tuning = {"method": "magnitude"}
    return thanos.Recipe(**settings | tuning | changes)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def hidden_states(folder: Path, ids: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """What each block of a plain model returns, (sequences, T, d)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    outputs: list[Tensor] = []
    for block in find_blocks(model)[1]:
        block.register_forward_hook(lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return outputs


def save_dense(folder: Path, architecture: str, dtype: torch.dtype) -> Path:
    """As ``save_tiny``; but transformers reads every Qwen2 tokenizer as byte-level BPE, so give it one."""
    save_tiny(folder, architecture, dtype=dtype)
    if architecture == "qwen2":
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator([prose(2000)], vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"])
        fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
        fast.save_pretrained(folder)
    return folder


def error(outputs: Tensor, wanted: Tensor) -> float:
    difference = outputs.double() - wanted.double()
    return (difference.square().sum() / wanted.double().square().sum()).item()


# --- what is reached, and what stays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_errors_are_those_of_whole_models_and_fall(dtype: torch.dtype, text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", dtype=dtype)
    plain = thanos.prune(dense, tmp_path / "plain", recipe(text_file, tune=0))
    report = thanos.prune(dense, tmp_path / "tuned", recipe(text_file))
    assert plain.tuning == []
    ids = packed_windows(tiny_tokenizer(), text_file.read_text(), SAMPLES, LENGTH)
    wanted, first, last = (hidden_states(tmp_path / name, ids, dtype) for name in ("dense", "plain", "tuned"))
    held, sample = slice(SAMPLES - HELD_OUT, None), [0, 5, 10, 15]
    loose = 1e-3 if dtype == torch.float32 else 0.05  # batches of other sizes have other last bits
    assert [record.block for record in report.tuning] == [0, 1, 2]
    for block, record in enumerate(report.tuning):
        assert record.held_out_before is not None
        assert record.held_out_after is not None
        assert record.held_out_after < record.held_out_before
        assert record.held_out_after == pytest.approx(error(last[block][held], wanted[block][held]), rel=loose)
        assert record.error_after == pytest.approx(error(last[block][sample], wanted[block][sample]), rel=loose)
        assert (record.epochs, len(record.losses), record.reason) == (3, 3, "")
        assert (record.sequences, record.held_out_sequences) == (SAMPLES - HELD_OUT, HELD_OUT)
        assert record.held_out_unrounded == pytest.approx(record.held_out_after, rel=0.2)
        assert record.seconds > 0
    assert report.tuning[0].held_out_before == pytest.approx(error(first[0][held], wanted[0][held]), rel=loose)
    # Repaired block by block, the last block's outputs are nearer to the dense model's than without.
    assert error(last[-1][held], wanted[-1][held]) < 0.9 * error(first[-1][held], wanted[-1][held])


def test_the_errors_by_token_are_those_of_whole_models(text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense")
    report = thanos.prune(dense, tmp_path / "out", recipe(text_file, tune_loss="token"))
    ids = packed_windows(tiny_tokenizer(), text_file.read_text(), SAMPLES, LENGTH)[-HELD_OUT:]
    wanted, now = (hidden_states(tmp_path / name, ids, torch.float32) for name in ("dense", "out"))
    for block, record in enumerate(report.tuning):
        change, whole = ((now[block] - wanted[block]).double(), wanted[block].double())
        expected = (change.square().sum(-1) / whole.square().sum(-1)).mean().item()
        assert record.kept_epoch
        assert record.held_out_after == pytest.approx(expected, rel=1e-3)
    assert 'tune_loss = "token"' in (tmp_path / "out/recipe.toml").read_text()


def test_zeros_stay_and_every_other_parameter_of_the_blocks_may_change(text_file: Path, tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", "qwen2", torch.bfloat16)  # with biases
    thanos.prune(dense, tmp_path / "plain", recipe(text_file, pattern="2:4", tune=0))
    report = thanos.prune(dense, tmp_path / "tuned", recipe(text_file, pattern="2:4"))
    before, after, given = weights(tmp_path / "plain"), weights(tmp_path / "tuned"), weights(dense)
    pruned = {f"{layer.name}.weight" for layer in report.layers}
    assert all(layer.changed_by == ["tune"] for layer in report.layers)
    for name, value in after.items():
        assert value.dtype == torch.bfloat16
        if ".layers." not in name:
            assert torch.equal(value, given[name])
            continue
        assert not torch.equal(value, before[name]), name
        if name in pruned and ".layers.0." in name:  # the mask of a later block depends on the tuned ones before it
            assert torch.equal(value == 0, before[name] == 0)
    assert not thanos.inspect_checkpoint(tmp_path / "tuned", require="2:4").violations
    elsewhere = sum(int((value == 0).sum()) for name, value in after.items() if name not in pruned)
    assert report.totals["zeros_all"] == sum(layer.zeros for layer in report.layers) + elsewhere


@pytest.mark.parametrize(
    ("choice", "left"),
    [
        ({"skip": ("v_proj",)}, ("v_proj",)),
        ({"overrides": (thanos.Override(match="layers.1.self_attn.q_proj", skip=True),)}, ("1.self_attn.q_proj",)),
        ({"targets": ("*.mlp.*", "k_proj")}, ("q_proj", "v_proj", "o_proj")),
    ],
)
def test_a_layer_that_the_recipe_leaves_dense_keeps_its_bytes(
    choice: dict[str, Any], left: tuple[str, ...], text_file: Path, tmp_path: Path
) -> None:
    dense = save_dense(tmp_path / "dense", "qwen2", torch.bfloat16)  # q, k and v have biases
    report = thanos.prune(dense, tmp_path / "tuned", recipe(text_file, **choice))
    assert all(record.kept_epoch for record in report.tuning)
    given, after = weights(dense), weights(tmp_path / "tuned")
    kept = {name for name in given if ".layers." in name and name.rpartition(".")[0].endswith(left)}
    assert len({name.rpartition(".")[2] for name in kept}) == 2  # weights and biases
    for name, value in given.items():
        stays = name in kept or ".layers." not in name
        assert torch.equal(value.view(torch.uint8), after[name].view(torch.uint8)) == stays, name


def test_zeros_of_a_bias_that_are_tuned_are_counted_again(text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", "opt-125m")
    model = AutoModelForCausalLM.from_pretrained(dense)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    model.save_pretrained(dense)
    report = thanos.prune(dense, tmp_path / "out", recipe(text_file))
    assert all(record.zeros_elsewhere < 0 for record in report.tuning)
    zeros = sum(int((value == 0).sum()) for value in weights(tmp_path / "out").values())
    assert report.totals["zeros_all"] == zeros


def test_a_layer_whose_own_setting_is_0_keeps_its_weight(text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense")
    fixed = thanos.Override(match="down_proj", settings={"tune": 0})
    outside = thanos.Override(match="model.layers.1.*", settings={"tune": 0})
    report = thanos.prune(dense, tmp_path / "out", recipe(text_file, overrides=(fixed, outside)))
    assert [record.block for record in report.tuning] == [0, 2]
    for layer in report.layers:
        tuned = layer.block != 1 and not layer.name.endswith("down_proj")
        assert layer.changed_by == (["tune"] if tuned else None)
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(weights(tmp_path / "out")[norm], weights(dense)[norm])


def test_with_no_epochs_the_output_is_that_of_a_run_without_the_setting(text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense")
    plain = recipe(text_file, tune=None)
    thanos.prune(dense, tmp_path / "plain", plain)
    thanos.prune(dense, tmp_path / "zero", plain.replace(tune=0))
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "zero")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "tuning" not in json.loads((tmp_path / "plain/pruning.json").read_text())


# --- every architecture --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_gains(architecture: str, text_file: Path, tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", architecture, torch.bfloat16)
    report = thanos.prune(dense, tmp_path / "out", recipe(text_file, tune=2))
    for record in report.tuning:
        assert not record.reason
        assert (record.held_out_after or 0) < (record.held_out_before or 0)
    assert all(layer.sparsity == pytest.approx(0.5, abs=0.02) for layer in report.layers)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_mixture_keeps_its_router(architecture: str, text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", architecture)
    thanos.prune(dense, tmp_path / "plain", recipe(text_file, tune=0))
    report = thanos.prune(dense, tmp_path / "out", recipe(text_file))
    assert all(record.kept_epoch for record in report.tuning)
    before, after, given = weights(tmp_path / "plain"), weights(tmp_path / "out"), weights(dense)
    gates = [name for name in after if name.endswith(("gate.weight", "expert_gate.weight"))]
    assert len(gates) >= 2
    for name, value in after.items():
        if name in gates or ".layers." not in name:
            assert torch.equal(value, given[name]), name
        elif ".layers.0." in name:
            assert not torch.equal(value, before[name]), name
            if value.dim() > 1:
                assert torch.equal(value == 0, before[name] == 0), name


def test_the_routers_of_a_block_are_found_by_their_rows() -> None:
    for architecture in (*MIXTURES, "llama"):
        model = tiny_model(architecture)
        unfuse(model)
        expected = {"mlp.gate.weight"} if architecture in MIXTURES else set()
        expected |= {"mlp.shared_expert_gate.weight"} if architecture == "qwen2-moe" else set()
        assert router_parameters(find_blocks(model)[1][0]) == expected


# --- interrupted, in several processes, with nothing gained --------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "block"), [("llama", 0), ("llama", 1), ("llama", 2), ("gemma-4", 3)])
def test_a_run_that_is_interrupted_while_it_tunes_resumes_to_the_same_bytes(
    architecture: str, block: int, text_file: Path, tmp_path: Path
) -> None:
    dense = save_tiny(tmp_path / "dense", architecture, dtype=torch.bfloat16)
    settings = recipe(text_file)
    thanos.prune(dense, tmp_path / "whole", settings)
    seen = 0

    def watch(event: thanos.Event) -> None:
        nonlocal seen
        seen += event.phase == "tune" and event.kind == "progress" and event.block == block
        if seen == 3:
            raise Stop

    with pytest.raises(Stop):
        thanos.prune(dense, tmp_path / "out", settings, on_event=watch)
    if block:
        lines = (tmp_path / ".out.partial/journal.jsonl").read_text().splitlines()
        assert [json.loads(line)["tuning"]["block"] for line in lines] == list(range(block))
    report = thanos.prune(dense, tmp_path / "out", settings, resume=bool(block))
    assert len(report.tuning) == (4 if architecture == "gemma-4" else 3)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_seed_is_the_recipes_and_the_blocks(text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense")
    first, again, other = (
        thanos.prune(dense, tmp_path / f"out{number}", recipe(text_file, seed=seed))
        for number, seed in enumerate((0, 0, 1))
    )
    assert first.tuning[0].losses == again.tuning[0].losses
    assert first.tuning[0].losses != other.tuning[0].losses


def test_where_nothing_is_gained_the_report_says_so(text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", dtype=torch.bfloat16)
    settings = recipe(text_file, tune_rate=1e-9)
    report = thanos.prune(dense, tmp_path / "out", settings)
    thanos.prune(dense, tmp_path / "plain", recipe(text_file, tune=0))
    one, other = weights(tmp_path / "out"), weights(tmp_path / "plain")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert report.warnings == [
        f"block {block} is left as it was before tuning: the held-out error did not fall" for block in (1, 2, 3)
    ]
    assert all(layer.changed_by is None for layer in report.layers)
    assert all(record.held_out_after == record.held_out_before for record in report.tuning)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_read_what_earlier_ones_stored_are_tuned_too(
    dtype: torch.dtype, text_file: Path, tmp_path: Path
) -> None:
    """In tuning they get the keys and values of the batch's own sequences, those of the tuned blocks before."""
    dense = save_tiny(tmp_path / "dense", "gemma-4", dtype=dtype)
    report = thanos.prune(dense, tmp_path / "tuned", recipe(text_file))
    ids = packed_windows(tiny_tokenizer(), text_file.read_text(), SAMPLES, LENGTH)
    wanted, now = (hidden_states(tmp_path / name, ids, dtype) for name in ("dense", "tuned"))
    held, loose = slice(SAMPLES - HELD_OUT, None), 1e-3 if dtype == torch.float32 else 0.05
    assert [record.block for record in report.tuning] == [0, 1, 2, 3]
    for block, record in enumerate(report.tuning):
        assert record.kept_epoch
        assert record.held_out_after == pytest.approx(error(now[block][held], wanted[block][held]), rel=loose)
        assert record.held_out_unrounded == pytest.approx(record.held_out_after, rel=0.2)


def test_without_room_the_hidden_states_leave_the_device_and_tuning_starts_again(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save_tiny(tmp_path / "dense")
    thanos.prune(dense, tmp_path / "whole", recipe(text_file))
    spilled: list[str] = []

    def failing(work: Any, **settings: Any) -> Any:
        if not spilled:
            raise torch.OutOfMemoryError("no room")
        return original(work, **settings)

    original = stage_module.tune
    monkeypatch.setattr(stage_module, "tune", failing)
    with pytest.raises(thanos_errors.ResourceError):  # the hidden states are in host memory already
        thanos.prune(dense, tmp_path / "out", recipe(text_file))
    monkeypatch.setattr(BlockContext, "on_device", True)
    monkeypatch.setattr(Passes, "spill", lambda self: spilled.append("moved") or "the activations move")
    report = thanos.prune(dense, tmp_path / "out", recipe(text_file))
    assert report.warnings == ["the activations move"]
    one, other = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_events_tell_the_losses(text_file: Path, tmp_path: Path) -> None:
    seen: list[thanos.Event] = []
    dense = save_tiny(tmp_path / "dense")
    report = thanos.prune(dense, tmp_path / "out", recipe(text_file), on_event=seen.append)
    steps = [event for event in seen if event.phase == "tune" and event.kind == "progress" and event.block == 1]
    assert [event.done for event in steps][-1] == steps[0].total == 3 * (SAMPLES - HELD_OUT)
    assert steps[-1].tokens == steps[-1].done * LENGTH
    assert steps[0].loss is None
    assert (steps[-1].loss, steps[-1].held_out) == (report.tuning[1].losses[2], report.tuning[1].held_out_after)
    assert {event.held_out_before for event in steps} == {report.tuning[1].held_out_before}
    assert "tune" in report.phases
    card = (tmp_path / "out/README.md").read_text()
    assert "3 of 3 blocks were then tuned with their zeros fixed" in card


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "size"), [("llama", 2), ("olmoe", 3)])
def test_several_processes_tune_like_one(architecture: str, size: int, text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", architecture)
    settings = recipe(text_file, targets=("layers.0.*",))  # the masks of later blocks could differ
    alone = thanos.prune(dense, tmp_path / "alone", settings)
    spawn(thanos.prune, size, tmp_path, dense, tmp_path / "out", settings)
    together = thanos.PruningReport.read(tmp_path / "out/pruning.json")
    assert together.tuning[0].kept_epoch == alone.tuning[0].kept_epoch > 0
    assert together.tuning[0].held_out_after == pytest.approx(alone.tuning[0].held_out_after, rel=1e-3)
    assert together.tuning[0].losses == pytest.approx(alone.tuning[0].losses, rel=1e-3)
    one, other = weights(tmp_path / "alone"), weights(tmp_path / "out")
    for name, value in one.items():
        assert torch.equal(value == 0, other[name] == 0), name
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


# --- costs ---------------------------------------------------------------------------------------------------------------


def test_costs() -> None:
    assert tuning_passes(10, 128, 8) == 10 * (3 * 120 + 16) + 24
