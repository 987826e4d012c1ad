"""A study from file to store: what runs, what does not run twice, and what one failure leaves alone."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import thanos
from helpers import prose, save_tiny
from process_tree import left_of, offspring
from thanos.cli import run
from thanos.cli.study import PlainLines
from thanos.errors import DataError, NumericsError, StudyError, UserError
from thanos.evaluation.tasks import ZeroShot
from thanos.model.loading import load_model
from thanos.model.source import resolve_model
from thanos.run.lock import locked
from thanos.solvers.prune_layer import prune_layer
from thanos.study import run as runner
from thanos.study.config import read_study
from thanos.study.events import StudyEvent
from thanos.study.grid import Cell
from thanos.study.records import make_record
from thanos.study.session import Session, throttled
from thanos.study.store import CellRecord, StoreWriter, read_store

HEAD = 'models = ["tiny"]\n[evaluation]\ntext = "prose.txt"\nsequence_length = 64\nmax_windows = 4\n'
GRID = '[[grid]]\ncalibration = "prose.txt"\nsamples = 4\nsequence_length = 32\n'


@pytest.fixture
def data(tiny_llama: Path, text_file: Path, tmp_path: Path) -> Path:
    """A folder with the tiny model as ``tiny`` and the text as ``prose.txt``, the study's data."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_llama, folder / "tiny")
    shutil.copyfile(text_file, folder / "prose.txt")
    return folder


def write(tmp_path: Path, grids: str, head: str = HEAD) -> Path:
    path = tmp_path / "my.toml"
    path.write_text(head + grids)
    return path


def session(path: Path, data: Path, out: Path) -> tuple[Session, tuple[Cell, ...]]:
    study = read_study(path)
    (out / "cache").mkdir(parents=True, exist_ok=True)
    return Session(study, runner.find_locations(study, out, data), "cpu"), study.cells


def quiet(event: Any) -> None:
    pass


# --- one cell ---------------------------------------------------------------------------------------------------------


def test_a_cell_is_what_prune_and_evaluate_give(tmp_path: Path, data: Path) -> None:
    path = write(tmp_path, GRID + 'pattern = "2:4"\noutlier_rows = 0.125\nkeep_budget = true\nseed = 1\n')
    worker, (dense, cell) = session(path, data, tmp_path / "out")
    record = worker.run(cell, quiet)
    assert (record.status, record.reason) == ("done", None)

    recipe = cell.recipe(calibration=str(data / "prose.txt"), device="cpu", measure_error=True)
    report = thanos.prune(data / "tiny", tmp_path / "alone", recipe)
    found = thanos.evaluate(
        tmp_path / "alone", text=str(data / "prose.txt"), sequence_length=64, max_windows=4, dense=data / "tiny", device="cpu"
    )  # fmt: skip
    assert record.evaluation is not None
    for name in ("perplexity", "mean_loss", "kl_divergence", "top1_agreement", "text_sha256", "windows", "tokens"):
        assert record.evaluation[name] == getattr(found, name), name
    assert record.evaluation["text"] == "prose.txt"
    written = report.to_dict()
    for mine, theirs in zip(record.layers, written["layers"], strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}
    assert record.effective_sparsity == {
        "targeted": report.totals["sparsity_targeted"],
        "all": report.totals["sparsity_all"],
    }
    assert record.recipe == {**written["recipe"], "calibration": "prose.txt"}
    assert record.calibration == {**written["calibration"], "source": "prose.txt"}
    assert {"solve", "statistics", "evaluate"} <= set(record.phases)
    assert record.seconds is not None
    assert record.seconds > 0
    assert record.host_peak_bytes is not None

    base = worker.run(dense, quiet)
    assert base.evaluation is not None
    assert base.evaluation["perplexity"] == pytest.approx(found.dense_perplexity, rel=1e-6)
    assert base.evaluation["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert base.effective_sparsity is not None
    assert base.effective_sparsity["targeted"] == 0
    assert (base.recipe, base.seconds, base.layers) == (None, None, [])


def test_a_model_of_which_the_cost_alone_counts_needs_no_text(tmp_path: Path, data: Path) -> None:
    head = 'models = ["tiny"]\ncost_only = ["tiny"]\n[evaluation]\ntext = "nowhere.txt"\n'
    path = write(tmp_path, GRID + "block_size = [8, 4096]\n", head)
    assert runner.run_study(path, tmp_path / "out", data=data, devices=["cpu"]).count("done") == 2
    records = read_store(tmp_path / "out").records
    for record in records:
        assert (record.evaluation, record.zero_shot, record.sources["text"]) == (None, None, None)
        assert record.seconds is not None
        assert all(layer["error_after_compensation"] > 0 for layer in record.layers)
        assert "evaluate" not in record.phases
    assert runner.run_study(path, tmp_path / "out", data=data, devices=["cpu"]).ran == 0


def test_a_cell_whose_tasks_fail_keeps_what_was_measured(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **others: Any) -> Any:
        raise DataError(f"the data in {data}/tasks cannot be had")

    monkeypatch.setattr("thanos.evaluation.tasks.zero_shot", broken)
    head, grid = HEAD + '[zero_shot]\ntasks = "piqa"\n', GRID + 'method = "magnitude"\nzero_shot = true\n'
    worker, cells = session(write(tmp_path, grid, head), data, tmp_path / "out")
    plain, (_, cell) = session(write(tmp_path, GRID + 'method = "magnitude"\n'), data, tmp_path / "plain")
    dense, pruned = (CellRecord.from_dict(worker.run(each, quiet).to_dict()) for each in cells)
    for record in (dense, pruned):
        assert (record.status, record.reason) == ("failed", "the data in tasks cannot be had")
        assert record.zero_shot is None
        assert record.effective_sparsity is not None
        assert {"reference", "evaluate", "zero_shot"} <= set(record.phases)
    whole = plain.run(cell, quiet)
    assert pruned.evaluation == whole.evaluation
    assert pruned.recipe == whole.recipe
    assert {**pruned.layers[0], "seconds": 0} == {**whole.layers[0], "seconds": 0}
    assert pruned.seconds is not None
    StoreWriter(tmp_path / "out").append(pruned)
    contents = read_store(tmp_path / "out")
    assert (contents.done, contents.failed) == ([], [pruned])


def test_tasks_are_put_to_the_model_that_was_evaluated(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Any]] = []

    def watched(name: str, inner: Any) -> Any:
        def call(*arguments: Any, **others: Any) -> Any:
            seen.append((name, others["network"]))
            return inner(*arguments, **others)

        return call

    scores = ZeroShot(
        model="", tasks={}, average={}, limit=None, cached=[], seconds=1, dtype="", device="", versions={}
    )
    monkeypatch.setattr("thanos.study.session.evaluate", watched("evaluate", thanos.evaluate))
    monkeypatch.setattr("thanos.evaluation.tasks.zero_shot", watched("zero_shot", lambda *_, **__: scores))
    head, grid = HEAD + '[zero_shot]\ntasks = "piqa"\n', GRID + 'method = "magnitude"\nzero_shot = true\n'
    worker, cells = session(write(tmp_path, grid, head), data, tmp_path / "out")
    assert [worker.run(cell, quiet).status for cell in cells] == ["done"] * 2
    assert [name for name, _ in seen] == ["evaluate", "zero_shot"] * 2
    (dense, again), (pruned, once_more) = (tuple(model for _, model in seen[i : i + 2]) for i in (0, 2))
    assert dense is not None
    assert dense is again
    assert pruned is once_more
    assert pruned is not dense


def test_a_model_too_large_for_the_memory_says_so(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = load_model

    def load(source: Any, **others: Any) -> Any:
        if "scratch" in str(source.folder):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return inner(source, **others)

    monkeypatch.setattr("thanos.study.session.load_model", load)
    worker, cells = session(write(tmp_path, GRID + 'method = "magnitude"\n'), data, tmp_path / "out")
    record = worker.run(cells[1], quiet)
    assert (record.status, record.reason) == ("failed", "out of memory on the host: close other programs that use it")
    assert record.layers


def test_a_cell_whose_evaluation_fails_keeps_its_pruning(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **others: Any) -> Any:
        raise NumericsError("NaN")

    monkeypatch.setattr("thanos.study.session.evaluate", broken)
    worker, cells = session(write(tmp_path, GRID + 'method = "magnitude"\n'), data, tmp_path / "out")
    record = worker.run(cells[1], quiet)
    assert (record.status, record.reason, record.evaluation) == ("failed", "NaN", None)
    assert record.layers
    assert {"solve", "evaluate"} <= set(record.phases)


def test_shared_work_is_done_once(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, GRID + 'method = ["wanda", "magnitude"]\nsparsity = [0.5, 0.6]\n')
    calls: dict[str, int] = {}

    def count(module: str, name: str) -> None:
        inner = getattr(sys.modules[module], name)

        def counted(*arguments: Any, **others: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return inner(*arguments, **others)

        monkeypatch.setattr(sys.modules[module], name, counted)

    for name in ("make_calibration", "load_model"):
        count("thanos.study.session", name)
    count("thanos.evaluation.reference", "cut_windows")
    monkeypatch.setattr("thanos.evaluation.perplexity.load_model", None)
    worker, cells = session(path, data, tmp_path / "out")
    assert [worker.run(cell, quiet).status for cell in cells] == ["done"] * 5
    assert calls == {"make_calibration": 1, "cut_windows": 1, "load_model": 1 + 4}, (
        "the dense model once, each pruned one once"
    )
    again, cells = session(path, data, tmp_path / "out")
    assert again.run(cells[1], quiet).status == "done"
    assert calls["make_calibration"] == 1, "another process takes the windows from the cache"


def test_an_infinite_perplexity_fails_its_cell_alone(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*arguments: Any, **named: Any) -> Any:
        return replace(thanos.evaluate(*arguments, **named), perplexity=math.inf, mean_loss=812.5)

    monkeypatch.setattr("thanos.study.session.evaluate", diverged)
    worker, cells = session(write(tmp_path, GRID + 'method = "magnitude"\n'), data, tmp_path / "out")
    record = worker.run(cells[1], quiet)
    assert (record.status, record.reason) == (
        "failed",
        "the perplexity is infinite: the mean loss is 812.5 nats per token",
    )
    assert record.layers
    json.dumps(record.to_dict(), allow_nan=False)  # or the store, and with it the study, would refuse it


def test_what_a_cell_compiles_is_compiled_before_its_seconds_count(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, GRID + 'pattern = ["2:4", "columns"]\nseed = [0, 1]\nsparsity = 0.5\n')
    solved: list[tuple[tuple[int, ...], str]] = []

    def pruned(weight: Tensor, inputs: Any, settings: Any, **named: Any) -> Any:
        solved.append((tuple(weight.shape), settings.pattern))
        return prune_layer(weight, inputs, settings, **named)

    monkeypatch.setattr("thanos.study.session.prune_layer", pruned)
    monkeypatch.setattr("thanos.study.session.compiles", lambda device: True)
    worker, cells = session(path, data, tmp_path / "out")
    new: list[set[tuple[tuple[int, ...], str]]] = []
    for cell in cells[1:]:
        before = len(solved)
        record = worker.run(cell, quiet)
        assert record.layers
        new.append(set(solved[before:]))
        assert new[-1] <= {(tuple(layer["shape"]), layer["pattern"]) for layer in record.layers}
    shapes = {tuple(layer["shape"]) for layer in record.layers}
    assert len(solved) == 4 * len(shapes), (
        "with and without zeros for each shape and pattern, not again for another seed"
    )
    assert [len(found) for found in new] == [len(shapes), 0, len(shapes), 0]


def test_the_cache_of_windows_knows_everything_that_shapes_them(tmp_path: Path, data: Path) -> None:
    path = write(tmp_path, GRID + 'method = "magnitude"\nseed = [0, 1]\n')
    worker, cells = session(path, data, tmp_path / "out")
    first = [worker.run(cell, quiet).calibration for cell in cells[1:]]
    (data / "prose.txt").write_text(prose(6000, seed=9))
    worker, cells = session(path, data, tmp_path / "out")
    second = [worker.run(cell, quiet).calibration for cell in cells[1:]]
    assert [found["seed"] for found in [*first, *second] if found] == [0, 1, 0, 1]
    assert len({found["sha256"] for found in [*first, *second] if found}) == 4
    assert len(list((tmp_path / "out" / "cache").iterdir())) == 4


def test_no_folder_of_this_machine_enters_the_store(tmp_path: Path, data: Path) -> None:
    (data / "short.txt").write_text("dan")
    grids = GRID + GRID.replace("prose", "short") + GRID.replace("prose", "gone")
    worker, cells = session(write(tmp_path, grids), data, tmp_path / "out")
    records = [worker.run(cell, quiet) for cell in cells]
    assert [record.status for record in records] == ["done", "done", "failed", "failed"]
    assert records[2].reason is not None
    assert "shorter than one sequence" in records[2].reason
    for record in records:
        assert str(tmp_path) not in json.dumps(record.to_dict())
        assert "/" not in (record.reason or "")


# --- a whole study ----------------------------------------------------------------------------------------------------


def go(path: Path, data: Path, out: Path, **arguments: Any) -> tuple[runner.StudyResult, list[StudyEvent]]:
    events: list[StudyEvent] = []
    result = runner.run_study(path, out, data=data, devices=["cpu"], on_event=events.append, **arguments)
    return result, events


def ended(events: list[StudyEvent]) -> list[str]:
    return [event.cell.title() for event in events if event.record is not None and event.cell is not None]


@pytest.mark.slow
def test_a_study_runs_each_cell_once_and_goes_on(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "out"
    path = write(tmp_path, GRID + 'method = ["wanda", "magnitude"]\nsparsity = [0.5, 0.8]\noutlier_rows = [0, 0.3]\n')
    result, events = go(path, data, out, workers=2)
    assert (result.ran, result.count("done"), result.count("impossible")) == (9, 7, 2)
    assert {event.worker for event in events if event.record} == {0, 1}
    assert any(event.event is not None for event in events)
    contents = read_store(out)
    assert {r.reason for r in contents.failed} == {
        r.reason for r in contents.failed if "is impossible with" in (r.reason or "")
    }
    assert {record.machine["sharers"] for record in contents.done} == {2}
    assert sorted(p.name for p in out.iterdir()) == ["cache", "store.jsonl", "study.toml"]
    assert (out / "study.toml").read_text() == path.read_text()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "the lock is released"

    before = (out / "store.jsonl").read_bytes()
    result, events = go(path, data, out)
    assert (result.ran, result.count("done"), result.count("impossible")) == (0, 7, 2)
    assert (out / "store.jsonl").read_bytes() == before

    path.write_text(path.read_text() + GRID + 'method = "wanda"\nsparsity = [0.5, 0.6]\n')
    result, events = go(path, data, out)
    assert ended(events) == ["tiny wanda unstructured 60 % seed 0"], "only the new cell runs"
    assert (out / "store.jsonl").read_bytes().startswith(before)

    # Another model under the same name is another result.
    shutil.rmtree(data / "tiny")
    save_tiny(data / "tiny", seed=5)
    assert runner.list_cells(path, out, data=data).count("new") == 10


@pytest.mark.slow
def test_a_failed_cell_runs_again_and_a_torn_record_too(tmp_path: Path, data: Path) -> None:
    out, text = tmp_path / "out", (data / "prose.txt").read_text()
    (data / "later.txt").write_text("dan")
    path = write(tmp_path, GRID.replace("prose", "later") + 'method = "magnitude"\n')
    result, events = go(path, data, out)
    assert (result.count("done"), result.count("failed")) == (1, 1)
    (data / "later.txt").write_text(text)
    whole = (out / "store.jsonl").read_bytes()
    (out / "store.jsonl").write_bytes(whole[:-20])
    result, events = go(path, data, out)
    assert next(event.message for event in events if event.message).endswith("its cell will run again")
    assert (result.ran, result.count("done")) == (1, 2)
    assert [record.status for record in read_store(out).records] == ["done", "done"]


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_one_cell(tmp_path: Path, data: Path) -> None:
    path = write(tmp_path, GRID + 'method = ["magnitude", "wanda", "sparsegpt"]\n')
    killed: list[Cell] = []

    def kill(event: StudyEvent) -> None:
        if event.cell and event.cell.method == "wanda" and event.event is not None and not killed:
            killed.append(event.cell)
            for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
                for pid in child.read_text().split():
                    if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(int(pid), signal.SIGKILL)

    result = runner.run_study(path, tmp_path / "out", data=data, devices=["cpu"], on_event=kill)
    assert killed
    assert (result.count("done"), result.count("failed")) == (3, 1)
    (failed,) = read_store(tmp_path / "out").failed
    assert failed.cell["method"] == "wanda"
    assert "ended by signal 9" in (failed.reason or "")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_study_continues_where_it_stopped(tmp_path: Path, data: Path, how: signal.Signals) -> None:
    out = tmp_path / "out"
    shares = [each / 20 for each in range(1, 17)]  # enough that some are left when the signal comes
    path = write(tmp_path, GRID + f'method = "magnitude"\nsparsity = {shares}\n')
    arguments = [sys.executable, "-m", "thanos", "study", str(path), str(out), "--data", str(data), "--devices", "cpu"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("[") and "3 of 17" in line:
                started = offspring(process.pid)
                process.send_signal(how)
                break
        process.stderr.read()
    assert process.returncode == (130 if how == signal.SIGINT else -9)
    finished = len(read_store(out).done)
    assert 3 <= finished < 17
    assert left_of(started) == set()  # an orphan ends within moments of its parent
    result, _ = go(path, data, out)
    assert (result.ran, result.count("done")) == (17 - finished, 17)
    assert not (out / "scratch").exists()


def test_two_studies_on_one_store_are_refused(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path, GRID), tmp_path / "out"
    with locked(out):
        assert run(["study", str(path), str(out), "--data", str(data)]) == 2
    assert str(os.getpid()) in capsys.readouterr().err
    assert not out.exists()


def test_a_store_of_a_newer_version_is_refused(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "store.jsonl").write_text('{"schema": 2}\n')
    with pytest.raises(UserError, match="newer version"):
        go(write(tmp_path, GRID), data, out)


def test_a_refused_study_changes_nothing(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    before = {"store.jsonl": '{"schema": 2}\n', "study.toml": "# an earlier one\n"}
    for name, text in before.items():
        (out / name).write_text(text)
    assert run(["study", str(write(tmp_path, GRID)), str(out), "--data", str(data), "--quiet"]) == 2
    assert {path.name: path.read_text() for path in out.iterdir()} == before


def test_other_task_files_are_other_cells_and_older_records_still_count(tmp_path: Path, data: Path) -> None:
    tasks, out = data / "tasks", tmp_path / "out"
    tasks.mkdir()
    out.mkdir()
    (tasks / "own.yaml").write_text("task: own\ndata_files:\n  test: ../own.jsonl\n")
    (data / "own.jsonl").write_text("{}\n")
    head = HEAD + '[zero_shot]\ntasks = "own"\ntask_folder = "tasks"\n'
    path = write(tmp_path, GRID + 'method = "magnitude"\nzero_shot = true\n' + GRID + 'method = "wanda"\n', head)
    study = read_study(path)
    locations = runner.find_locations(study, out, data)

    def states() -> list[str]:
        return list(runner._states(study, runner.find_locations(study, out, data), quiet).values())

    records = [make_record(study, locations, cell, torch.device("cpu"), {}) for cell in study.cells]
    assert [record.sources["tasks"] is None for record in records] == [False, False, True]
    writer = StoreWriter(out)
    for record in records:
        writer.append(record)
    assert states() == ["done"] * 3
    for changed in (tasks / "own.yaml", data / "own.jsonl"):
        before = changed.read_text()
        changed.write_text(before + "\n")
        assert states() == ["new", "new", "done"], changed.name
        changed.write_text(before)
    (tasks / "__pycache__").mkdir()
    (tasks / "__pycache__" / "own.pyc").write_text("compiled")
    assert states() == ["done"] * 3

    for record in records:
        known = {name: value for name, value in record.sources.items() if name != "tasks"}
        writer.append(replace(record, sources=known))
    (data / "own.jsonl").write_text("[]\n")
    assert states() == ["done"] * 3, "a record that says nothing of its tasks"


def test_a_folder_that_is_no_studys_is_refused(tmp_path: Path, data: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (data, tmp_path / "file"):
        with pytest.raises(UserError, match=r"not the folder of a study|is a file"):
            go(write(tmp_path, GRID), data, out)


def test_missing_texts_and_folders_are_named_before_the_work(tmp_path: Path, data: Path) -> None:
    (data / "prose.txt").unlink()
    with pytest.raises(
        StudyError, match=r"my\.toml, line 3, \[evaluation\] text: prose\.txt is in none of .*data.*--data"
    ):
        go(write(tmp_path, GRID), data, tmp_path / "out")
    head = HEAD.replace("prose.txt", "pydoc") + '[zero_shot]\ntasks = "x"\ntask_folder = "nowhere"\n'
    with pytest.raises(StudyError, match=r"my\.toml, line 8, \[zero_shot\] task_folder: nowhere is in none of"):
        go(write(tmp_path, GRID + "zero_shot = true\n", head), data, tmp_path / "out")


def test_models_and_calibration_texts_that_are_not_there_are_all_named_before_the_work(
    tmp_path: Path, data: Path
) -> None:
    head = HEAD.replace('["tiny"]', '["tiny", "./gone", "./blank"]')
    (data / "blank").mkdir()
    grids = GRID + GRID.replace('"prose.txt"', '["prose.txt", "later.txt", "empty.txt"]') + 'method = "magnitude"\n'
    (data / "empty.txt").write_text("")
    out = tmp_path / "out"
    with pytest.raises(StudyError) as refused:
        go(write(tmp_path, grids, head), data, out)
    message = str(refused.value)
    for expected in (
        r"my\.toml, line 1, models: \./gone does not exist; .*; it is in none of .*data.*--data",
        r"my\.toml, line 1, models: .*blank has no config\.json",
        r"my\.toml, line 11, \[grid\] calibration: later\.txt is in none of .*data.*--data",
        r"my\.toml, line 11, \[grid\] calibration: .*empty\.txt holds no text",
    ):
        assert re.search(expected, message), expected
    assert "prose.txt" not in message
    assert not out.exists(), "nothing was written"


def test_only_texts_of_cells_that_are_left_have_to_be_there(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    path = write(
        tmp_path, GRID.replace("prose", "moved") + 'method = "magnitude"\n', HEAD.replace("prose.txt", "pydoc")
    )
    study = read_study(path)
    locations = runner.find_locations(study, out, data)
    writer = StoreWriter(out)
    for cell in study.cells:
        writer.append(make_record(study, locations, cell, torch.device("cpu"), {"status": "done"}))
    result, _ = go(path, data, out)
    assert (result.ran, result.count("done")) == (0, 2)
    path.write_text(path.read_text().replace('"magnitude"', '["magnitude", "wanda"]'))
    with pytest.raises(StudyError, match=r"calibration: moved\.txt is in none of"):
        go(path, data, out)


@pytest.mark.parametrize("fault", ["windows", "calibration", "chats", "tokenizer"])
def test_a_model_that_cannot_be_pruned_or_evaluated_is_refused_before_it_is_pruned(
    fault: str, tmp_path: Path, data: Path
) -> None:
    head, grid, words = HEAD, GRID, ""
    if fault == "calibration":
        grid = re.sub(r"sequence_length = \d+", "sequence_length = [32, 512]", GRID)
        words = (
            r"calibration with sequence_length 512 is beyond the 256 positions of tiny; set it in \[\[grid\]\] to 256"
        )
    elif fault == "windows":
        head, words = HEAD.replace("sequence_length = 64", "sequence_length = 100000"), "beyond the model's"
    elif fault == "chats":
        chat = {"messages": [{"role": "user", "content": "hello"}]}
        (data / "chat.jsonl").write_text(json.dumps(chat) + "\n")
        (data / "tiny" / "chat_template.jinja").unlink()
        head, words = HEAD.replace("prose.txt", "chat.jsonl"), "no chat template"
    else:
        for file in data.glob("tiny/*token*"):
            file.unlink()
        words = "has no tokenizer"
    with pytest.raises(StudyError, match=rf"line 1, models: .*{words}"):
        go(write(tmp_path, grid + 'method = "magnitude"\n', head), data, tmp_path / "out")


@pytest.mark.parametrize(("devices", "workers"), [([], 1), (["cpu"], 0), (["gpu"], 1)])
def test_devices_are_checked(tmp_path: Path, data: Path, devices: list[str], workers: int) -> None:
    with pytest.raises(UserError, match=r"--devices names no device|--workers must be at least 1; got 0|unknown"):
        runner.run_study(write(tmp_path, GRID), tmp_path / "out", data=data, devices=devices, workers=workers)


def test_a_model_that_is_not_there_fails_its_cells_alone(tmp_path: Path, data: Path) -> None:
    path = write(tmp_path, GRID + 'method = "magnitude"\n', HEAD.replace('["tiny"]', '["tiny", "./gone"]'))
    worker, cells = session(path, data, tmp_path / "out")
    assert [(c.model, worker.run(c, quiet).status) for c in cells] == [
        ("tiny", "done"), ("./gone", "failed"), ("tiny", "done"), ("./gone", "failed"),
    ]  # fmt: skip


def test_list_shows_the_state_and_runs_nothing(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path, GRID + 'method = ["magnitude", "wanda"]\n'), tmp_path / "out"
    arguments = ["study", str(path), str(out), "--data", str(data), "--list"]
    assert run(arguments) == 0
    assert capsys.readouterr().out.count(" new ") == 3
    assert not out.exists()
    worker, cells = session(path, data, out)
    StoreWriter(out).append(worker.run(cells[1], quiet))
    assert run(arguments) == 0
    assert re.search(r"tiny magnitude unstructured 50 % seed 0 +done", capsys.readouterr().out)


def test_an_unknown_task_lists_near_names(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    head = HEAD + '[zero_shot]\ntasks = ["piqaa"]\n'
    path = write(tmp_path, GRID + "zero_shot = true\n", head)
    assert run(["study", str(path), str(tmp_path / "out"), "--data", str(data), "--quiet"]) == 2
    refused = capsys.readouterr().err
    assert "my.toml, line 7, [zero_shot] tasks: task 'piqaa'" in refused
    assert "similar names: piqa" in refused
    assert run(["study", str(path), str(tmp_path / "out"), "--data", str(data), "--list"]) == 2
    assert capsys.readouterr().err == refused


@pytest.mark.slow
def test_a_gguf_model_is_converted_once(tmp_path: Path, demo_gguf: Path) -> None:
    study = read_study(write(tmp_path, GRID, HEAD.replace("tiny", str(demo_gguf)).replace("prose.txt", "pydoc")))
    messages: list[str] = []
    locations = runner.find_locations(study, tmp_path / "out", None)
    for _ in range(2):
        found = runner.convert(locations, set(study.models), lambda event: messages.append(event.message))
    assert messages == [f"converting {demo_gguf.name} to safetensors, once"]
    folder = found.models[study.models[0]]
    source = resolve_model(folder)
    assert source.gguf is None
    converted, original = source.tokenizer(), resolve_model(demo_gguf).tokenizer()
    assert converted("Prune after training.")["input_ids"] == original("Prune after training.")["input_ids"]


# --- the display ------------------------------------------------------------------------------------------------------


def test_a_plain_line_for_every_cell(tmp_path: Path, data: Path) -> None:
    worker, cells = session(write(tmp_path, GRID), data, tmp_path / "out")
    record = worker.run(cells[0], quiet)
    now, stream = [0.0], io.StringIO()
    show = PlainLines(stream, clock=lambda: now[0])
    show(StudyEvent(message="mind the gap"))
    show(StudyEvent(cell=cells[0], done=0, total=4))
    now[0] = 30.0
    show(StudyEvent(cell=cells[0], record=record, done=1, total=4))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[0:00] note: mind the gap"
    assert re.fullmatch(r"\[0:30\] 1 of 4: tiny dense, perplexity [0-9.]+, 1:30 left", lines[1])
    assert len(lines) == 2


def test_a_plain_line_now_and_then_for_a_cell_that_runs(tmp_path: Path) -> None:
    path = write(tmp_path, GRID + 'method = ["magnitude", "wanda"]\n')
    _, first, second = read_study(path).cells
    now, stream = [1000.0], io.StringIO()
    show = PlainLines(stream, clock=lambda: now[0])

    def tell(seconds: float, worker: int, cell: Cell, event: thanos.Event | None) -> None:
        now[0] = 1000.0 + seconds
        show(StudyEvent(worker=worker, cell=cell, event=event, done=0, total=9))

    solve = thanos.Event(kind="layer", phase="solve", block=3, blocks=30)
    tell(0, 0, first, None)
    tell(20, 1, second, None)
    for seconds in range(1, 61):
        tell(seconds, 0, first, solve)
    tell(45, 1, second, solve)  # its first 30 seconds are not over
    tell(62, 1, second, thanos.Event(kind="progress", phase="evaluate", done=7, total=12))
    assert stream.getvalue().splitlines() == [
        f"[0:30] cell 1 of 9, {first.title()}: solve, block 4 of 30, 0:30 in this cell",
        f"[1:00] cell 1 of 9, {first.title()}: solve, block 4 of 30, 1:00 in this cell",
        f"[1:02] cell 2 of 9, {second.title()}: evaluate 7 of 12, 0:42 in this cell",
    ]


@pytest.mark.parametrize(
    ("states", "code", "words"),
    [
        (["done"] * 3, 0, ""),
        (["done", "failed", "failed"], 1, "2 of 3 cells failed; the reasons are in OUT/store.jsonl .* runs them again"),
        (["done", "failed", "impossible"], 1, "2 of 3 cells failed; 1 of them because .* runs the others again"),
        (["done", "done", "impossible"], 1, "1 of 3 cells failed; 1 of them because .*thanos report OUT$"),
    ],
)
def test_a_study_with_failed_cells_exits_with_1(
    states: list[Any], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cells = read_study(write(tmp_path, GRID + 'method = ["magnitude", "wanda"]\n')).cells
    found = runner.StudyResult(states=dict(zip(cells, states, strict=True)), with_tasks=frozenset(), ran=3)
    monkeypatch.setattr(runner, "run_study", lambda *_, **__: found)
    assert run(["study", str(tmp_path / "my.toml"), str(tmp_path / "out"), "--quiet"]) == code
    printed = capsys.readouterr()
    assert "cells" in printed.out
    said = printed.err.replace(str(tmp_path / "out"), "OUT").strip()
    assert (said == "") if not words else re.fullmatch(f"error: {words}", said), said


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_study_that_is_ended_says_how_it_continues(
    number: signal.Signals,
    code: int,
    word: str,
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path, GRID + 'method = "magnitude"\nsparsity = [0.25, 0.5]\n')
    arguments = ["study", str(path), str(tmp_path / "out"), "--data", str(data), "--devices", "cpu"]
    original = PlainLines.__call__

    def show(self: PlainLines, event: StudyEvent) -> None:
        original(self, event)
        if event.record is not None:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(PlainLines, "__call__", show)
        for left in (3, 2):
            assert run(arguments) == code
            said = capsys.readouterr().err.splitlines()[-1]
            assert said == f"error: {word}; 1 of {left} cells of this run are finished, the same command continues"
    assert run(arguments) == 0
    assert len(read_store(tmp_path / "out").done) == 3


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (UserError("a mistake"), ""),
        (OSError(28, "No space left on device"), "; 1 of 3 cells of this run are finished, the same command continues"),
    ],
)
def test_an_error_of_a_study_says_how_it_continues_if_that_can_help(
    error: Exception, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any, on_event: Any, **__: Any) -> None:
        on_event(StudyEvent(message="a note"))
        on_event(StudyEvent(done=1, total=3))
        on_event(StudyEvent(message="another note"))
        raise error

    monkeypatch.setattr(runner, "run_study", failing)
    assert run(["study", "a.toml", str(tmp_path / "out"), "--quiet"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert ("cells of this run" in said) is bool(hint)
    assert said.endswith(hint)


@pytest.mark.parametrize("start", [0.0, 1e9, -1e9])
def test_progress_is_throttled_and_notes_are_not(start: float) -> None:
    told: list[Any] = []
    now = [start]
    tell = throttled(told.append, seconds=60, clock=lambda: now[0])
    for kind, at in (("progress", 0), ("progress", 59), ("note", 59), ("layer", 118), ("block", 118), ("layer", 178)):
        now[0] = start + at
        tell(thanos.Event(kind=kind, phase="solve"))  # type: ignore[arg-type]
    assert [event.kind for event in told] == ["progress", "note", "block", "layer"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_several_workers_share_a_gpu(tmp_path: Path, data: Path) -> None:
    path = write(tmp_path, GRID + 'method = ["thanos", "wanda"]\n')
    result = runner.run_study(path, tmp_path / "out", data=data, devices=["cuda:0", "cuda:0"])
    assert result.count("done") == 3
    assert all(record.device_peak_bytes for record in read_store(tmp_path / "out").done if record.recipe)
