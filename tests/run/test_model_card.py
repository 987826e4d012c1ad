"""The model card says what the report says, and nothing about the machine it was made on."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

import thanos
from helpers import save_tiny
from reports import layer
from thanos.engine.records import LayerRecord
from thanos.engine.tuning_record import TuningRecord
from thanos.run.model_card import model_card
from thanos.run.names import public_name
from thanos.run.report import PruningReport, compute_totals
from thanos.system.meter import PhaseRecord

SHA = "ab" * 32


def report(layers: list[LayerRecord] | None = None, **changes: Any) -> PruningReport:
    if layers is None:
        how = {"method": "sparsegpt", "pattern": "2:4"}
        layers = [
            layer(
                "model.layers.0.q",
                (40, 50),
                **how,
                zeros=1000,
                error_before_compensation=0.5,
                error_after_compensation=0.25,
            ),
            layer("model.layers.1.q", (40, 50), **how, zeros=900, sparsity=0.45, error_after_compensation=0.125),
        ]
    values: dict[str, Any] = {
        "thanos_version": "7.8.9",
        "model": {
            "name": "some-org/Some-Model-1B",
            "origin": "hub",
            "architecture": "LlamaForCausalLM",
            "parameters": 12345,
        },
        "recipe": {
            "method": "sparsegpt",
            "pattern": "2:4",
            "sparsity": 0.5,
            "outlier_rows": 0.1,
            "damping": 0.015,
            "seed": 42,
            "calibration": "c4",
        },
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "python": "3.12.1", "device": "Some GPU"},
        "calibration": {
            "source": "c4",
            "samples": 128,
            "sequence_length": 2048,
            "rule": "random-window",
            "seed": 42,
            "sha256": SHA,
        },
        "totals": compute_totals(layers, parameters=12345, zeros_elsewhere=7),
        "layers": layers,
        "dense": [],
        "phases": {"solve": PhaseRecord(seconds=12.5, host_peak_bytes=10**9)},
        "seconds": 12.5,
        "host_peak_bytes": 10**9,
    }
    return PruningReport(**{**values, **changes})


def front_matter(card: str) -> dict[str, Any]:
    import yaml

    head, start, _ = card.split("---\n", 2)
    assert head == "", "the card begins with it"
    return yaml.safe_load(start)


def table_rows(card: str, heading: str = "") -> list[list[str]]:
    """The cells of all table rows below a heading, head and rule left out."""
    part = card.split(heading, 1)[1] if heading else card
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= {"-"}]


def cells(card: str) -> dict[str, str]:
    return {row[0]: row[1] for row in table_rows(card)}


# --- front matter -----------------------------------------------------------------------------------------------------


def test_front_matter_of_a_hub_model() -> None:
    assert front_matter(model_card(report())) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "some-org/Some-Model-1B",
        "tags": ["pruned", "sparse", "thanos"],
    }


def test_the_hubs_own_reader_understands_the_front_matter(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    (tmp_path / "README.md").write_text(model_card(report()), encoding="utf-8")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "some-org/Some-Model-1B"
    assert card.text.strip().startswith("# some-org/Some-Model-1B, pruned")


@pytest.mark.parametrize(
    "name", ["/home/ann/models/llama", "/data/model.gguf", "../llama", "./m/x", "m/x.gguf", "gpt2"]
)
def test_a_local_model_is_no_base_model(name: str) -> None:
    assert "base_model" not in front_matter(model_card(report(model={"name": name, "architecture": "X"})))


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/model", "org/model"),
        ("gpt2", "gpt2"),
        ("org/model-1.5B.v2", "org/model-1.5B.v2"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("~/llama", "llama"),
        ("secret/c4.jsonl.gz", "c4.jsonl.gz"),
        ("/home/ann/secret/llama", "llama"),
        ("/home/ann/secret/llama/", "llama"),
        ("/llama", "llama"),
        ("./llama", "llama"),
        ("../secret/llama", "llama"),
        ("a/b/llama", "llama"),
        ("secret/model.gguf", "model.gguf"),
        ("/secret/model.gguf", "model.gguf"),
        ("/home/ann/text.jsonl", "text.jsonl"),
        ("wikitext2", "wikitext2"),
    ],
)
def test_public_names(name: str, public: str) -> None:
    assert public_name(name) == public


def test_no_path_of_this_machine_appears() -> None:
    made = report(
        model={"name": "/home/ann/secret/llama", "architecture": "LlamaForCausalLM"},
        calibration={**report().calibration, "source": "/home/ann/private/text.jsonl"},
        recipe={**report().recipe, "calibration": "/home/ann/private/text.jsonl"},
    )
    card = model_card(made)
    for part in ("/home", "ann", "secret", "private"):
        assert part not in card
    assert "# llama, pruned" in card
    assert "text.jsonl: 128 × 2048 tokens" in card


@pytest.mark.parametrize("name", [".", "./", "..", "../.."])
def test_a_model_in_the_current_folder_has_a_title(name: str) -> None:
    """``thanos prune . OUT`` is natural inside a model's folder."""
    card = model_card(report(model={"name": name, "architecture": "LlamaForCausalLM"}))
    title = re.search(r"^# (.*), pruned$", card, re.MULTILINE)
    assert title is not None
    assert re.search(r"\w", title.group(1))
    assert "prune  OUT" not in card


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_are_the_reports() -> None:
    card = model_card(report())
    found = cells(card)
    assert found["parameters"] == "12,345"
    assert found["zeros among the pruned layers"] == "1,900 of 4,000"
    assert found["sparsity of the pruned layers"] == "47.50 %"
    assert found["sparsity of all parameters"] == f"{100 * 1907 / 12345:.2f} %"
    assert found["mean relative layer error, before compensation"] == f"{(0.5 + 0.2) / 2:.5f}"
    assert found["mean relative layer error, after compensation"] == f"{(0.25 + 0.125) / 2:.5f}"
    assert found["outlier rows left dense"] == "10.00 %"
    assert found["damping"] == "0.015"
    assert found["calibration"] == "c4: 128 × 2048 tokens, random-window, seed 42"
    assert found["hash of the calibration tokens"] == f"`{SHA}`"
    assert found["device"] == "Some GPU"  # no time: a resumed run's card is the same
    assert found["versions"] == "torch 2.13.0, transformers 5.23.0, python 3.12.1"
    assert "(LlamaForCausalLM) with 47.50 % of the weights of its 2 pruned layers set to zero" in card
    assert "7.8.9 (method sparsegpt, pattern 2:4)" in card


def test_errors_that_were_not_measured() -> None:
    layers = [layer("a", error_before_compensation=None, error_after_compensation=None)]
    card = model_card(report(layers))
    assert cells(card)["mean relative layer error, after compensation"] == "not measured"
    assert "None" not in card
    assert "nan" not in card.lower().replace("thanos", "")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_card_made_from_pruning_json_is_the_same(value: float) -> None:
    """The file turns numbers that are not finite into null; the card must not say otherwise."""
    layers = [layer("a", error_after_compensation=0.1), layer("b", error_after_compensation=value), layer("c")]
    made = report(layers)
    assert model_card(PruningReport.from_dict(made.to_dict())) == model_card(made)


def test_worst_layers_in_order() -> None:
    errors = [0.3, 0.9, None, 0.1, 0.5, 0.05, 0.7, 0.0]
    layers = [layer(f"l{i}", sparsity=i / 10, error_after_compensation=error) for i, error in enumerate(errors)]
    rows = table_rows(model_card(report(layers)), "## Layers with the largest error")
    assert rows == [
        ["layer", "sparsity", "relative error"],
        ["`l1`", "10.00 %", "0.90000"],
        ["`l6`", "60.00 %", "0.70000"],
        ["`l4`", "40.00 %", "0.50000"],
        ["`l0`", "0.00 %", "0.30000"],
        ["`l3`", "30.00 %", "0.10000"],
    ]


def test_the_card_tells_what_an_override_chose() -> None:
    layers = [layer(f"model.layers.{block}.{kind}", method="sparsegpt", pattern=pattern) for block in range(3)
              for kind, pattern in (("up", "2:4"), ("down", "4:8"))]  # fmt: skip
    layers.append(layer("model.layers.3.up", method="wanda", pattern="2:4"))
    first = model_card(report(layers)).split("\n\n## ")[0]
    assert "(method sparsegpt, pattern 2:4; pattern 4:8 for 3 of 7 layers; method wanda for 1 of 7 layers)." in first


def test_tables_are_well_formed() -> None:
    for block in re.findall(r"(?:^\|.*\n)+", model_card(report()), re.MULTILINE):
        lines = block.splitlines()
        assert set(lines[1].replace(" ", "").strip("|").split("|")) == {"---"}
        assert len({line.count("|") for line in lines}) == 1


def test_warnings() -> None:
    card = model_card(report())
    assert "## Warnings" not in card
    layers = [layer("a"), layer("b", warnings=["few tokens: 12", "damping raised"])]
    card = model_card(report(layers, warnings=["the whole run"]))
    assert card.endswith("## Warnings\n\n- the whole run\n- `b`: few tokens: 12\n- `b`: damping raised\n")


def test_the_card_tells_of_tuning_where_there_was_any() -> None:
    assert "without retraining" in model_card(report())
    assert "held-out" not in model_card(report())
    tuned = [
        TuningRecord(block=0, kept_epoch=2, held_out_before=0.5, held_out_after=0.25),
        TuningRecord(block=1, kept_epoch=2, held_out_before=0.1, held_out_after=0.08),
        TuningRecord(block=2, held_out_before=0.1, held_out_after=0.1, reason="the held-out error did not fall"),
    ]
    card = model_card(report(tuning=tuned))
    assert "without retraining" not in card
    assert "2 of 3 blocks were then tuned with their zeros fixed" in card
    assert "became 0.8 times its former value (the others did not improve and were left unchanged)." in card
    assert "2 of 2 blocks" in model_card(report(tuning=tuned[:2]))
    card = model_card(report(tuning=[tuned[0], tuned[2], tuned[2]]))  # two of three are unchanged, so not the median
    assert "1 of 3 blocks was then tuned" in card
    assert "became 0.5 times its former value (the others" in card
    assert "the others" not in model_card(report(tuning=tuned[:2]))
    card = model_card(report(tuning=tuned[2:] * 3))
    assert (
        "3 blocks were then tuned with their zeros fixed, towards the dense blocks' outputs; none improved on" in card
    )
    assert "times its former value" not in card
    assert "measured before that step" not in card
    nothing = [TuningRecord(block=0, reason="too few sequences")]
    assert "tuned" not in model_card(report(tuning=nothing))


def test_the_card_tells_the_scope_that_the_effort_chose() -> None:
    recipe = report().recipe | {"pattern": "unstructured"}
    assert "one for every" not in model_card(report(recipe=recipe))
    assert "| scope of the budget | one for every row |" in model_card(report(recipe=recipe | {"effort": "high"}))
    given = recipe | {"effort": "high", "scope": "layer"}
    assert "| scope of the budget | one for every layer |" in model_card(report(recipe=given))
    assert "one for every" not in model_card(report(recipe=recipe | {"effort": "high", "pattern": "2:4"}))


def test_the_card_of_a_model_whose_pattern_this_version_lacks() -> None:
    """Recovery writes a card from the pruned model's report, which may name a pattern of another version or file."""
    recipe = report().recipe | {"pattern": "bands", "effort": "high"}
    assert "one for every" not in model_card(report(recipe=recipe))
    assert "| scope of the budget | one for every row |" in model_card(report(recipe=recipe | {"scope": "row"}))


def test_the_card_tells_of_lost_precision() -> None:
    assert "residual" not in model_card(report())
    assert "rounding" not in model_card(report())
    layers = [layer("a", residual=2e-6), layer("b", residual=3.25e-4), layer("c")]
    tuned = [
        TuningRecord(block=0, kept_epoch=1, held_out_before=0.5, held_out_after=0.202, held_out_unrounded=0.2),
        TuningRecord(block=1, kept_epoch=1, held_out_before=0.5, held_out_after=0.2, held_out_unrounded=0.201),
        TuningRecord(block=2, held_out_before=0.1, held_out_after=0.1, reason="the held-out error did not fall"),
    ]
    card = model_card(report(layers, tuning=tuned))
    assert "| largest relative residual of a row's best weights | 3.2e-04 |" in card
    assert "| largest change of a tuned block's held-out error by rounding | +1 % |" in card


def test_the_card_does_not_promise_speed() -> None:
    card = model_card(report())
    assert "as large as before" in card
    assert "runs as fast as before" in card


# --- the whole way ----------------------------------------------------------------------------------------------------


def test_card_of_a_real_run(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "secret-folder" / "my-model")
    text = tmp_path / "secret-folder" / "text.txt"
    from helpers import prose

    text.write_text(prose(2000))
    recipe = thanos.Recipe(method="wanda", calibration=str(text), samples=4, sequence_length=32)
    made = thanos.prune(model, tmp_path / "out", recipe)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card == model_card(made)
    assert str(tmp_path) not in card
    assert "secret-folder" not in card
    assert "# my-model, pruned" in card
    assert cells(card)["parameters"] == f"{made.totals['parameters']:,}"
    assert made.calibration["sha256"] in card
    assert "base_model" not in front_matter(card)


def test_a_folder_named_like_a_hub_model_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``models/llama`` is a folder here; a reader of the card would look for it on the hub."""
    save_tiny(tmp_path / "models" / "llama")
    monkeypatch.chdir(tmp_path)
    recipe = thanos.Recipe(method="magnitude", calibration="pydoc", samples=1, sequence_length=16)
    thanos.prune("models/llama", tmp_path / "out", recipe)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "base_model" not in front_matter(card)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"bos_ids": []}, ""),
        ({"bos_ids": [1]}, ", each window begins with the beginning-of-text token"),
        ({"bos_ids": [7, 9]}, ", each window begins with the tokens 7, 9, as the tokenizer begins a text"),
        ({"bos": None}, ""),  # pruning.json of earlier versions, which recover reads
        ({"bos": 0}, ", each window begins with the beginning-of-text token"),
    ],
)
def test_the_card_tells_how_windows_begin(entry: dict[str, Any], words: str) -> None:
    card = model_card(report(calibration={**report().calibration, **entry}))
    assert f"random-window, seed 42{words} |" in card
