"""A study whose models begin texts with BOS, and one whose texts are folders and lists; keys of all others stay."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import save_tiny, tiny_tokenizer
from thanos.errors import StudyError
from thanos.study import run as runner
from thanos.study.config import read_study
from thanos.study.grid import public_cell
from thanos.study.store import StoreWriter, cell_key, read_store

HEAD = 'models = ["begun", "plain"]\n[evaluation]\ntext = "prose.txt"\nsequence_length = 64\nmax_windows = 4\n'
GRID = '[[grid]]\nmethod = "wanda"\ncalibration = "prose.txt"\nsamples = 4\nsequence_length = 32\n'


@pytest.fixture
def data(tiny_llama: Path, text_file: Path, tmp_path: Path) -> Path:
    """The tiny model as ``begun``, with a tokenizer that adds no BOS as ``plain``, and a text."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_llama, folder / "begun")
    save_tiny(folder / "plain")
    tiny_tokenizer(begins=False).save_pretrained(folder / "plain")
    shutil.copyfile(text_file, folder / "prose.txt")
    return folder


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my.toml"
    path.write_text(text)
    return path


def run(path: Path, data: Path) -> runner.StudyResult:
    return runner.run_study(path, path.parent / "out", data=data, devices=["cpu"])


def test_only_cells_of_models_with_bos_have_other_keys_than_before(tmp_path: Path, data: Path) -> None:
    path = write(tmp_path, HEAD + GRID)
    study = read_study(path)
    locations = runner.find_locations(study, tmp_path / "out", data)
    assert locations.with_bos == {"begun"}
    for cell in study.cells:
        before = study.asked(cell)
        assert set(before["evaluation"]) == {"text", "sequence_length", "max_windows", "compare"}, (
            "as older stores have it"
        )
        begun = {"bos": "auto"} if cell.model == "begun" else {}
        assert locations.asked(study, cell) == {**before, **begun}
    by_hand = read_study(write(tmp_path, HEAD.replace("max_windows = 4", 'max_windows = 4\nbos = "window"') + GRID))
    assert [locations.asked(by_hand, cell).get("bos") for cell in by_hand.cells] == ["window", None, "window", None]
    with pytest.raises(StudyError, match=r"line 4, \[evaluation\] bos: must be one of auto, window, text; got 'never'"):
        read_study(write(tmp_path, HEAD.replace("sequence_length = 64", 'bos = "never"') + GRID))


@pytest.mark.slow
def test_records_say_where_bos_stood_and_older_ones_are_superseded(tmp_path: Path, data: Path) -> None:
    path = write(tmp_path, HEAD + GRID)
    assert run(path, data).ran == 4
    study = read_study(path)
    records = {(record.cell["model"], record.cell["method"]): record for record in read_store(tmp_path / "out").records}
    begun, plain = records["begun", "wanda"], records["plain", "wanda"]
    assert begun.evaluation is not None
    assert plain.evaluation is not None
    assert begun.evaluation["bos"] in ("window", "text")
    assert plain.evaluation["bos"] == "none"
    assert begun.calibration is not None
    assert plain.calibration is not None
    assert (begun.calibration["bos_ids"], plain.calibration["bos_ids"]) == ([1], [])
    # What an older version measured: no bos in what was asked for.
    cell = next(cell for cell in study.cells if (cell.model, cell.method) == ("begun", "wanda"))
    old = replace(begun, asked=study.asked(cell), key=cell_key(public_cell(cell), study.asked(cell)))
    (tmp_path / "old").mkdir()
    writer = StoreWriter(tmp_path / "old")
    for record in (old, plain):
        writer.append(record)
    assert len(read_store(tmp_path / "old").records) == 2, "older stores are read as they are"
    shutil.copytree(tmp_path / "old", tmp_path / "new" / "out")
    (tmp_path / "new" / "my.toml").write_text(path.read_text())
    states = runner.list_cells(tmp_path / "new" / "my.toml", tmp_path / "new" / "out", data=data).states
    assert {(cell.model, cell.method): state for cell, state in states.items()} == {
        ("begun", "dense"): "new", ("plain", "dense"): "new", ("begun", "wanda"): "new", ("plain", "wanda"): "done",
    }  # fmt: skip
    StoreWriter(tmp_path / "new" / "out").append(begun)
    assert {record.key for record in read_store(tmp_path / "new" / "out").records} == {begun.key, plain.key}


@pytest.mark.slow
def test_bos_by_hand_is_where_the_study_puts_it(tmp_path: Path, data: Path, text_file: Path) -> None:
    import thanos

    head = HEAD.replace("max_windows = 4", 'max_windows = 4\nbos = "window"')
    assert run(write(tmp_path, head + GRID), data).count("done") == 4
    for record in read_store(tmp_path / "out").records:
        if record.cell["method"] != "dense":
            continue
        found = thanos.evaluate(
            data / record.cell["model"], text=str(text_file), sequence_length=64, max_windows=4, device="cpu",
            bos="window" if record.cell["model"] == "begun" else "text",
        )  # fmt: skip
        assert record.evaluation is not None
        assert record.evaluation["text_sha256"] == found.text_sha256
        assert record.evaluation["perplexity"] == pytest.approx(found.perplexity, rel=1e-6)
        assert record.evaluation["bos"] == found.bos


@pytest.mark.slow
def test_folders_patterns_and_lists_are_found_and_hashed(tmp_path: Path, data: Path, text_file: Path) -> None:
    words = text_file.read_text(encoding="utf-8").split()
    (data / "texts").mkdir()
    for number in range(3):
        text = " ".join(words[1000 * number : 1000 * number + 1000])
        (data / "texts" / f"{number}.jsonl").write_text(json.dumps({"body": text, "title": "t"}) + "\n")
    head = 'models = ["plain"]\n[evaluation]\ntext = "texts/*.jsonl:body"\nsequence_length = 64\n'
    grid = GRID.replace('"prose.txt"', '"prose.txt,texts/1.jsonl:body"')
    path = write(tmp_path, head + grid)
    assert run(path, data).count("done") == 2
    dense, pruned = read_store(tmp_path / "out").records
    assert dense.evaluation is not None
    assert dense.evaluation["windows"] == 3000 // 64
    assert dense.asked["evaluation"]["text"] == "*.jsonl:body"
    assert pruned.cell["calibration"] == "prose.txt,1.jsonl:body"
    assert str(data) not in json.dumps([dense.to_dict(), pruned.to_dict()])
    assert run(path, data).ran == 0
    (data / "texts" / "2.jsonl").write_text(json.dumps({"body": "ban " * 1000, "title": "t"}) + "\n")
    assert run(path, data).ran == 2, "a file of the evaluation's text is another one"
    with pytest.raises(
        StudyError, match=r"line 3, \[evaluation\] text: .*no string under 'text'; there are 'body', 'title'"
    ):
        run(write(tmp_path, head.replace(":body", "") + grid), data)
    with pytest.raises(StudyError, match=r"line 3, \[evaluation\] text: none/\*\.jsonl is in none of"):
        run(write(tmp_path, head.replace("texts/*.jsonl:body", "none/*.jsonl") + grid), data)
