"""``pruning.json``: what goes in comes out, in valid JSON; totals agree with sums done by hand."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from reports import layer
from thanos.engine.block_error import BlockErrors
from thanos.engine.layer_warnings import expert_notes
from thanos.engine.records import LayerRecord
from thanos.engine.tuning_record import TuningRecord
from thanos.run.report import SCHEMA, DenseRecord, PruningReport, compute_totals
from thanos.system.meter import PhaseRecord

TOP = {
    "schema",
    "execution",
    "thanos_version",
    "model",
    "recipe",
    "versions",
    "calibration",
    "totals",
    "layers",
    "dense",
    "phases",
    "seconds",
    "host_peak_bytes",
    "device_peak_bytes",
    "warnings",
}
LAYER = {
    "name",
    "block",
    "shape",
    "dtype",
    "method",
    "pattern",
    "sparsity",
    "zeros",
    "outlier_rows",
    "halved_rows",
    "error_before_compensation",
    "error_after_compensation",
    "damping",
    "damping_reason",
    "tokens",
    "seconds",
    "warnings",
    "changed_by",
    "error_tokens",
}
REPAIRED = {"dense_target", "errors", "residual", "target_change", "choice", "removed_units"}
"""Keys of a layer that are there only where they apply."""


def report(layers: list[LayerRecord] | None = None, **changes: Any) -> PruningReport:
    layers = [layer("a"), layer("b", (3, 2), block=None, warnings=["too few tokens"])] if layers is None else layers
    values: dict[str, Any] = {
        "thanos_version": "1.2.3",
        "model": {"name": "org/model", "architecture": "LlamaForCausalLM", "parameters": 100},
        "recipe": {"method": "thanos", "pattern": "unstructured", "seed": 0, "skip": ["lm_head"], "sparsity": 0.5},
        "versions": {"torch": "2.13.0"},
        "calibration": {"source": "größe.txt", "samples": 2},
        "totals": compute_totals(layers, parameters=100, zeros_elsewhere=1),
        "layers": layers,
        "dense": [DenseRecord(name="norm", parameters=8, reason="not a linear layer's weight")],
        "phases": {
            "load": PhaseRecord(seconds=1.5, host_peak_bytes=10),
            "solve": PhaseRecord(seconds=0.5, host_peak_bytes=20, device_peak_bytes=30),
        },
        "seconds": 2.0,
        "host_peak_bytes": 20,
        "device_peak_bytes": 30,
        "warnings": ["careful"],
    }
    return PruningReport(**{**values, **changes})


def test_round_trip() -> None:
    before = report()
    assert PruningReport.from_dict(before.to_dict()) == before
    assert PruningReport.from_dict(json.loads(before.to_json())) == before


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    before = report()
    before.write(tmp_path / "pruning.json")
    text = (tmp_path / "pruning.json").read_text(encoding="utf-8")
    assert text == before.to_json()
    assert text.endswith("}\n")
    assert "größe.txt" in text
    assert PruningReport.from_dict(json.loads(text)) == before


def test_round_trip_keeps_types() -> None:
    again = PruningReport.from_dict(json.loads(report().to_json()))
    assert isinstance(again.layers[0], LayerRecord)
    assert isinstance(again.layers[0].shape, tuple)
    assert isinstance(again.dense[0], DenseRecord)
    assert all(isinstance(record, PhaseRecord) for record in again.phases.values())
    assert again.phases["load"].device_peak_bytes is None
    assert list(again.phases) == ["load", "solve"]


def test_keys() -> None:
    """Readers depend on these names: another name is another schema."""
    values = report().to_dict()
    assert next(iter(values)) == "schema"
    assert values["schema"] == SCHEMA == 1
    assert (
        set(values)
        == TOP
        == {field.name for field in fields(PruningReport)} - {"block_errors", "tuning", "recovery", "cut"}
    )
    assert set(values["layers"][0]) == LAYER == {field.name for field in fields(LayerRecord)} - REPAIRED
    repaired_layer = replace(
        report().layers[0],
        errors={"removed": 0.2, "a": 0.1, "b": 0.05},
        choice={"0": 0.2, "0.5": 0.1},
        residual=1e-6,
        target_change=-0.01,
        dense_target=0.5,
        removed_units=[1, 3],
    )
    errors = BlockErrors(block=0, held_out=True, tokens=64, errors={"dense": 0.2, "prune": 0.1})
    repaired = replace(report(), layers=[repaired_layer], block_errors=[errors])
    assert set(repaired.to_dict()) == TOP | {"block_errors"}
    assert PruningReport.from_dict(repaired.to_dict()).block_errors == [errors]
    assert set(repaired.to_dict()["layers"][0]) == LAYER | REPAIRED
    assert PruningReport.from_dict(repaired.to_dict()).layers == [repaired_layer]
    assert values["dense"] == [{"name": "norm", "parameters": 8, "reason": "not a linear layer's weight"}]
    assert values["phases"]["solve"] == {"seconds": 0.5, "host_peak_bytes": 20, "device_peak_bytes": 30}
    assert values["layers"][0]["shape"] == [4, 6]
    assert values["layers"][1]["warnings"] == ["too few tokens"]


def test_the_tuning_of_blocks_is_a_key_of_its_own_where_there_was_any(tmp_path: Path) -> None:
    tuned = TuningRecord(block=0, epochs=2, kept_epoch=1, losses=[0.5, math.nan], held_out_errors=[0.25, 0.375])
    before = report(tuning=[tuned])
    before.write(tmp_path / "pruning.json")
    values = json.loads((tmp_path / "pruning.json").read_text())
    assert set(values) == TOP | {"tuning"}
    assert values["tuning"][0] == asdict(tuned) | {"losses": [0.5, None]}
    assert PruningReport.read(tmp_path / "pruning.json").tuning == [replace(tuned, losses=[0.5, None])]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(value: float) -> None:
    before = report(
        [layer("a", error_after_compensation=value, seconds=1.0)],
        recipe={"deep": [{"x": (value, 1.0)}]},
        totals={"mean": value},
    )
    values = json.loads(before.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert values["layers"][0]["error_after_compensation"] is None
    assert values["layers"][0]["seconds"] == 1.0
    assert values["recipe"] == {"deep": [{"x": [None, 1.0]}]}
    assert values["totals"] == {"mean": None}
    assert values == before.to_dict()


def test_to_dict_shares_nothing() -> None:
    before = report()
    values = before.to_dict()
    values["recipe"]["method"] = "other"
    values["layers"][1]["warnings"].append("more")
    values["warnings"].clear()
    assert before == report()


def test_from_dict_does_not_change_its_argument() -> None:
    values = report().to_dict()
    PruningReport.from_dict(values)
    assert values == report().to_dict()


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_other_schemas_are_refused(schema: Any) -> None:
    with pytest.raises(ValueError, match=f"schema {schema!r}; this version reads 1"):
        PruningReport.from_dict({**report().to_dict(), "schema": schema})
    with pytest.raises(ValueError, match="schema None"):
        PruningReport.from_dict({})


def test_records_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        report().seconds = 3.0  # type: ignore[misc]
    assert replace(layer("a"), zeros=3).zeros == 3


# --- totals -----------------------------------------------------------------------------------------------------------


def test_totals_by_hand() -> None:
    layers = [
        layer("a", (10, 10), zeros=50, error_before_compensation=0.4, error_after_compensation=0.1),
        layer("b", (2, 30), zeros=15, error_before_compensation=0.2, error_after_compensation=None),
        layer("c", (4, 10), zeros=5, error_before_compensation=None, error_after_compensation=0.4),
    ]
    totals = compute_totals(layers, parameters=500, zeros_elsewhere=30)
    assert totals == {
        "parameters": 500,
        "targeted_parameters": 200,
        "zeros_targeted": 70,
        "zeros_all": 100,
        "sparsity_targeted": 0.35,
        "sparsity_all": 0.2,
        "mean_error_before_compensation": pytest.approx(0.3),
        "mean_error_after_compensation": pytest.approx(0.25),
    }


def test_totals_weigh_layers_by_their_size() -> None:
    """The total sparsity is of weights, not the mean of the layers' shares."""
    layers = [layer("small", (1, 2), zeros=2, sparsity=1.0), layer("large", (100, 100), zeros=0, sparsity=0.0)]
    totals = compute_totals(layers, parameters=10_002, zeros_elsewhere=0)
    assert totals["sparsity_targeted"] == totals["sparsity_all"] == 2 / 10_002


def test_totals_of_nothing() -> None:
    totals = compute_totals([], parameters=0, zeros_elsewhere=0)
    assert totals["sparsity_targeted"] == totals["sparsity_all"] == 0
    assert totals["mean_error_before_compensation"] is totals["mean_error_after_compensation"] is None


def test_totals_of_layers_without_errors() -> None:
    layers = [layer("a", error_before_compensation=None, error_after_compensation=None)]
    totals = compute_totals(layers, parameters=24, zeros_elsewhere=0)
    assert totals["mean_error_after_compensation"] is None
    assert totals["zeros_targeted"] == totals["zeros_all"] == 12


def test_experts_that_saw_little_are_counted_once_each() -> None:
    kinds = ("gate", "up", "down")
    experts = {f"{e}.{kind}": e for e in ("mlp.0", "mlp.1", "mlp.2", "mlp.3") for kind in kinds}
    tokens = {"mlp.0": 6, "mlp.1": 5, "mlp.2": 0, "mlp.3": 1}
    records = [layer(name, tokens=tokens[expert]) for name, expert in experts.items()]
    lines = expert_notes(experts, [*records, layer("attention", tokens=2)])  # not an expert: not counted here
    assert len(lines) == 2
    assert lines[0].startswith("2 of 4 experts received fewer calibration tokens than they have input columns")
    assert lines[1] == "1 of 4 experts received no calibration token: pruned by magnitude"
    assert expert_notes(experts, [layer(name, tokens=6) for name in experts]) == []
    assert expert_notes({}, [layer("attention", tokens=0)]) == []
