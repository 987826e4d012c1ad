"""The loop: order, events, what is in memory, and what the report says when a layer's inputs are poor."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import thanos
from helpers import packed_windows, save_tiny, tiny_tokenizer
from thanos.calibration.statistics import InputGroup
from thanos.engine import block_runner as passes
from thanos.engine.block_calls import BlockCalls
from thanos.engine.block_runner import Passes, most_sequences
from thanos.engine.output import Output
from thanos.engine.records import BlockRecord
from thanos.engine.stages import prune as engine
from thanos.model.source import resolve_model
from thanos.run import engine_setup, setup
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.prune_layer import PrunedWeight, prune_layer
from thanos.system.meter import PhaseMeter

SAMPLES, LENGTH = 4, 32
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def recipe(text: Path, **changes: Any) -> thanos.Recipe:
    return thanos.Recipe(
        **{"calibration": str(text), "samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu"} | changes
    )


def edited(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    save_tiny(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def by_name(report: thanos.PruningReport) -> dict[str, Any]:
    return {layer.name: layer for layer in report.layers}


# --- order and events -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[thanos.Event]]:
    events: list[thanos.Event] = []
    out = tmp_path_factory.mktemp("engine") / "out"
    settings = recipe(text_file, targets=("layers.*", "lm_head"), skip=("layers.1.*",))
    return thanos.prune(tiny_llama, out, settings, on_event=events.append), events


def test_layers_are_pruned_block_by_block_in_the_order_in_which_they_are_called(run) -> None:
    report, _ = run
    assert [layer.block for layer in report.layers] == [0] * 7 + [2] * 7 + [None]
    kinds = [layer.name.rsplit(".", 1)[-1] for layer in report.layers]
    assert kinds == [*KINDS, *KINDS, "lm_head"]


def test_a_part_of_the_blocks_can_be_run(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    chosen = recipe(text_file, targets=("layers.*", "lm_head"))
    prepared = setup.prepare(resolve_model(tiny_llama), chosen, lambda event: None, look=False)

    class Nowhere:
        def __init__(self) -> None:
            self.written: list[str] = []
            self.finished: dict[int | None, Any] = {}

        def write(self, name: str, tensor: Tensor) -> None:
            self.written.append(name)

        def record(self, record: BlockRecord, written: Sequence[str]) -> None:
            assert record.block in wanted

    cpu, ids = torch.device("cpu"), torch.randint(2, 100, (SAMPLES, LENGTH))
    for wanted in ([1], [0, 2], [None]):
        out: Any = Nowhere()
        loop = engine_setup.build_engine(
            prepared, chosen, ids, cpu, tmp_path, activations="auto", writer=out, journal=out, meter=PhaseMeter(cpu)
        )
        blocks = [event.block for event in loop.run(wanted) if event.kind == "block"]
        assert blocks == [block for block in wanted if block is not None]
        names = [layer.name for layer in prepared.layers if layer.block in wanted]
        assert [record.name for record in loop.records] == names
        assert out.written == [prepared.opened.key_of[f"{name}.weight"] for name in names]


def test_events_tell_every_phase_layer_and_block(run) -> None:
    report, events = run
    assert [e.layer for e in events if e.kind == "layer"] == [layer.name for layer in report.layers]
    assert [e.error for e in events if e.kind == "layer"] == [r.error_after_compensation for r in report.layers]
    for block in (0, 2):
        counted = [(e.done, e.total) for e in events if e.kind == "layer" and e.block == block]
        assert counted == [(n, 7) for n in range(1, 8)]
    assert [e.block for e in events if e.kind == "block"] == [0, 1, 2]
    phases = [(e.block, e.phase) for e in events if e.kind == "phase"]
    assert phases == [
        (None, "load"),
        (None, "calibration"),
        (None, "calibration"),
        *((0, phase) for phase in ("statistics", "solve", "propagate")),
        (1, "propagate"),
        *((2, phase) for phase in ("statistics", "solve", "propagate")),
        (None, "statistics"),
        (None, "solve"),
        (None, "finish"),
    ]
    assert all(e.blocks == 3 for e in events if e.block is not None)
    seconds = [e.seconds for e in events if e.kind in ("layer", "block")]
    assert seconds == sorted(seconds)


def test_progress_counts_all_sequences_and_tokens(run) -> None:
    _, events = run
    for phase in ("statistics", "propagate"):
        last = [e for e in events if e.kind == "progress" and e.phase == phase and e.block == 0][-1]
        assert (last.done, last.total, last.tokens) == (SAMPLES, SAMPLES, SAMPLES * LENGTH)


@pytest.mark.parametrize("tokens", [1, LENGTH, 3 * LENGTH])
def test_the_batch_size_changes_nothing_but_rounding(
    tokens: int, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = thanos.prune(tiny_llama, tmp_path / "one", recipe(text_file))
    sizes: list[int] = []
    original = BlockCalls.run

    def spy(self: BlockCalls, index: int, hidden: Tensor, first: int, **how: bool) -> Tensor:
        sizes.append(len(hidden))
        return original(self, index, hidden, first, **how)

    monkeypatch.setattr(BlockCalls, "run", spy)
    monkeypatch.setitem(passes.BATCH_TOKENS, "cpu", tokens)
    other = thanos.prune(tiny_llama, tmp_path / "other", recipe(text_file))
    assert max(sizes) == max(1, tokens // LENGTH)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    for name in a:
        assert torch.equal(a[name] == 0, b[name] == 0), name
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    assert [layer.tokens for layer in other.layers] == [layer.tokens for layer in one.layers]


def test_only_one_block_is_in_memory_at_a_time(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[nn.Module] = []
    original = BlockCalls.record

    def spy(self: BlockCalls, model: nn.Module, ids: Tensor) -> Tensor:
        models.append(model)
        present = {name for name, p in model.named_parameters() if p.device.type != "meta"}
        assert not any(name.startswith("model.layers.") for name in present)
        return original(self, model, ids)

    monkeypatch.setattr(BlockCalls, "record", spy)
    present: list[tuple[int | None, set[str]]] = []

    def watch(event: thanos.Event) -> None:
        if event.kind in ("layer", "progress") and event.block is not None:
            names = {name for name, p in models[0].named_parameters() if p.device.type != "meta"}
            present.append((event.block, {".".join(name.split(".")[:3]) for name in names}))

    thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file), on_event=watch)
    assert present
    assert all(names == {f"model.layers.{block}"} for block, names in present)
    assert all(p.device.type == "meta" for p in models[0].parameters())


# --- poor inputs: reported, never silent ------------------------------------------------------------------------------------


def test_a_hessian_goes_when_its_layers_are_done(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    left_by_other_tests = [thing for thing in gc.get_objects() if type(thing) is InputGroup]
    others = {id(thing) for thing in left_by_other_tests}

    def watched(hessian: Tensor, **arguments: Any) -> InputStatistics:
        made.append(weakref.ref(hessian))
        return InputStatistics(hessian, **arguments)

    def pruned(*arguments: Any, **named: Any) -> PrunedWeight:
        alive.append(sum(type(thing) is InputGroup and id(thing) not in others for thing in gc.get_objects()))
        return prune_layer(*arguments, **named)

    monkeypatch.setattr(engine, "InputStatistics", watched)
    monkeypatch.setattr(engine, "prune_layer", pruned)
    thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file))
    # A block's distinct inputs: of q, k and v; of o; of gate and up; of down.
    assert alive == [4, 4, 4, 3, 2, 2, 1] * 3
    assert len(made) == 12
    assert not any(reference() is not None for reference in made)


def test_what_ran_out_of_memory_is_gone_before_it_is_tried_again(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden states move off the device first; the failed attempt's tensors must not stay alive meanwhile."""
    left: list[weakref.ref[Tensor]] = []
    spilled: list[bool] = []

    def pruned(*arguments: Any, **named: Any) -> PrunedWeight:
        if not left:
            big = torch.zeros(8)
            left.append(weakref.ref(big))
            raise torch.OutOfMemoryError("no room")
        return prune_layer(*arguments, **named)

    def spill(run: Passes) -> str:
        spilled.append(left[0]() is None)
        return "the activations move to the host"

    monkeypatch.setattr(engine, "prune_layer", pruned)
    monkeypatch.setattr(Passes, "tier", "device")
    monkeypatch.setattr(Passes, "spill", spill)
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file))
    assert spilled == [True]
    assert report.warnings == ["the activations move to the host"]
    assert len(report.layers) == 21


@pytest.mark.parametrize("method", ["thanos", "sparsegpt", "wanda"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "columns"])
def test_a_layer_that_no_token_reaches_is_pruned_by_magnitude_and_reported(
    method: str,
    pattern: str,
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file, method=method, pattern=pattern))
    thanos.prune(tiny_llama, tmp_path / "magnitude", recipe(text_file, method="magnitude", pattern=pattern))
    layers = by_name(report)
    got, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "magnitude"))
    for name, layer in layers.items():
        if name.endswith("gate_proj"):
            assert (layer.method, layer.tokens, layer.damping) == ("magnitude", 0, None)
            (warning,) = layer.warnings
            assert warning.startswith("calibration saw no input of this layer (")
            assert warning.endswith(f"): pruned by magnitude, not {method}")
            assert torch.equal(got[f"{name}.weight"], expected[f"{name}.weight"])
        else:
            assert (layer.method, layer.tokens) == (method, SAMPLES * LENGTH)
    assert len(layers) == 21


def test_magnitude_asked_for_is_no_fallback(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file, method="magnitude"))
    assert not any("not magnitude" in line for layer in report.layers for line in layer.warnings)


def test_a_layer_whose_inputs_are_all_zero_is_reported_truthfully(text_file: Path, tmp_path: Path) -> None:
    model = edited(tmp_path / "m", lambda t: t["model.layers.1.input_layernorm.weight"].zero_())
    layer = by_name(thanos.prune(model, tmp_path / "out", recipe(text_file)))["model.layers.1.self_attn.q_proj"]
    assert (layer.method, layer.tokens) == ("magnitude", SAMPLES * LENGTH)
    assert layer.error_before_compensation is layer.error_after_compensation is None
    [line] = layer.warnings
    assert "pruned by magnitude, not thanos" in line
    assert "saw no input" not in line  # 128 did; they carried nothing


def test_fewer_tokens_than_columns_is_a_warning_with_the_numbers(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file, samples=2, sequence_length=20))
    for layer in report.layers:
        few = [line for line in layer.warnings if "calibration tokens" in line]
        if layer.name.endswith("down_proj"):  # 64 columns; the others have 32
            assert len(few) == 1
            assert re.search(r"\b40 calibration tokens for 64 input columns", few[0])
        else:
            assert few == []
        assert layer.tokens == 40


def test_dead_columns_are_counted(text_file: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.input_layernorm.weight"][[3, 17]] = 0
        tensors["model.layers.2.mlp.up_proj.weight"][5] = 0

    report = thanos.prune(edited(tmp_path / "m", change), tmp_path / "out", recipe(text_file))
    dead = {
        layer.name.removeprefix("model.layers."): [line for line in layer.warnings if "always zero" in line]
        for layer in report.layers
    }
    for kind in ("q", "k", "v"):
        assert dead.pop(f"1.self_attn.{kind}_proj") == ["2 of 32 input columns were always zero"]
    [line] = dead.pop("2.mlp.down_proj")  # pruning may empty further rows of up_proj, never fewer
    assert int(line.split()[0]) >= 1
    assert line.endswith("of 64 input columns were always zero")
    assert not any(dead.values())
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in written.values())


def first_block_hessian(folder: Path, text: Path, samples: int, length: int) -> Tensor:
    ids = packed_windows(tiny_tokenizer(), text.read_text(), samples, length)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows: list[Tensor] = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: rows.append(args[0].double()))
    with torch.inference_mode():
        model(input_ids=ids)
    x = rows[0].reshape(-1, rows[0].shape[-1])
    return x.T @ x


@pytest.mark.parametrize("method", ["thanos", "sparsegpt"])
def test_raised_damping_is_recorded_with_its_reason(
    method: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = recipe(text_file, method=method, samples=1, sequence_length=8, damping=0.0)
    report = thanos.prune(tiny_llama, tmp_path / "out", settings)
    layer = by_name(report)["model.layers.0.self_attn.q_proj"]  # rank 8 of 32
    assert layer.damping is not None
    assert layer.damping > 0
    assert "not positive definite with damping 0" in layer.damping_reason
    assert any(line.startswith(f"damping raised to {layer.damping:g}") for line in layer.warnings)
    assert report.recipe["damping"] == 0.0
    assert any("badly conditioned" in line for line in layer.warnings)


@pytest.mark.parametrize(("damping", "warned"), [(5e-6, True), (1e-4, False)])
def test_a_badly_conditioned_hessian_is_a_warning_with_the_number(
    damping: float, warned: bool, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = recipe(text_file, samples=1, sequence_length=8, damping=damping)
    layer = by_name(thanos.prune(tiny_llama, tmp_path / "out", settings))["model.layers.0.self_attn.q_proj"]
    hessian = first_block_hessian(tiny_llama, text_file, 1, 8)
    hessian = hessian / hessian.diagonal().mean() + damping * torch.eye(32, dtype=torch.float64)
    condition = torch.linalg.cond(hessian).item()
    assert (condition > 1e6) is warned
    lines = [line for line in layer.warnings if "condition number" in line]
    assert len(lines) == warned
    for line in lines:  # float32's rounding of H moves an eigenvalue of 5e-6 by a good part of itself
        assert 0.5 < float(line.rsplit(" ", 1)[-1]) / condition < 2


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_methods_without_a_factor_record_no_damping(
    method: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file, method=method))
    assert all(layer.damping is None and layer.damping_reason == "" for layer in report.layers)


def test_good_calibration_gives_no_warnings(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file))
    assert report.warnings == []
    assert [layer.warnings for layer in report.layers] == [[]] * 21
    assert {layer.damping for layer in report.layers} == {0.01}


def test_the_errors_in_the_report_are_those_of_the_first_layers_formula(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file, sparsity=0.6))
    hessian = first_block_hessian(tiny_llama, text_file, SAMPLES, LENGTH)
    name = "model.layers.0.self_attn.q_proj"
    dense, pruned = (
        load_file(folder / "model.safetensors")[f"{name}.weight"].double() for folder in (tiny_llama, tmp_path / "out")
    )

    def energy(delta: Tensor) -> float:
        return torch.trace(delta @ hessian @ delta.T).item()

    layer = by_name(report)[name]
    removed = torch.where(pruned == 0, dense, 0)
    assert layer.error_after_compensation == pytest.approx(energy(pruned - dense) / energy(dense), rel=1e-4)
    assert layer.error_before_compensation == pytest.approx(energy(removed) / energy(dense), rel=1e-4)
    assert layer.error_after_compensation < layer.error_before_compensation


def test_random_state_is_neither_read_nor_changed(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    thanos.prune(tiny_llama, tmp_path / "a", recipe(text_file))
    assert torch.equal(torch.get_rng_state(), before)


def test_measuring_what_fits_on_a_device_counts_no_token(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA the first block is run once to see how many sequences fit; its statistics must not see that."""
    choose, measured = Passes.settled, []

    def measuring(self: Passes, index: int) -> int:
        if self.batch is None:
            measured.append(index)
            self.batch = most_sequences(*self.shape, torch.device("cpu"))
            self.run(index, self._example(self._activations), 0)
        return choose(self, index)

    settings = thanos.Recipe(method="wanda", calibration=str(text_file), samples=4, sequence_length=32, device="cpu")
    expected = thanos.prune(tiny_llama, tmp_path / "plain", settings)
    monkeypatch.setattr(Passes, "settled", measuring)
    report = thanos.prune(tiny_llama, tmp_path / "measured", settings)
    assert measured == [0]
    assert {layer.tokens for layer in report.layers} == {4 * 32}
    name = "model.safetensors"
    assert (tmp_path / "measured" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert [layer.zeros for layer in report.layers] == [layer.zeros for layer in expected.layers]


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_process_that_writes_copies_to_the_host(rank: int) -> None:
    fetched: list[Any] = []
    weight = SimpleNamespace(is_cuda=True)
    output: Any = SimpleNamespace(
        _world=SimpleNamespace(rank=rank),
        _writer=SimpleNamespace(write=lambda key, tensor: None),
        _staging=SimpleNamespace(fetch=fetched.append),
    )
    Output._write(output, "a.weight", weight)  # type: ignore[arg-type]
    assert fetched == [weight] * (rank == 0)
