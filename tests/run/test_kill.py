"""``kill -9`` at any instant, also during a write: the run resumes to the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

import killed
from helpers import save_tiny
from reports import contents

KILLS = 25
SERVER = multiprocessing.get_context("forkserver")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="counts Linux's system calls")]


@dataclass
class Runs:
    """Starts runs in processes of their own; knows what an undisturbed one gives and takes."""

    model: Path
    settings: dict[str, Any]
    whole: Any
    seconds: float
    calls: int
    nbytes: int

    def __call__(self, out: Path, *, kill: tuple[str, float] | None = None, **how: Any) -> int:
        """Run to the end, or until it is killed; return the exit code."""
        inside = None if kill is None or kill[0] == "seconds" else kill
        process = SERVER.Process(target=killed.run, args=(self.model, out, self.settings, how, inside))
        process.start()
        process.join(kill[1] if kill is not None and kill[0] == "seconds" else 900)
        if process.exitcode is None:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        assert process.exitcode is not None
        return process.exitcode

    def draw(self, draw: random.Random) -> tuple[str, float]:
        """A random moment: of time, in the bytes that are written, or before a system call."""
        kind = draw.choice(("seconds", "bytes", "calls"))
        if kind == "seconds":
            return kind, draw.uniform(0, self.seconds)
        return kind, draw.randrange(self.nbytes if kind == "bytes" else self.calls)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Runs:
    return undisturbed(tmp_path_factory.mktemp("kill"), text_file, targets=killed.TARGETS)


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Runs:
    """Runs that write a smaller model, in which also tuned tensors are cut."""
    changes = {"pattern": "neurons", "multiple_of": 8, "effort": "max", "tune": 1}
    return undisturbed(tmp_path_factory.mktemp("smaller"), text_file, **changes)


def undisturbed(folder: Path, text_file: Path, **changes: Any) -> Runs:
    SERVER.set_forkserver_preload(["killed_server"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11's server gets no other
        forkserver.ensure_running()
    model = save_tiny(folder / "model", num_hidden_layers=4, max_shard_size="40KB")
    settings = {"calibration": str(text_file), "samples": 4, "sequence_length": 32, "device": "cpu"}
    settings |= changes
    counting = SERVER.Process(target=killed.count_calls, args=(model, folder / "out", settings, folder / "calls"))
    counting.start()
    counting.join()
    assert counting.exitcode == 0
    found = Runs(model, settings, contents(folder / "out"), 0.0, len((folder / "calls").read_text().splitlines()), 0)
    found.nbytes = sum(path.stat().st_size for path in (folder / "out").glob("*.safetensors"))
    began = time.monotonic()
    assert found(folder / "timed") == 0
    found.seconds = time.monotonic() - began
    assert contents(folder / "timed") == found.whole
    return found


def finish(runs: Runs, out: Path) -> None:
    """Resume, unless the run was complete when it died; see that the result is the undisturbed one and nothing is left."""
    work = out.parent / f".{out.name}.partial"
    if work.exists() and out.exists() and not any(work.iterdir()):
        work.rmdir()  # all but an empty folder was cleared up
    if not out.exists() or work.exists():
        assert runs(out, resume=True) == 0
    assert contents(out) == runs.whole
    assert {path.name for path in out.parent.iterdir()} <= {out.name, f".{out.name}.lock"}


@pytest.mark.parametrize("name", ["runs", "smaller"])
def test_killed_at_random_moments_a_run_resumes_to_the_same_bytes(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    runs: Runs = request.getfixturevalue(name)
    draw = random.Random(20)
    kills: list[tuple[str, float]] = []
    finished: list[int] = []
    for attempt in range(4 * KILLS):  # a run may be complete before its moment comes
        if len(kills) >= KILLS:
            break
        out = tmp_path / str(attempt) / "out"
        out.parent.mkdir()
        for _ in range(draw.choice((1, 1, 2, 3))):  # some are killed again when they are resumed
            kill = runs.draw(draw)
            if out.exists() or runs(out, kill=kill, resume=True) != -signal.SIGKILL:
                break
            kills.append(kill)
            journal = out.parent / ".out.partial/journal.jsonl"
            finished.append(len(journal.read_bytes().splitlines()) if journal.exists() else 0)
        finish(runs, out)
    assert len(kills) >= KILLS
    assert {kind for kind, _ in kills} == {"seconds", "bytes", "calls"}
    assert len(set(finished)) >= 3, f"the kills were to hit many stages: {finished}"


def last_calls(number: int) -> list[int]:
    return list(range(-number, 0))


@pytest.mark.parametrize("before_last", last_calls(10))
def test_killed_while_it_publishes(before_last: int, runs: Runs, tmp_path: Path) -> None:
    """The last system calls give OUT its name and clear up: wherever they end, OUT is whole or not there."""
    for fewer in range(20):  # the log of events is written more or less often, as fast as the machine is
        out = tmp_path / str(fewer) / "out"
        out.parent.mkdir()
        code = runs(out, kill=("calls", runs.calls + before_last - fewer))
        if out.exists():
            assert contents(out) == runs.whole
        if code == -signal.SIGKILL:
            break
    assert code == -signal.SIGKILL
    finish(runs, out)


@pytest.mark.parametrize("before_last", last_calls(8))
def test_killed_while_it_replaces_an_old_output(before_last: int, runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("the old one")
    runs(out, kill=("calls", runs.calls + before_last), overwrite=True)
    if not out.exists() or (tmp_path / ".out.partial").exists() or (tmp_path / ".out.old").exists():
        assert runs(out, resume=True, overwrite=True) == 0
    assert contents(out) == runs.whole
    assert {path.name for path in tmp_path.iterdir()} <= {"out", ".out.lock"}


@pytest.mark.parametrize("before_last", range(-90, 0, 5))
def test_killed_while_the_smaller_model_is_written_and_published(
    before_last: int, smaller: Runs, tmp_path: Path
) -> None:
    """OUT never looks finished before it is, and a resumed run makes it the undisturbed one."""
    out = tmp_path / "out"
    smaller(out, kill=("calls", smaller.calls + before_last))
    if out.exists():
        assert contents(out) == smaller.whole
    finish(smaller, out)
