"""Random models of a given shape, on disk and in memory, and the times of pruning them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import thanos
from random_model import write_checkpoint
from thanos.bench import model as module
from thanos.bench.device_rates import Rates, measure_rates
from thanos.bench.model import floor_seconds, time_model
from thanos.bench.synthetic import SHAPES, Shape, random_checkpoint
from thanos.checkpoint.reader import SafetensorsCheckpoint
from thanos.cli import run
from thanos.errors import RecipeError
from thanos.events import Event

CPU = torch.device("cpu")
TINY = Shape(hidden=32, intermediate=48, heads=4, kv_heads=2, blocks=3, vocabulary=64)
RATES = Rates(model_flops=2e12, float32_flops=1e12, gram_flops=5e11, memory_bytes=1e12, to_device_bytes=1e9)


def recipe(**changes: object) -> thanos.Recipe:
    return thanos.Recipe(**{"samples": 4, "sequence_length": 16, "device": "cpu"} | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"heads": 5}, {"kv_heads": 3}, {"blocks": 0}])
def test_impossible_shapes_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="must be a multiple"):
        replace(TINY, **change)


def test_known_shapes_have_their_models_parameters() -> None:
    for name, billions in (
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.55),
        ("llama-3-405b", 405.85),
        ("llama-2-7b", 6.74),
    ):
        shape = SHAPES[name]
        block = sum(rows * columns for rows, columns in shape.layers.values()) + 2 * shape.hidden
        total = shape.blocks * block + 2 * shape.vocabulary * shape.hidden + shape.hidden
        assert total / 1e9 == pytest.approx(billions, abs=0.005), name


def test_a_checkpoint_on_disk_is_a_model_that_transformers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = write_checkpoint(tmp_path / "m", TINY, length=32)
    assert size == sum(path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert loaded.dtype == torch.bfloat16
    _, made = random_checkpoint(TINY, 32)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, made.read(name)), name
    ids = AutoTokenizer.from_pretrained(tmp_path / "m")("5 63 7", add_special_tokens=False)["input_ids"]
    assert ids == [5, 63, 7]
    assert bool(torch.isfinite(loaded(input_ids=torch.tensor([ids])).logits).all())
    q = loaded.model.layers[0].self_attn.q_proj.weight.float()
    assert q.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert torch.linalg.matrix_rank(q) == 32


def test_large_checkpoints_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thanos.bench.synthetic._SHARD_BYTES", 20_000)
    write_checkpoint(tmp_path, TINY)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert len(checkpoint.layout.shards) > 2
    _, made = random_checkpoint(TINY, 32)
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.read(name), made.read(name))


def test_a_timed_model_goes_through_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[thanos.Event] = []
    written: list[str] = []
    monkeypatch.setattr(module._Discard, "write", lambda self, name, tensor: written.append(name))
    result = time_model(TINY, recipe(), CPU, blocks=2, on_event=events.append)
    assert [e.layer for e in events if e.kind == "layer"] == [name.removesuffix(".weight") for name in written]
    assert len(written) == 14
    assert (result.blocks, len(result.block_seconds), result.batch, result.activations) == (2, 2, 4, "host")
    assert result.seconds == pytest.approx(sum(phase.seconds for phase in result.phases.values()))
    middle = sum(result.block_seconds) / 2
    assert result.whole_seconds == pytest.approx(result.seconds + middle)
    assert set(result.solve_seconds) == set(TINY.layers)
    assert 0 < result.mean_error < 1
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_result_can_be_written(tmp_path: Path) -> None:
    seen: list[int] = []
    result = time_model(
        TINY, recipe(), CPU, out=tmp_path, on_event=lambda e: seen.append(len(list(tmp_path.glob("*/*.safetensors"))))
    )
    assert set(seen) == {1}
    assert result.written
    assert result.whole_seconds == result.seconds  # all blocks were measured
    assert list(tmp_path.iterdir()) == []


def test_the_floor_is_operations_over_rates() -> None:
    shape = Shape(hidden=4, intermediate=8, heads=2, kv_heads=1, blocks=2, vocabulary=9)
    asked = recipe(samples=3, sequence_length=5)
    tokens, weights = 15, 4 * 4 + 2 * 2 * 4 + 4 * 4 + 3 * 4 * 8
    forward = 2 * tokens * weights + 2 * tokens * 5 * 4  # per block; causal attention is half of 4·T·T·d a sequence
    floor = floor_seconds(shape, asked, RATES)
    assert floor["propagate"] == pytest.approx(forward / 2e12)
    gram = 2 * tokens * (3 * 4**2 + 8**2)
    assert floor["statistics"] == pytest.approx(2 * ((forward - 2 * tokens * 32) / 2e12 + gram / 5e11))
    layers = [(4, 4), (2, 4), (2, 4), (4, 4), (8, 4), (8, 4), (4, 8)]
    cost = sum(4 * rows * columns**2 for rows, columns in layers) + 2 / 3 * (3 * 4**3 + 8**3)
    assert floor["solve"] == pytest.approx(2 * cost / 1e12)
    assert floor_seconds(shape, recipe(method="wanda"), RATES)["solve"] < floor["solve"]
    many = recipe(samples=80, sequence_length=5)  # of which 8 are the sample
    whole, norms, nothing = (
        floor_seconds(shape, many.replace(method=method), RATES)["statistics"]
        for method in ("thanos", "wanda", "magnitude")
    )
    tokens = 400
    forward = 2 * tokens * weights + 2 * tokens * 5 * 4 - 2 * tokens * 32
    gram = 2 * tokens * (3 * 4**2 + 8**2)
    assert whole == pytest.approx(2 * (forward / 2e12 + gram / 5e11))
    assert norms == pytest.approx(2 * (forward / 2e12 + 0.1 * gram / 5e11))
    assert nothing == pytest.approx(0.1 * whole)
    assert floor_seconds(shape, many.replace(method="magnitude", measure_error=False), RATES)["statistics"] == 0
    assert floor["load"] == floor["write"] == pytest.approx(2 * 2 * weights / 1e9)


def test_rates_are_measured() -> None:
    rates = measure_rates(CPU, torch.float32).to_dict()
    assert all(1e7 < value < 1e17 for value in rates.values()), rates


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [
        "--hidden",
        "32",
        "--intermediate",
        "48",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--vocabulary",
        "64",
        "--model-blocks",
        "3",
    ]
    arguments = ["bench", "model", *sizes, "--samples", "2", "--sequence-length", "8", "--quiet", "--device", "cpu"]
    assert run([*arguments, "--blocks", "2", "--json", str(tmp_path / "t.json")]) == 0
    shown = capsys.readouterr().out
    assert "all 3 blocks, estimated from 2" in shown
    values = json.loads((tmp_path / "t.json").read_text())
    assert values["schema"] == 1
    assert values["shape"]["hidden"] == 32
    assert values["machine"]["versions"]["thanos"]
    assert run(["bench", "model", "--shape", "gpt-5"]) == 2
    assert "llama-3-8b" in capsys.readouterr().err


def test_the_progress_of_a_bench_tells_true_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_rates", lambda *_: RATES)
    events: list[Event] = []
    time_model(TINY, recipe(), CPU, on_event=events.append)
    blocks = [event for event in events if event.kind == "block"]
    assert len(blocks) == TINY.blocks
    seconds = [event.seconds for event in events]
    assert seconds == sorted(seconds)
    assert all(event.seconds > 0 for event in blocks)
    least = 10 << 20  # a process that holds torch takes more than 10 MiB
    assert all(event.host_peak_bytes >= event.host_bytes > least for event in blocks)
