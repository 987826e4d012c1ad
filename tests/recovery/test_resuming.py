"""An interrupted recovery: the resumed run ends in the same bytes, and nothing is taken over that is incomplete."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import recovering_killed
import thanos
from helpers import save_tiny
from recovering import VARIED, prune, settings
from thanos.errors import UserError
from thanos.recovery.states import MARK, RecoveryFolder

pytest.importorskip("accelerate", reason="the extra recover is not installed")

from thanos.recovery import watch

TIMED = ("phases", "seconds")


def stop_at(step: int) -> Callable[[thanos.Event], None]:
    """A watcher that interrupts the run as Ctrl-C does, at a step of the training; at -1 when the output is written."""

    def watch(event: thanos.Event) -> None:
        at_step = event.kind == "progress" and event.phase == "train" and event.done == step
        if at_step or (step < 0 and event.phase == "finish"):
            raise KeyboardInterrupt

    return watch


def interrupted(
    pruned: Path, out: Path, dense: Path, recipe: thanos.RecoveryRecipe, step: int, **how: Any
) -> RecoveryFolder:
    with pytest.raises(KeyboardInterrupt):
        thanos.recover(pruned, out, dense=dense, recipe=recipe, on_event=stop_at(step), **how)
    return RecoveryFolder(out)


def untimed(report: thanos.RecoveryReport) -> dict[str, Any]:
    return {name: value for name, value in report.to_dict().items() if name not in TIMED}


@pytest.fixture(scope="module")
def half(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A dense model in bfloat16, its pruned child, and the child's uninterrupted recovery."""
    folder = tmp_path_factory.mktemp("half")
    dense = save_tiny(folder / "dense", dtype=torch.bfloat16)
    pruned = prune(dense, folder / "out", text_file)
    thanos.recover(pruned, folder / "out2", dense=dense, recipe=settings(text_file))
    return dense, pruned, folder / "out2"


@pytest.fixture(params=["recovered", "varied"])
def whole_run(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    """An uninterrupted recovery, on the same text in all epochs or on a varied one, and its settings."""
    return request.getfixturevalue(request.param), VARIED if request.param == "varied" else {}


@pytest.mark.parametrize(("step", "kept"), [(1, 0), (2, 0), (3, 2), (4, 2), (6, 4), (-1, 6)])
def test_interrupted_and_resumed_equals_uninterrupted(
    step: int, kept: int, whole_run: Any, pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    (whole, expected), changes = whole_run
    out, recipe = tmp_path / "out2", settings(text_file, **changes)
    assert interrupted(pruned, out, tiny_llama, recipe, step).finished == kept
    report = thanos.recover(pruned, out, dense=tiny_llama, recipe=recipe, resume=True)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert untimed(report) == untimed(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["out2"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sends SIGKILL")
def test_killed_and_resumed_equals_uninterrupted(
    whole_run: Any, pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """Killed again and again: in the middle of an epoch, and while a best state and a checkpoint are written."""
    (whole, expected), changes = whole_run
    out, recipe = tmp_path / "out2", settings(text_file, **changes)
    moments = [("step", 1), ("best", 2), ("step", 3), ("checkpoint", 4), ("step", 5)]
    for moment, kept in zip(moments, (0, 0, 2, 2, 4), strict=True):
        arguments = (pruned, tiny_llama, out, recipe.to_dict(), moment, torch.get_num_threads())
        process = multiprocessing.get_context("spawn").Process(target=recovering_killed.run, args=arguments)
        process.start()
        process.join(300)
        assert process.exitcode == -signal.SIGKILL, moment
        assert RecoveryFolder(out).finished == kept, moment
        assert not out.exists()
    report = thanos.recover(pruned, out, dense=tiny_llama, recipe=recipe, resume=True)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert untimed(report) == untimed(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["out2"]


def test_interrupted_again_and_again_in_a_dtype_that_rounds(
    half: tuple[Path, Path, Path], text_file: Path, tmp_path: Path
) -> None:
    """The float32 weights go on, not those that were rounded for the output."""
    dense, pruned, whole = half
    out, recipe = tmp_path / "out2", settings(text_file)
    for step, kept in ((3, 2), (3, 2), (5, 4)):
        assert interrupted(pruned, out, dense, recipe, step, resume=True).finished == kept
    thanos.recover(pruned, out, dense=dense, recipe=recipe, resume=True)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_checkpoint_without_its_mark_does_not_count(
    recovered: Any, pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """A crash while step 4 was saved: its checkpoint and its best state are torn, and those of step 2 still there."""
    out, recipe = tmp_path / "out2", settings(text_file)
    work = interrupted(pruned, out, tiny_llama, recipe, 3)
    for old, new in (("steps/checkpoint-2", "steps/checkpoint-4"), ("best-2", "best-4")):
        shutil.copytree(work.path / old, work.path / new)
    (work.steps / "checkpoint-4" / MARK).unlink()
    (work.steps / "checkpoint-4" / "optimizer.pt").write_bytes(b"torn")
    (work.path / "best-4" / "model.safetensors").write_bytes(b"torn")
    assert work.finished == 2
    thanos.recover(pruned, out, dense=tiny_llama, recipe=recipe, resume=True)
    assert (out / "model.safetensors").read_bytes() == (recovered[0] / "model.safetensors").read_bytes()


def test_one_checkpoint_and_one_best_state_are_kept(
    pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    work = interrupted(pruned, tmp_path / "out2", tiny_llama, settings(text_file), -1)
    assert [path.name for path in work.steps.iterdir()] == ["checkpoint-6"]
    assert [path.name for path in work.path.glob("best-*")] == ["best-4"]


def test_no_checkpoint_is_written_sooner_than_it_pays(
    pruned: Path, recovered: Any, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "CHECKPOINT_SECONDS", 1e9)
    work = interrupted(pruned, tmp_path / "out2", tiny_llama, settings(text_file), 5)
    assert not work.path.exists(), "without a checkpoint there is nothing to resume"
    report = thanos.recover(pruned, tmp_path / "out2", dense=tiny_llama, recipe=settings(text_file), resume=True)
    assert untimed(report) == untimed(recovered[1])
    for path in recovered[0].glob("*.safetensors"):
        assert (tmp_path / "out2" / path.name).read_bytes() == path.read_bytes()


def test_checkpoints_take_a_small_part_of_the_time(
    pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "CHECKPOINT_FRACTION", 0.0)  # the first one takes more than nothing, so no other follows
    work = interrupted(pruned, tmp_path / "out2", tiny_llama, settings(text_file), 5)
    assert work.finished == 2


def test_an_interrupted_run_is_neither_continued_nor_deleted_unasked(
    pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "out2", settings(text_file)
    work = interrupted(pruned, out, tiny_llama, recipe, 3)
    with pytest.raises(UserError, match="an interrupted run of OUT2 out2 finished 2 of 6 steps; --resume continues it"):
        thanos.recover(pruned, out, dense=tiny_llama, recipe=recipe)
    with pytest.raises(UserError, match=r"this is not the run that was interrupted: rate 0\.001 → 0\.002"):
        thanos.recover(pruned, out, dense=tiny_llama, recipe=settings(text_file, rate=2e-3), resume=True)
    assert work.finished == 2
    thanos.recover(pruned, out, dense=tiny_llama, recipe=settings(text_file, epochs=1), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out2"]


def test_pruning_to_the_same_folder_leaves_a_recovery_alone(
    pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    work = interrupted(pruned, tmp_path / "out2", tiny_llama, settings(text_file), 3)
    prune(tiny_llama, tmp_path / "out2", text_file)
    assert work.finished == 2


def test_a_complete_run_given_again_is_complete_and_nothing_is_written(
    recovered: tuple[Path, thanos.RecoveryReport], pruned: Path, tiny_llama: Path, text_file: Path
) -> None:
    out, report = recovered
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*")}
    notes = []
    again = thanos.recover(
        pruned,
        out,
        dense=tiny_llama,
        recipe=settings(text_file),
        resume=True,
        on_event=lambda e: notes.append(e.message),
    )
    assert again == report
    assert any("already complete" in note for note in notes)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*")} == before
    with pytest.raises(UserError, match=r"OUT2 .* is complete, but another run made it: epochs 3 → 4"):
        thanos.recover(pruned, out, dense=tiny_llama, recipe=settings(text_file, epochs=4), resume=True)


def test_the_output_of_prune_is_no_complete_recovery(
    pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(pruned, tmp_path / "out2"))
    with pytest.raises(UserError, match=r"is complete, but another run made it|exists and is not empty"):
        thanos.recover(pruned, out, dense=tiny_llama, recipe=settings(text_file), resume=True)
