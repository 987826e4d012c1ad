"""What is said of tensors that stay: damage only where a parameter is damaged, and a true reason for every other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import thanos
from helpers import save_tiny
from thanos.checkpoint.weight_files import SINGLE_NAME
from thanos.cli import run as command
from thanos.errors import NumericsError
from thanos.evaluation.inspect import inspect_checkpoint
from thanos.events import Event
from thanos.model.layers import linear_layers
from thanos.model.opening import open_model
from thanos.model.source import resolve_model
from thanos.model.unused import MTP
from thanos.run.report import PruningReport
from thanos.run.setup import prepare
from thanos.run.survey import sampled_sparsity

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(folder / SINGLE_NAME)
    change(state)
    save_file(
        {key: tensor.contiguous() for key, tensor in state.items()}, folder / SINGLE_NAME, metadata={"format": "pt"}
    )


def run(folder: Path, text_file: Path, **changes: Any) -> tuple[PruningReport, Path]:
    out = folder.parent / f"{folder.name}-out"
    values: dict[str, Any] = {"method": "wanda", "calibration": str(text_file), "samples": 2, "sequence_length": 16}
    return thanos.prune(folder, out, thanos.Recipe(**{**values, **changes})), out


def raw(folder: Path, key: str) -> tuple[torch.dtype, bytes]:
    with safe_open(folder / SINGLE_NAME, "pt") as file:
        tensor = file.get_tensor(key)
    return tensor.dtype, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


# --- tensors that no parameter needs ----------------------------------------------------------------------------------------

UNUSED = {
    "a mask with -inf in float16": ("model.layers.0.self_attn.masked_bias", torch.tensor(-INF, dtype=torch.float16)),
    "a buffer with NaN": ("model.layers.0.self_attn.scale", torch.full((3,), NAN)),
    "old rotary frequencies": ("model.layers.1.self_attn.rotary_emb.inv_freq", torch.tensor([1.0, INF])),
    "a head of another task": ("score.weight", torch.full((2, 32), -INF, dtype=torch.bfloat16)),
    "unsigned integers": ("model.layers.0.g_idx", torch.arange(3).to(torch.uint32)),
    "complex numbers": ("model.freqs_cis", torch.ones(3, dtype=torch.complex64)),
    "flags": ("model.layers.0.self_attn.bias", torch.ones(3, 3, dtype=torch.bool)),
}


def test_tensors_that_no_parameter_needs_are_copied_untouched(copy: Path, text_file: Path) -> None:
    edit(copy, lambda state: state.update(UNUSED.values()))
    AutoModelForCausalLM.from_pretrained(copy)  # the oracle: it loads
    report, out = run(copy, text_file)
    reasons = {record.name: record.reason for record in report.dense}
    for key, _ in UNUSED.values():
        assert reasons[key] == "no parameter of LlamaForCausalLM"
        assert raw(out, key) == raw(copy, key), key
    AutoModelForCausalLM.from_pretrained(out)
    inspected = {record.name: record.reason for record in inspect_checkpoint(out).dense}
    assert inspected["score.weight"] == reasons["score.weight"]


def test_the_head_of_a_tied_model(tmp_path: Path, text_file: Path) -> None:
    folder = save_tiny(tmp_path / "tied", "tinyllama")
    edit(folder, lambda state: state.update({"lm_head.weight": torch.full((320, 32), NAN)}))
    report, out = run(folder, text_file)
    reasons = {record.name: record.reason for record in report.dense}
    assert reasons["lm_head.weight"] == "copy of a tied weight: transformers does not read it"
    assert raw(out, "lm_head.weight") == raw(folder, "lm_head.weight")


# --- damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_parameter_that_stays_is_refused_before_the_work(
    tmp_path: Path, text_file: Path, bad: float, dtype: torch.dtype
) -> None:
    folder = save_tiny(tmp_path / "bad", dtype=dtype)
    edit(folder, lambda state: state["model.norm.weight"].__setitem__(3, bad))
    recipe = thanos.Recipe(calibration=str(text_file), samples=1, sequence_length=16)
    with pytest.raises(NumericsError, match=r"^model\.norm\.weight holds NaN or infinity; the checkpoint is damaged"):
        prepare(resolve_model(folder), recipe, lambda event: None)


@pytest.mark.parametrize("calibration", ["text", "self"])
@pytest.mark.parametrize(
    "name",
    [
        "0.self_attn.v_proj",
        "1.self_attn.q_proj",
        "1.self_attn.v_proj",
        "1.mlp.gate_proj",
        "1.mlp.down_proj",
        "2.mlp.down_proj",
    ],
)
def test_a_pruned_weight_is_named_at_its_block(copy: Path, text_file: Path, name: str, calibration: str) -> None:
    """NaN shows first in the inputs of another layer, or in the tokens that the model would draw."""
    key = f"model.layers.{name}.weight"
    edit(copy, lambda state: state[key].__setitem__((5, 7), NAN))
    with pytest.raises(
        NumericsError, match=rf"^{key.replace('.', '[.]')} holds NaN or infinity; the checkpoint is damaged"
    ):
        run(copy, text_file, calibration=str(text_file) if calibration == "text" else "self")
    assert [path.name for path in copy.parent.iterdir()] == ["copy"], "nothing is left of the run"


def test_reading_what_stays_tells_how_far_it_is(copy: Path, text_file: Path) -> None:
    events: list[Event] = []
    recipe = thanos.Recipe(calibration=str(text_file), samples=1, sequence_length=16, targets=("*.q_proj",))
    prepared = prepare(resolve_model(copy), recipe, events.append)
    told = [(event.done, event.total) for event in events if event.kind == "progress" and event.phase == "load"]
    stays = len(load_file(copy / SINGLE_NAME)) - 3
    assert told == [(done, stays) for done in range(1, stays + 1)]
    assert len(prepared.dense) == stays


# --- multi-token prediction -------------------------------------------------------------------------------------------------


def with_prediction_layer(architecture: str, folder: Path, keys: dict[str, Tensor], **changes: Any) -> Path:
    save_tiny(folder, architecture)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    edit(folder, lambda state: state.update(keys))
    return folder


PREDICTION: dict[str, tuple[str, dict[str, Tensor], dict[str, Any]]] = {
    "DeepSeek: behind the last block, counted": (
        "llama",
        {
            "model.layers.3.self_attn.q_proj.weight": torch.ones(32, 32),
            "model.layers.3.shared_head.norm.weight": torch.ones(32),
        },
        {"num_nextn_predict_layers": 1},
    ),
    "GLM: behind the last block, known by its parts": (
        "llama",
        {
            "model.layers.3.eh_proj.weight": torch.full((32, 64), NAN),
            "model.layers.3.enorm.weight": torch.ones(32),
            "model.layers.3.mlp.up_proj.weight": torch.ones(64, 32),
        },
        {},
    ),
    "Qwen: under a name of its own": (
        "qwen3",
        {"mtp.fc.weight": torch.ones(32, 64), "mtp.layers.0.mlp.up_proj.weight": torch.ones(64, 32)},
        {},
    ),
    "a mixture whose experts transformers fuses": (
        "qwen3-moe",
        {
            **{
                f"model.layers.2.mlp.experts.{n}.{part}_proj.weight": torch.ones(*shape)
                for n in range(4)
                for part, shape in {"gate": (24, 32), "up": (24, 32), "down": (32, 24)}.items()
            },
            "model.layers.2.hnorm.weight": torch.ones(32),
            "mtp.layers.0.mlp.experts.0.gate_proj.weight": torch.ones(24, 32),
        },
        {},
    ),
}


@pytest.mark.parametrize("case", PREDICTION)
def test_layers_for_multi_token_prediction_are_kept(case: str, tmp_path: Path, text_file: Path) -> None:
    architecture, keys, changes = PREDICTION[case]
    folder = with_prediction_layer(architecture, tmp_path / "model", keys, **changes)
    opened = open_model(resolve_model(folder))
    assert not opened.notes, "read tensor by tensor"
    report, out = run(folder, text_file)
    reasons = {record.name: record.reason for record in report.dense}
    assert {key: reasons[key] for key in keys} == dict.fromkeys(keys, MTP)
    assert MTP == "multi-token prediction layer: transformers does not run it"
    assert not any(layer.name in key for layer in report.layers for key in keys)
    note = f"the checkpoint has layers for multi-token prediction ({len(keys)} tensors): transformers does not run them"
    assert sum(line.startswith(note) for line in report.warnings) == 1
    for key in keys:
        assert raw(out, key) == raw(folder, key), key
    inspected = {record.name: record.reason for record in inspect_checkpoint(out).dense}
    assert {key: inspected[key] for key in keys} == dict.fromkeys(keys, MTP)


def test_layers_that_are_left_out_are_printed_once(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, keys, _ = PREDICTION["Qwen: under a name of its own"]
    beyond = {f"model.layers.{index}.mlp.up_proj.weight": torch.ones(64, 32) for index in (3, 4)}
    folder = with_prediction_layer("llama", tmp_path / "model", {**keys, **beyond})
    arguments = ["--calibration", str(text_file), "--samples", "1", "--sequence-length", "16", "--method", "magnitude"]
    assert command(["prune", str(folder), str(tmp_path / "out"), *arguments, "--quiet"]) == 0
    said = capsys.readouterr().err.splitlines()
    stay = "transformers does not run them, so they are copied without pruning"
    for note in (
        f"the checkpoint has layers for multi-token prediction (2 tensors): {stay}",
        f"the checkpoint has layers beyond the 3 of config.json (3 to 4): {stay}",
    ):
        assert [line.partition(": ")[2] for line in said if note in line] == [note]


def test_they_are_kept_where_transformers_loads_the_whole_model(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, keys, changes = PREDICTION["Qwen: under a name of its own"]
    folder = with_prediction_layer(architecture, tmp_path / "model", keys, **changes)
    monkeypatch.setattr("thanos.model.opening._open_streamed", lambda source, dtype, written_in: None)
    report, out = run(folder, text_file)
    assert {record.name: record.reason for record in report.dense}.items() >= dict.fromkeys(keys, MTP).items()
    for key in keys:
        assert raw(out, key) == raw(folder, key), key


def test_a_model_cut_short_by_its_config_has_no_prediction_layer(tmp_path: Path, text_file: Path) -> None:
    folder = save_tiny(tmp_path / "cut")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 2}))
    report, _ = run(folder, text_file)
    reasons = {record.name: record.reason for record in report.dense}
    expected = "layer 2, beyond the 2 of config.json: transformers does not run it"
    assert reasons["model.layers.2.self_attn.q_proj.weight"] == expected


# --- a model that is pruned already ------------------------------------------------------------------------------------------


def test_a_dense_model_gives_no_note(copy: Path, text_file: Path) -> None:
    report, _ = run(copy, text_file)
    assert report.model["sparsity"] == 0
    assert not any("pruned already" in line for line in report.warnings)


def test_a_pruned_model_says_so_and_the_report_keeps_its_sparsity(copy: Path, text_file: Path) -> None:
    _, once = run(copy, text_file)
    report, _ = run(once, text_file, sparsity=0.75)
    (note,) = [line for line in report.warnings if "pruned already" in line]
    assert "pruning.json" in note
    assert "about 50.0 %" in note
    assert report.model["sparsity"] == pytest.approx(0.5)
    assert report.totals["sparsity_targeted"] == pytest.approx(0.75)


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_the_command_says_so_once(
    quiet: list[str], copy: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, once = run(copy, text_file)
    words = ["--calibration", str(text_file), "--samples", "1", "--sequence-length", "16", "--sparsity", "0.75"]
    assert command(["prune", str(once), str(tmp_path / "twice"), *words, "--device", "cpu", *quiet]) == 0
    said = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines() if ": " in line]
    assert sum("pruned already" in line for line in said) == 1
    assert len(set(said)) == len(said), "nothing else is said twice either"


def test_a_resumed_run_says_what_the_run_before_it_found(
    copy: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, once = run(copy, text_file)
    words = ["prune", str(once), str(tmp_path / "twice"), "--calibration", str(text_file), "--samples", "1"]
    words += ["--sequence-length", "16", "--sparsity", "0.75", "--device", "cpu"]
    assert command(words) == 0
    capsys.readouterr()
    assert command([*words, "--resume"]) == 0, "complete already: nothing runs, so no note is shown"
    assert sum("pruned already" in line for line in capsys.readouterr().err.splitlines()) == 1


def test_a_smaller_model_says_so_without_zeros(copy: Path, text_file: Path) -> None:
    _, once = run(copy, text_file, pattern="neurons", sparsity=0.25, multiple_of=8)
    report, _ = run(once, text_file)
    (note,) = [line for line in report.warnings if "pruned already" in line]
    assert (
        note == "the model is pruned already (it has a pruning.json); errors are relative to it, not to the dense model"
    )
    assert report.model["sparsity"] == 0


@pytest.mark.parametrize(
    ("share", "layers", "says"), [(0.1, 3, True), (0.08, 3, False), (0.5, 1, False), (0.5, 2, True)]
)
def test_zeros_without_a_report_are_seen_too(
    copy: Path, text_file: Path, share: float, layers: int, says: bool
) -> None:
    """In most of the weights a tenth of zeros."""

    def change(state: dict[str, Tensor]) -> None:
        for key, tensor in state.items():
            if "_proj.weight" in key and int(key.split(".")[2]) < layers:
                tensor.view(-1)[torch.arange(tensor.numel()) % 50 < round(50 * share)] = 0

    edit(copy, change)
    report, _ = run(copy, text_file, sparsity=0.75)
    assert any("pruned already" in line for line in report.warnings) is says
    assert not any("pruning.json" in line for line in report.warnings)
    assert report.model["sparsity"] == pytest.approx(share * layers / 3, abs=0.005)


def test_a_sample_of_a_large_weight_is_spread_over_it(tmp_path: Path) -> None:
    """Half of the rows are zero, those at the end: a sample of the beginning alone would see none."""
    folder = save_tiny(tmp_path / "wide", "llama", intermediate_size=4096, num_hidden_layers=1)
    edit(folder, lambda state: state["model.layers.0.mlp.up_proj.weight"][2048:].zero_())
    opened = open_model(resolve_model(folder))
    (layer,) = [layer for layer in linear_layers(opened.meta_model) if layer.name.endswith("up_proj")]
    sparsity, pruned = sampled_sparsity(opened, [layer])
    assert sparsity == pytest.approx(0.5)
    assert pruned
