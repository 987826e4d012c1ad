"""Of a run on several processes, one reports a failure, in one line, in whatever order and however late the others fail."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launching import error_lines, torchrun
from thanos.system import ranks

_LATE = """
import os, signal, time
from thanos import cli
from thanos.cli import torchrun
from thanos.engine import leaving
from thanos.engine.stages.prune import PruneStage

def late(function):
    def called(*arguments):
        time.sleep(5)  # torchrun looks at its processes ten times a second, and sends the others SIGTERM
        return function(*arguments)
    return called

def dying(self, context, *arguments):
    if os.environ["RANK"] == "1" and context.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    yield from solve(self, context, *arguments)

solve, PruneStage._solve = PruneStage._solve, dying
if os.environ["LATE"] == "report":
    leaving.abort = late(leaving.abort)
else:
    torchrun.leave = late(torchrun.leave)
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("late", ["report", "leave"])
def test_a_signal_before_or_after_the_report_adds_no_second_line(
    late: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "late.py").write_text(_LATE)
    words = ["prune", tiny_llama, tmp_path / "out", "--calibration", text_file, "--samples", 4]
    words += ["--sequence-length", 32, "--device", "cpu", "--quiet"]
    run = torchrun(2, [str(tmp_path / "late.py")], words, LATE=late)
    assert run.returncode != 0
    (line,) = error_lines(run)
    # The process that is left may notice the lost connection before torchrun's signal, or after it.
    lost, ended = "the connection to another process of this run was lost", "torchrun ended the run"
    assert lost in line or ended in line
    assert "--resume" in line


_MISTAKE = """
import os, sys, time
from thanos import cli

def late(words):
    if os.environ["RANK"] == os.environ["LATE"]:
        time.sleep(5)
    return run(words)

run, cli.run = cli.run, late
cli.main(["prune", "model", "out", "--sparsity", "3"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("late", ["0", "1"])
def test_a_mistake_is_reported_by_the_process_that_finds_it_first(late: str, tmp_path: Path) -> None:
    """The others are ended by a signal before they find it, so that no certain rank can be the one that reports."""
    (tmp_path / "mistake.py").write_text(_MISTAKE)
    run = torchrun(2, [str(tmp_path / "mistake.py")], [], LATE=late)
    assert run.returncode != 0
    (line,) = error_lines(run)
    assert "sparsity must be a number" in line


# --- which process is the first ----------------------------------------------------------------------------------------------


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """This process as rank 1 of 2, which has not failed; returns the file in which torchrun would collect its error."""
    monkeypatch.setattr(ranks, "_first", None)
    monkeypatch.setattr(ranks, "_count_machine", None)
    error_file = tmp_path / "attempt_0/1/error.json"
    error_file.parent.mkdir(parents=True)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
    return str(error_file)


def test_one_of_many_processes_is_the_first(rank: str) -> None:
    code = "import sys\nfrom thanos.system.ranks import first_to_fail\nsys.stdin.readline()\nprint(first_to_fail())"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("now\n")
        process.stdin.flush()
    assert sorted(process.communicate()[0] for process in started) == ["False\n"] * 5 + ["True\n"]


def test_all_threads_of_a_process_get_the_same_answer(rank: str) -> None:
    answers: list[bool] = []
    assert not ranks.has_failed()
    threads = [threading.Thread(target=lambda: answers.append(ranks.first_to_fail())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 8
    assert ranks.has_failed()


def test_without_torchruns_folder_rank_0_is_the_first(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for error_file in ("", "/nowhere/attempt_0/1/error.json"):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", error_file)
        for number, first in (("0", True), ("1", False)):
            monkeypatch.setenv("RANK", number)
            monkeypatch.setattr(ranks, "_first", None)
            assert ranks.first_to_fail() is first, (error_file, number)


@pytest.mark.parametrize(("machines", "first"), [(1, True), (2, False)])
def test_of_several_machines_the_first_one_reports(
    machines: int, first: bool, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    ranks.count_failed_machines(lambda: machines)
    assert ranks.first_to_fail() is first
