"""Wrong words on the command line: what came, what is allowed, what to change; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import prose
from thanos.cli import run, tables
from thanos.cli.options import WORDS_TOO
from thanos.errors import StudyError, UserError
from thanos.model import source as sources
from thanos.run.work_folder import holds_model
from thanos.study import run as runner
from thanos.study.config import read_study


@pytest.fixture
def place(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a link to the tiny model and a text."""
    (tmp_path / "tiny").symlink_to(tiny_llama)
    (tmp_path / "prose.txt").write_text(prose(600))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that is a user's mistake, and return the line after ``error: ``."""
    before = sorted(Path().rglob("*"))
    assert run(words.split()) == 2
    assert sorted(Path().rglob("*")) == before, "nothing is written"
    line = capsys.readouterr().err.splitlines()
    assert len(line) == 1
    return line[0].removeprefix("error: ")


TEXT = "--text prose.txt --sequence-length 32 --device cpu"


def test_a_word_where_a_word_or_a_number_is_allowed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(WORDS_TOO) >= {"--rate", "--dense-target", "--calibration"}
    said = refused("recover tiny out --dense tiny --calibration prose.txt --rate fast", capsys)
    assert said == "rate must be auto or a number above 0 and below 1, such as 2e-4; got 'fast'"
    said = refused("recover tiny out --dense tiny --calibration prose.txt --rate auto --samples 8 --device cpu", capsys)
    assert said == "--dense tiny is OUT itself; give the model that OUT was pruned from", "auto is no mistake"
    assert "--samples must be a whole number; got 'auto'" in refused("prune tiny out --samples auto", capsys)


@pytest.mark.parametrize("command", ["eval tiny", "compare tiny"])
def test_a_wrong_position_of_bos(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(f"{command} {TEXT} --bos windows", capsys)
    assert said == "--bos: must be one of auto, window, text; got 'windows' (did you mean window?)"


def test_no_comparison_or_study_goes_into_a_models_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert holds_model(place / "tiny")
    assert not holds_model(place)
    inside = f"is inside the folder of another model, {(place / 'tiny').resolve()}; choose a folder outside it"
    assert refused(f"compare tiny {TEXT} --out tiny", capsys).startswith("--out tiny is the folder of a model;")
    assert refused(f"compare tiny {TEXT} --out tiny/a", capsys) == f"--out tiny/a {inside}"
    Path("s.toml").write_text('models = ["tiny"]\n[evaluation]\ntext = "prose.txt"\n[[grid]]\nmethod = "magnitude"\n')
    assert refused("study s.toml tiny/a", capsys) == f"OUT tiny/a {inside}"


def test_prompts_that_cannot_be_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(f"compare tiny {TEXT} --prompts none.txt", capsys)
    assert said == "--prompts none.txt cannot be read: No such file or directory; give a text file of prompts"
    Path("latin.txt").write_bytes(b"caf\xe9")
    assert refused(f"compare tiny {TEXT} --prompts latin.txt", capsys).endswith("at byte 3; save it as UTF-8")


def test_recover_looks_for_its_text_before_its_models(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="the extra recover is not installed")

    def fetched(*_: Any, **__: Any) -> Path:
        raise AssertionError("a model was fetched")

    monkeypatch.setattr(sources, "download", fetched)
    said = refused("recover org/pruned out --dense org/dense --calibration none.txt", capsys)
    assert said.startswith("text file none.txt does not exist")


# --- studies ------------------------------------------------------------------------------------------------------------

HEAD = 'models = ["tiny"]\n[evaluation]\ntext = "prose.txt"\nsequence_length = 32\n'
GRID = '[[grid]]\nmethod = "magnitude"\ncalibration = "prose.txt"\nsamples = 2\nsequence_length = 32\n'


def test_tasks_that_no_grid_asks_for(place: Path) -> None:
    Path("s.toml").write_text(HEAD + '[zero_shot]\ntasks = ["piqa"]\n' + GRID)
    with pytest.raises(
        StudyError, match=r"line 5, \[zero_shot\]: no \[\[grid\]\] has zero_shot = true, so no task would"
    ):
        read_study("s.toml")
    Path("s.toml").write_text(HEAD + '[zero_shot]\ntasks = ["piqa"]\n' + GRID + "zero_shot = true\n")
    assert read_study("s.toml").zero_shot_cells


def test_where_a_study_looked(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THANOS_DATA", raising=False)
    Path("s.toml").write_text(HEAD.replace("prose", "gone") + GRID)
    with pytest.raises(StudyError, match=r"text: gone\.txt is not in the current folder; give its folder with --data"):
        runner.list_cells("s.toml", tmp_path / "out")
    with pytest.raises(StudyError, match=r"text: gone\.txt is in none of data, the current folder; give its folder"):
        runner.list_cells("s.toml", tmp_path / "out", data="data")


def test_a_study_without_workers_or_devices(place: Path, tmp_path: Path) -> None:
    Path("s.toml").write_text(HEAD + GRID)
    for arguments, said in (
        ({"devices": ["cpu"], "workers": 0}, "^--workers must be at least 1; got 0$"),
        ({"devices": []}, "^--devices names no device; choose auto, cpu, cuda:0"),
    ):
        with pytest.raises(UserError, match=said):
            runner.run_study("s.toml", tmp_path / "out", **arguments)


def test_texts_that_are_too_short(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("one.jsonl").write_text(json.dumps({"text": "ban"}))
    words = "prune tiny out --calibration one.jsonl --samples 1 --sequence-length 32 --device cpu"
    assert run(words.split()) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert ": 1 token, but --sequence-length is 32, of which the first is the beginning-of-text token; lower" in said
    assert not Path("out").exists()


def test_a_comparison_below_a_file_is_refused_before_the_models_are_loaded(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(f"compare tiny {TEXT} --out prose.txt/new", capsys)
    assert said.startswith("--out prose.txt/new cannot be written: ")
    assert said.endswith("prose.txt is a file; choose a path in a folder")


@pytest.mark.parametrize("command", [f"eval tiny {TEXT}", "inspect tiny", "bench layer --shape 8x8 --device cpu"])
def test_a_json_file_that_cannot_be_created_is_told_before_the_work(
    command: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems give permission and create no file."""
    opened = Path.open

    def denied(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "numbers.json":
            raise FileNotFoundError(2, "No such file or directory")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    said = refused(f"{command} --json numbers.json", capsys)
    assert said == "--json numbers.json cannot be written (No such file or directory); give another path"


def test_a_json_file_that_cannot_be_written_at_the_end_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables.Path, "write_text", full)
    assert run(["inspect", "tiny", "--json", "numbers.json", "-q"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        last
        == "error: --json numbers.json cannot be written (No space left on device); free some space, or write to another disk"
    )
