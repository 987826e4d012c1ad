"""The documents of an output: they name no folder of the machine, and suffice to run again."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import thanos
from helpers import prose, stopped_at
from thanos.cli import run
from thanos.events import read_events
from thanos.run.report import PruningReport

SAMPLES, LENGTH = 2, 32


def recipe(source: str, **changes: Any) -> thanos.Recipe:
    settings = {"method": "wanda", "samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu"}
    return thanos.Recipe(calibration=source, **{**settings, **changes})


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with two texts, in each of which a row is null: a note names the file."""
    folder = tmp_path / "home" / "texts"
    folder.mkdir(parents=True)
    for seed, name in enumerate(("a.jsonl", "b.jsonl")):
        rows = [{"text": None}, *({"text": prose(1500, seed=10 * seed + row)} for row in range(4))]
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder


def written(out: Path) -> dict[str, str]:
    """Every file of an output but its shards."""
    return {path.name: path.read_text() for path in out.iterdir() if path.suffix != ".safetensors"}


@pytest.mark.parametrize(
    ("source", "public"),
    [
        ("{texts}/a.jsonl", "a.jsonl"),
        ("{texts}/a.jsonl:text", "a.jsonl"),
        ("{texts}", "texts"),
        ("{texts}/*.jsonl", "*.jsonl"),
        ("{texts}/a.jsonl,{texts}/b.jsonl", "a.jsonl,b.jsonl"),
    ],
)
def test_no_document_of_an_output_names_a_local_folder(
    source: str, public: str, texts: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    model, out = tmp_path / "secret" / "model", tmp_path / "private" / "out"
    shutil.copytree(tiny_llama, model)
    events: list[thanos.Event] = []
    report = thanos.prune(model, out, recipe(source.format(texts=texts)), on_event=events.append)
    for name, text in written(out).items():
        assert str(tmp_path) not in text, name
        for folder in ("secret", "private", "home"):
            assert f"{folder}/" not in text, name
    found = json.loads((out / "pruning.json").read_text())
    assert found["recipe"]["calibration"].removesuffix(":text") == public
    assert found["calibration"]["source"] == found["recipe"]["calibration"] == report.recipe["calibration"]
    assert PruningReport.read(out / "pruning.json") == report
    # What is shown to the user has the paths; the log has the names.
    shown = [event.message for event in events if event.kind == "note" and "is null" in event.message]
    assert shown
    assert all(line.startswith(f"{texts}/") for line in shown)
    logged = [event.message for event in read_events((out / "events.jsonl").read_text().splitlines(keepends=True))]
    notes = [line for line in logged if "is null" in line]
    assert [line.rpartition("/")[2] for line in notes] == [line.rpartition("/")[2] for line in shown]


def test_the_hash_is_of_the_text(texts: Path, tiny_llama: Path, tmp_path: Path) -> None:
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(str(texts / "a.jsonl")))
    digest = hashlib.sha256((texts / "a.jsonl").read_bytes()).hexdigest()
    assert report.calibration["text_sha256"] == digest
    assert digest in (tmp_path / "out/recipe.toml").read_text()
    named = thanos.prune(tiny_llama, tmp_path / "named", recipe("pydoc"))
    assert named.calibration["text_sha256"] is None
    assert (tmp_path / "named/recipe.toml").read_text() == recipe("pydoc").to_toml(), "nothing local: no comment"


def test_the_recipe_of_an_output_and_its_text_give_the_same_bytes(
    texts: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thanos.prune(tiny_llama, tmp_path / "out", recipe(str(texts / "a.jsonl"), sparsity=0.4))
    again = [
        "prune",
        str(tiny_llama),
        str(tmp_path / "again"),
        "--recipe",
        str(tmp_path / "out/recipe.toml"),
        "--quiet",
    ]
    assert run(again) == 2
    assert "a.jsonl does not exist" in capsys.readouterr().err
    assert run([*again, "--calibration", str(texts / "a.jsonl")]) == 0
    shards = [next((tmp_path / name).glob("*.safetensors")) for name in ("out", "again")]
    assert shards[0].read_bytes() == shards[1].read_bytes()


def test_a_run_that_was_interrupted_goes_on_with_its_local_text(texts: Path, tiny_llama: Path, tmp_path: Path) -> None:
    made = recipe(str(texts))
    whole = thanos.prune(tiny_llama, tmp_path / "whole", made)
    with pytest.raises(KeyboardInterrupt):
        thanos.prune(tiny_llama, tmp_path / "out", made, on_event=stopped_at(1))
    report = thanos.prune(tiny_llama, tmp_path / "out", made, resume=True)
    assert report.recipe == whole.recipe
    assert report.calibration == whole.calibration
    for name, text in written(tmp_path / "out").items():
        assert str(tmp_path) not in text, name
    assert thanos.prune(tiny_llama, tmp_path / "out", made, resume=True) == report, "complete"


def test_a_report_of_an_older_version_is_read(texts: Path, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = thanos.prune(tiny_llama, out, recipe(str(texts)))
    values = json.loads((out / "pruning.json").read_text())
    del values["calibration"]["text_sha256"]
    values["calibration"]["source"] = values["recipe"]["calibration"] = "/home/ann/texts"
    (out / "pruning.json").write_text(json.dumps(values))
    old = PruningReport.read(out / "pruning.json")
    assert old.calibration["source"] == "/home/ann/texts"
    assert old.layers == report.layers
    assert thanos.prune(tiny_llama, out, recipe(str(texts)), resume=True) == old
    assert thanos.inspect_checkpoint(out).layers
