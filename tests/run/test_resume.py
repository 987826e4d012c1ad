"""A run that ended early goes on to the same bytes, and only if it is the same run."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import thanos
from helpers import prose, save_tiny
from reports import contents
from thanos.checkpoint.writer import CheckpointWriter
from thanos.cli import run
from thanos.engine import block_runner as passes
from thanos.engine.block_calls import BlockCalls
from thanos.engine.stages import prune as engine_module
from thanos.errors import ResourceError, UserError
from thanos.model.source import ModelSource
from thanos.run.resume import check_same_run, describe_run

SAMPLES, LENGTH, BLOCKS = 4, 32, 4


def recipe(text: Path, **changes: Any) -> thanos.Recipe:
    settings = {"calibration": str(text), "samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu"}
    return thanos.Recipe(**settings | {"targets": ("layers.*", "lm_head")} | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks in several shards. Not to be modified."""
    return save_tiny(tmp_path_factory.mktemp("resume") / "model", num_hidden_layers=BLOCKS, max_shard_size="40KB")


@pytest.fixture(scope="module")
def whole(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The output of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    thanos.prune(model, out, recipe(text_file))
    return contents(out)


class Stop(Exception):  # noqa: N818  it is a signal, not an error
    """Ends a run in a test."""


def stop_after(block: int) -> Callable[[thanos.Event], None]:
    """A watcher that ends the run in the middle of the block after ``block``."""

    def watch(event: thanos.Event) -> None:
        if event.kind == "layer" and (event.block == block + 1 or (event.block is None and block == BLOCKS - 1)):
            raise Stop

    return watch


def interrupted(model: Path, out: Path, settings: thanos.Recipe, *, after: int) -> Path:
    """Prune, end after a block; return the folder that is left."""
    with pytest.raises(Stop):
        thanos.prune(model, out, settings, on_event=stop_after(after))
    assert not out.exists()
    return out.parent / f".{out.name}.partial"


def spy_on_solver(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the layers that are solved from now on."""
    solved: list[str] = []
    original = engine_module.prune_layer

    def solver(*args: Any, name: str, **kwargs: Any) -> Any:
        solved.append(name)
        return original(*args, name=name, **kwargs)

    monkeypatch.setattr(engine_module, "prune_layer", solver)
    return solved


def blocks_of(names: list[str]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[2] if name.startswith("model.layers.") else name for name in names))


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


# --- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", range(BLOCKS))
def test_a_resumed_run_solves_only_what_is_left_and_gives_the_same_bytes(
    after: int, whole: Any, model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(model, tmp_path / "out", recipe(text_file), after=after)
    solved = spy_on_solver(monkeypatch)
    report = thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True)
    assert blocks_of(solved) == [*map(str, range(after + 1, BLOCKS)), "lm_head"]
    assert contents(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert thanos.PruningReport.read(tmp_path / "out/pruning.json") == report


def test_a_run_interrupted_again_and_again(whole: Any, model: Path, text_file: Path, tmp_path: Path) -> None:
    for after in range(BLOCKS):
        with pytest.raises(Stop):
            thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True, on_event=stop_after(after))
    thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True)
    assert contents(tmp_path / "out") == whole


def test_the_time_of_the_interrupted_run_counts(model: Path, text_file: Path, tmp_path: Path) -> None:
    work = interrupted(model, tmp_path / "out", recipe(text_file), after=1)
    last = json.loads((work / "journal.jsonl").read_text().splitlines()[-1])
    report = thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True)
    for name, before in last["phases"].items():
        assert report.phases[name].seconds > before["seconds"], name


def test_the_batch_of_the_interrupted_run_is_used_again(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(passes.BATCH_TOKENS, "cpu", 3 * LENGTH)
    thanos.prune(model, tmp_path / "whole", recipe(text_file))
    interrupted(model, tmp_path / "out", recipe(text_file), after=1)
    monkeypatch.setitem(passes.BATCH_TOKENS, "cpu", 4096)
    sizes: list[int] = []
    original = BlockCalls.run

    def spy(self: BlockCalls, index: int, hidden: torch.Tensor, first: int, **how: bool) -> torch.Tensor:
        sizes.append(len(hidden))
        return original(self, index, hidden, first, **how)

    monkeypatch.setattr(BlockCalls, "run", spy)
    thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True)
    assert set(sizes) == {3, 1}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_nothing_to_resume_starts_from_the_beginning(whole: Any, model: Path, text_file: Path, tmp_path: Path) -> None:
    events: list[thanos.Event] = []
    thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True, on_event=events.append)
    assert ["nothing to resume" in e.message for e in events if e.kind == "note"] == [True]
    assert contents(tmp_path / "out") == whole


# --- a run that is complete -------------------------------------------------------------------------------------------


@pytest.fixture
def complete(model: Path, text_file: Path, tmp_path: Path) -> Path:
    """A finished output."""
    thanos.prune(model, tmp_path / "out", recipe(text_file))
    return tmp_path / "out"


def test_a_complete_run_given_again_is_complete_and_nothing_is_written(
    complete: Path, model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, events = state(complete.parent), []
    with monkeypatch.context() as patch:
        patch.setattr("thanos.run.prune.prepare", lambda *_, **__: pytest.fail("the model was opened"))
        report = thanos.prune(model, complete, recipe(text_file), resume=True, on_event=events.append)
    assert report == thanos.PruningReport.read(complete / "pruning.json")
    assert ["already complete" in event.message for event in events if event.kind == "note"] == [True]
    assert state(complete.parent) == before


def test_the_command_of_a_complete_run_given_again_exits_0(
    complete: Path, model: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(complete.parent)
    settings = ["--calibration", str(text_file), "--samples", str(SAMPLES), "--sequence-length", str(LENGTH)]
    words = ["prune", str(model), str(complete), *settings, "--device", "cpu", "--targets", "layers.*"]
    assert run([*words, "--targets", "lm_head", "--resume", "--quiet"]) == 0
    assert "already complete" in capsys.readouterr().out
    assert state(complete.parent) == before
    assert run([*words, "--resume"]) == 2, "with other targets"
    assert "targets ['layers.*', 'lm_head'] → ['layers.*']" in capsys.readouterr().err
    assert run([*words, "--targets", "lm_head"]) == 2, "without --resume"


def test_a_complete_output_of_another_run_is_refused_naming_every_difference(
    complete: Path, model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    other = save_tiny(elsewhere / "model", num_hidden_layers=BLOCKS, max_shard_size="40KB", seed=1)
    text = elsewhere / text_file.name
    text.write_text(prose(6000, seed=2))
    line = refuses(complete, model, recipe(text_file, sparsity=0.6, seed=3), resume=True)
    assert "sparsity 0.5 → 0.6; seed 0 → 3; choose another OUT" in line
    assert "model-00001-of-" in refuses(complete, other, recipe(text_file), resume=True)
    content = text_file.read_bytes()
    try:
        text_file.write_bytes(text.read_bytes())
        assert "sha256 of the calibration text" in refuses(complete, model, recipe(text_file), resume=True)
    finally:
        text_file.write_bytes(content)


def test_the_run_of_an_output_names_no_folder_of_this_machine(model: Path, text_file: Path, tmp_path: Path) -> None:
    """An output may be published; where it was made from is its maker's business."""
    texts, moved = tmp_path / "home" / "texts", tmp_path / "elsewhere" / "texts"
    texts.mkdir(parents=True)
    for name in ("a.txt", "b.txt"):
        shutil.copyfile(text_file, texts / name)
    for number, source in enumerate(
        (f"{texts / 'a.txt'}", f"{texts}", f"{texts / 'a.txt'},{texts / 'b.txt'}", f"{texts}/*")
    ):
        out, made = tmp_path / str(number) / "out", recipe(text_file, calibration=source)
        thanos.prune(model, out, made)
        assert str(tmp_path) not in (out / "run.json").read_text()
        before = state(out)
        thanos.prune(model, out, made, resume=True)
        shutil.copytree(texts, moved)
        there = recipe(text_file, calibration=source.replace(str(texts), str(moved)))
        thanos.prune(model, out, there, resume=True)
        assert state(out) == before
        (moved / "a.txt").write_text(prose(6000, seed=2))
        assert "sha256 of the calibration text" in refuses(out, model, there, resume=True)
        shutil.rmtree(moved)


def test_a_complete_output_that_lost_a_file_is_not_complete(complete: Path, model: Path, text_file: Path) -> None:
    shard = sorted(complete.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard.name} is now missing" in refuses(complete, model, recipe(text_file), resume=True)
    (complete / "run.json").unlink()
    assert "no run.json that says which run made it" in refuses(complete, model, recipe(text_file), resume=True)


def test_when_all_blocks_are_finished_nothing_is_computed(
    whole: Any, model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(event: thanos.Event) -> None:
        if event.phase == "finish":
            raise Stop

    with pytest.raises(Stop):
        thanos.prune(model, tmp_path / "out", recipe(text_file), on_event=watch)
    monkeypatch.setattr(BlockCalls, "record", lambda *_: pytest.fail("the model was run"))
    thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True)
    assert contents(tmp_path / "out") == whole


def test_a_run_killed_while_it_cleared_up_is_complete(
    whole: Any, model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("thanos.run.work_folder.WorkFolder.remove", lambda self: self.published and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            thanos.prune(model, tmp_path / "out", recipe(text_file))
    assert (tmp_path / ".out.partial/run.json").exists()
    (tmp_path / ".out.partial/journal.jsonl").unlink()
    with pytest.raises(UserError, match=r"sparsity 0\.5 → 0\.3"):
        thanos.prune(model, tmp_path / "out", recipe(text_file, sparsity=0.3), resume=True)
    report = thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True)
    assert report == thanos.PruningReport.read(tmp_path / "out/pruning.json")
    assert contents(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- only the same run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that ended after its second block left. Not to be modified."""
    return interrupted(model, tmp_path_factory.mktemp("left") / "out", recipe(text_file, sparsity=0.5), after=1)


def state(folder: Path) -> dict[str, tuple[bytes, int] | None]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in folder.rglob("*")
    }


def refuses(left: Path, model: Path, settings: thanos.Recipe, **how: Any) -> str:
    """Expect a refusal that changes nothing; return its line."""
    before = state(left.parent)
    with pytest.raises(UserError) as caught:
        thanos.prune(model, left.parent / "out", settings, **how)
    assert state(left.parent) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_interrupted_run_is_neither_continued_nor_deleted_unasked(left: Path, model: Path, text_file: Path) -> None:
    line = refuses(left, model, recipe(text_file))
    assert "finished 2 of 4 blocks" in line
    assert "--resume continues it, --overwrite starts over" in line


def test_pack_beside_it_names_no_option_that_pack_does_not_have(left: Path, model: Path, text_file: Path) -> None:
    thanos.prune(model, left.parent / "sparse", recipe(text_file))
    before = state(left.parent)
    with pytest.raises(UserError) as caught:
        thanos.pack(left.parent / "sparse", left.parent / "out")
    assert state(left.parent) == before
    assert "finished 2 of 4 blocks; its own command continues it with --resume, and --overwrite discards it" in str(
        caught.value
    )


def test_a_plan_beside_it_changes_nothing_and_a_note_says_of_what_it_is(
    left: Path, model: Path, text_file: Path
) -> None:
    before, notes = state(left.parent), list[str]()

    def hear(event: thanos.Event) -> None:
        if event.kind == "note":
            notes.append(event.message)

    planned = thanos.plan(model, left.parent / "out", recipe(text_file), on_event=hear)
    assert planned.blocks == BLOCKS
    assert state(left.parent) == before
    [note] = [note for note in notes if "interrupted" in note]
    assert note.startswith("the plan is of a whole run; an interrupted run of OUT out finished 2 of 4 blocks; --resume")
    thanos.plan(model, left.parent / "out", recipe(text_file), overwrite=True, on_event=hear)
    assert len([note for note in notes if "interrupted" in note]) == 1, (
        "with --overwrite the whole run is what was asked"
    )
    assert state(left.parent) == before


def test_another_recipe_is_refused_naming_every_difference(left: Path, model: Path, text_file: Path) -> None:
    line = refuses(left, model, recipe(text_file, sparsity=0.6, seed=3, targets=("layers.*",)), resume=True)
    assert "sparsity 0.5 → 0.6; " in line
    assert "seed 0 → 3; " in line
    assert "targets ['layers.*', 'lm_head'] → ['layers.*']" in line
    assert "samples" not in line
    assert "--overwrite to start over" in line
    assert line.endswith("give the original command with --resume, or, instead of --resume, --overwrite to start over")


def test_other_calibration_text_is_refused(left: Path, model: Path, text_file: Path) -> None:
    text = text_file.read_text()
    try:
        text_file.write_text(prose(6000, seed=2))
        line = refuses(left, model, recipe(text_file), resume=True)
    finally:
        text_file.write_text(text)
    assert "calibration sha256" in line


def test_a_large_file_that_was_touched_is_another_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(2 << 20))
    os.utime(path, ns=(10**18, 10**18))
    source = ModelSource(str(tmp_path), tmp_path)
    before = describe_run(thanos.Recipe(), source, torch.device("cpu"))
    assert check_same_run(before, describe_run(thanos.Recipe(), source, torch.device("cpu"))) == []
    flip(path, (2 << 20) - 1)
    os.utime(path, ns=(10**18, 10**18 + 1))
    with pytest.raises(UserError, match=r"model\.safetensors changed 2001-09-09 .*000000000 → .*000000001;"):
        check_same_run(before, describe_run(thanos.Recipe(), source, torch.device("cpu")))


@pytest.mark.parametrize("what", ["weights", "config", "shards"])
def test_another_model_is_refused_naming_the_file(what: str, text_file: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", num_hidden_layers=BLOCKS, max_shard_size="40KB")
    (tmp_path / "place").mkdir()
    left = interrupted(model, tmp_path / "place/out", recipe(text_file), after=1)
    shard = sorted(model.glob("*.safetensors"))[2]
    if what == "weights":
        flip(shard, shard.stat().st_size - 1)
        expected = f"{shard.name} sha256 "
    elif what == "config":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
        expected = "config.json bytes"
    else:
        shutil.rmtree(model)
        save_tiny(model, num_hidden_layers=BLOCKS)
        expected = "model.safetensors is new"
    assert expected in refuses(left, model, recipe(text_file), resume=True)


def test_a_model_of_many_other_shards_is_refused_in_a_line_of_bounded_length() -> None:
    before, now = ({"model": {f"{i:03}.safetensors": {"sha256": f"{run}{i}"} for i in range(200)}} for run in "ab")
    with pytest.raises(
        UserError, match=r"000\..*; 001\..*; 197 more such differences; 199\.safetensors sha256 a199 → b199;"
    ):
        check_same_run(before, now)
    now["model"] = {
        name: before["model"][name] if name > "002.safetensors" else now["model"][name] for name in now["model"]
    }
    with pytest.raises(UserError, match=r"000\.safetensors .*; 001\.safetensors .*; 002\.safetensors [^;]*; give"):
        check_same_run(before, now)


@pytest.mark.parametrize("package", ["torch", "transformers", "thanos"])
def test_another_version_is_refused(
    package: str, left: Path, model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if package == "thanos":
        monkeypatch.setattr("thanos.run.resume.__version__", "9.9")
    else:
        monkeypatch.setattr(f"{package}.__version__", "9.9")
    line = refuses(left, model, recipe(text_file), resume=True)
    assert f"{package} " in line or "thanos_version " in line
    assert "→ 9.9" in line


def test_another_machine_is_a_note(whole: Any, left: Path, model: Path, text_file: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(left, tmp_path / ".out.partial"))
    run = json.loads((work / "run.json").read_text())
    (work / "run.json").write_text(json.dumps(run | {"machine": {**run["machine"], "threads": 999}}))
    events: list[thanos.Event] = []
    report = thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True, on_event=events.append)
    [line] = [event.message for event in events if event.kind == "note"]
    assert "threads 999 → " in line
    assert report.warnings == [line]
    assert contents(tmp_path / "out")["model.safetensors.index.json"] == whole["model.safetensors.index.json"]


def test_overwrite_starts_over(whole: Any, left: Path, model: Path, text_file: Path, tmp_path: Path) -> None:
    shutil.copytree(left, tmp_path / ".out.partial")
    solved: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        solved = spy_on_solver(patch)
        thanos.prune(model, tmp_path / "out", recipe(text_file), overwrite=True)
    assert blocks_of(solved) == ["0", "1", "2", "3", "lm_head"]
    assert contents(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_resume_and_overwrite_replace_the_old_output(left: Path, model: Path, text_file: Path, tmp_path: Path) -> None:
    thanos.prune(model, tmp_path / "out", recipe(text_file, method="magnitude"))
    shutil.copytree(left, tmp_path / ".out.partial")
    with pytest.raises(UserError, match="not empty"):
        thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True)
    report = thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True, overwrite=True)
    assert report.recipe["method"] == "thanos"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- faults ---------------------------------------------------------------------------------------------------------------


def tensor_place(work: Path, name: str) -> tuple[Path, int]:
    """The file and the first byte of a tensor, by the format's description."""
    for path in (work / "model").glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        if name in header:
            return path, start + header[name]["data_offsets"][0]
    raise AssertionError(name)


def test_a_flipped_byte_in_a_finished_block_is_found_and_only_that_block_done_again(
    whole: Any, model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = interrupted(model, tmp_path / "out", recipe(text_file), after=2)
    name = "model.layers.1.mlp.up_proj.weight"
    path, start = tensor_place(work, name)
    flip(path, start + 77)
    solved, events = spy_on_solver(monkeypatch), []
    thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True, on_event=events.append)
    assert blocks_of(solved) == ["1", "3", "lm_head"]
    assert [event.message for event in events if event.kind == "note"] == [
        f"{name} differs from what was written (checksum); block 2 is processed again"
    ]
    assert contents(tmp_path / "out") == whole


def test_bytes_that_the_disk_garbled_unnoticed_are_found_and_done_again(
    whole: Any, model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checksum is that of what was to be written, not of what then stood in the file; nothing is read for it."""
    write, read = CheckpointWriter.write, []

    def garble(self: CheckpointWriter, name: str, tensor: torch.Tensor) -> None:
        write(self, name, tensor)
        if name == "model.layers.1.mlp.up_proj.weight":
            info = self._layout.tensors[name]
            flip(tmp_path / ".out.partial/model" / info.shard, info.offset + 5)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", garble)
        patch.setattr(CheckpointWriter, "read", lambda _, name: read.append(name))
        interrupted(model, tmp_path / "out", recipe(text_file), after=2)
    assert read == []
    solved = spy_on_solver(monkeypatch)
    thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True)
    assert blocks_of(solved) == ["1", "3", "lm_head"]
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("kind", ["header", "missing", "short", "long"])
def test_other_damage_to_a_shard_is_repaired(
    kind: str, whole: Any, left: Path, model: Path, text_file: Path, tmp_path: Path
) -> None:
    work = Path(shutil.copytree(left, tmp_path / ".out.partial"))
    path, _ = tensor_place(work, "model.layers.0.mlp.up_proj.weight")
    if kind == "header":
        flip(path, 40)
    elif kind == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size + (1000 if kind == "long" else -1000))
    thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True)
    assert contents(tmp_path / "out") == whole


def test_if_a_block_comes_out_otherwise_those_after_it_are_done_again(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a change of the machine: the blocks that follow must fit the block that is there."""
    work = interrupted(model, tmp_path / "out", recipe(text_file), after=2)
    path, start = tensor_place(work, "model.layers.1.mlp.up_proj.weight")
    flip(path, start)
    original = engine_module.prune_layer

    def another(weight: torch.Tensor, *args: Any, name: str, **kwargs: Any) -> Any:
        return original(weight * (1.5 if name == "model.layers.1.mlp.up_proj" else 1), *args, name=name, **kwargs)

    monkeypatch.setattr(engine_module, "prune_layer", another)
    thanos.prune(model, tmp_path / "whole", recipe(text_file))
    solved = spy_on_solver(monkeypatch)
    with pytest.raises(Stop):  # and what holds is known to a run that is killed meanwhile and resumed
        thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True, on_event=stop_after(1))
    assert blocks_of(solved) == ["1", "2"]
    thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True)
    assert blocks_of(solved[8:]) == ["2", "3", "lm_head"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 20, 700])
def test_a_truncated_journal_costs_the_last_block(
    cut: int, whole: Any, model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = interrupted(model, tmp_path / "out", recipe(text_file), after=2)
    journal = work / "journal.jsonl"
    os.truncate(journal, journal.stat().st_size - cut)
    solved = spy_on_solver(monkeypatch)
    with pytest.raises(Stop):
        thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True, on_event=stop_after(2))
    assert blocks_of(solved) == ["2", "3"]
    thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True)
    assert blocks_of(solved[8:]) == ["3", "lm_head"], "the line after the torn one counts"
    assert contents(tmp_path / "out") == whole


def test_a_flipped_byte_in_the_journal_costs_that_block(
    whole: Any, model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = interrupted(model, tmp_path / "out", recipe(text_file), after=2)
    lines = (work / "journal.jsonl").read_bytes().splitlines(keepends=True)
    flip(work / "journal.jsonl", len(lines[0]) + lines[1].index(b'"zeros": ') + 10)
    solved = spy_on_solver(monkeypatch)
    thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True)
    assert blocks_of(solved) == ["1", "3", "lm_head"]
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", [12, 30, 40])
def test_a_disk_that_fills_up_during_the_run(
    call: int,
    number: int,
    whole: Any,
    model: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, pwrite = [], os.pwrite

    def full(descriptor: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) == call:
            return pwrite(descriptor, memoryview(data)[: len(data) // 2], offset)  # half of it still goes in
        if len(calls) > call:
            raise OSError(number, os.strerror(number))
        return pwrite(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ResourceError, match="free some space"):
            thanos.prune(model, tmp_path / "out", recipe(text_file))
    assert not (tmp_path / "out").exists()
    thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True)
    assert contents(tmp_path / "out") == whole


def test_a_file_that_may_not_grow(model: Path, text_file: Path, tmp_path: Path) -> None:
    """A limit that the kernel itself enforces (ulimit -f), below the size of the shards."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # Python's choice: the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ResourceError, match="ulimit -f"):
            thanos.prune(model, tmp_path / "out", recipe(text_file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", [2, 14, 25, 40])
def test_a_failing_fsync_leaves_no_block_that_only_seems_finished(
    call: int, whole: Any, model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed fsync the kernel may have dropped the pages: the journal must not name their block."""
    calls, fsync = [], os.fsync

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) >= call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    finished: list[int | None] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises((OSError, ResourceError), match=r"Input/output|cannot write"):
            thanos.prune(
                model,
                tmp_path / "out",
                recipe(text_file),
                on_event=lambda event: finished.append(event.block) if event.kind == "block" else None,
            )
    solved = spy_on_solver(monkeypatch)
    thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True)
    assert not {str(block) for block in finished} & set(blocks_of(solved)), "told to be complete, but lost"
    assert contents(tmp_path / "out") == whole


def test_a_blocks_tensors_are_durable_before_the_journal_names_it(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, write = os.fsync, CheckpointWriter.write

    def note_fsync(descriptor: int) -> None:
        steps.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def note_write(self: CheckpointWriter, name: str, tensor: torch.Tensor) -> None:
        write(self, name, tensor)
        steps.append(f"write {self._layout.tensors[name].shard}")

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(CheckpointWriter, "write", note_write)
    thanos.prune(model, tmp_path / "out", recipe(text_file))
    dirty: set[str] = set()
    journaled = 0
    for step in steps:
        if step.startswith("write "):
            dirty.add(step.removeprefix("write "))
        elif step == "journal.jsonl":
            assert not dirty
            journaled += 1
        dirty.discard(step)
    assert journaled == BLOCKS + 1
