"""How a command ends before its time, as a shell sees it: the exit code, the line, and what is left."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from thanos.cli import run
from thanos.cli.interrupts import EndedEarly, terminable
from thanos.engine.stages.prune import PruneStage
from thanos.errors import DataError, ModelError, NumericsError, ResourceError, UserError

_SIGNALLED = """
import atexit, os, signal
from thanos.engine.stages.prune import PruneStage
from thanos.cli import main
solve = PruneStage._solve

def signalled(self, context, *arguments):
    if context.index == int(os.environ["BLOCK"]):
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    yield from solve(self, context, *arguments)

PruneStage._solve = signalled
atexit.register(os.kill, os.getpid(), signal.SIGINT)  # an impatient person presses Ctrl-C once more
main()
"""


def ended(number: int, block: int, arguments: list[str]) -> tuple[int, str]:
    """Prune, and get a signal in the middle of a block; return the exit code and what was said on the standard error."""
    found = subprocess.run(
        [sys.executable, "-c", _SIGNALLED, *arguments],
        env={**os.environ, "SIGNAL": str(int(number)), "BLOCK": str(block)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == ""
    return found.returncode, found.stderr


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_cleanly_and_the_line_says_how_to_go_on(
    number: int, code: int, word: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "my model"
    arguments = ["prune", str(tiny_llama), str(out), "--calibration", str(text_file), "--samples", "4"]
    arguments += ["--sequence-length", "32", "--device", "cpu", "--quiet"]
    returned, said = ended(number, 2, arguments)
    assert returned == code
    line = re.fullmatch(rf"error: {word}; 2 of 3 blocks are finished, continue with: (.*)\n", said)
    assert line, said
    assert [path.name for path in tmp_path.iterdir()] == [".my model.partial"]
    program, *again = shlex.split(line[1])
    assert (program, again) == ("thanos", [*arguments, "--resume"])
    assert run(again) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["my model"]


def test_a_signal_before_a_block_is_finished_leaves_nothing(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = ["prune", str(tiny_llama), str(tmp_path / "new/out"), "--calibration", str(text_file), "--samples", "4"]
    arguments += ["--sequence-length", "32", "--device", "cpu", "--quiet"]
    assert ended(signal.SIGINT, 0, arguments) == (130, "error: interrupted; no files are left\n")
    assert list(tmp_path.iterdir()) == []


def test_a_second_sigterm_does_not_disturb_the_end() -> None:
    """make passes SIGTERM on, and a scheduler sends it to all processes, so a command may get it twice."""
    ended = False
    with terminable() as received:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        ended = True
    assert ended
    assert received == [signal.SIGTERM]


@pytest.mark.parametrize(
    ("error", "finished", "hint"),
    [
        (KeyboardInterrupt(), 2, "; 2 of 9 blocks are finished, continue with: again"),
        (RuntimeError(), 2, "; 2 of 9 blocks are finished, continue with: again"),
        (KeyboardInterrupt(), 0, "; no files are left"),
        (RuntimeError(), 0, ""),
        (ResourceError(), 2, "; 2 of 9 blocks are finished, continue with: again"),
        (OSError(), 2, "; 2 of 9 blocks are finished, continue with: again"),
        (ModelError(), 2, ""),
        (DataError(), 2, ""),
        (NumericsError(), 2, ""),
        (UserError(), 2, ""),
        (ValueError(), 2, ""),
        (TypeError(), 2, ""),
        (IndexError(), 2, ""),
    ],
)
def test_the_hint_tells_what_is_left(error: BaseException, finished: int, hint: str) -> None:
    assert EndedEarly(error, finished, 9).hint("again") == hint


@pytest.mark.parametrize(
    ("error", "code", "hint"),
    [
        (ModelError("a mistake"), 2, False),
        (UserError("a mistake"), 2, False),
        (ValueError("a mistake"), 1, False),
        (ResourceError("a shortage"), 2, True),
        (RuntimeError("a failing device"), 1, True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_run_that_would_meet_its_error_again_does_not_advise_to_resume(
    error: Exception,
    code: int,
    hint: bool,
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = PruneStage.__call__

    def failing(self: Any, context: Any) -> Any:
        if context.index == 2:
            raise error
        yield from work(self, context)

    monkeypatch.setattr(PruneStage, "__call__", failing)
    arguments = ["prune", str(tiny_llama), str(tmp_path / "out"), "--calibration", str(text_file), "--samples", "4"]
    assert run([*arguments, "--sequence-length", "32", "--device", "cpu", "--quiet"]) == code
    [line] = capsys.readouterr().err.splitlines()
    assert str(error) in line
    assert ("2 of 3 blocks are finished, continue with: " in line) is hint
    assert ("resume" in line) is hint
    assert any("resume=True" in note for note in getattr(error, "__notes__", [])) is hint
