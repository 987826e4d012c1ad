"""``thanos recover`` as a user sees it: the lines of progress, the table, the JSON, and the way to go on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import thanos
from recovering import settings
from thanos.cli import progress as display
from thanos.cli import run
from thanos.cli.position import Position
from thanos.cli.progress import PlainLines, live_lines

pytest.importorskip("accelerate", reason="the extra recover is not installed")


def words(pruned: Path, out: Path, dense: Path, text: Path) -> list[str]:
    shape = [
        "--samples",
        "10",
        "--sequence-length",
        "32",
        "--epochs",
        "3",
        "--rate",
        "1e-3",
        "--train",
        "all",
        "--no-vary",
    ]
    return [
        "recover",
        str(pruned),
        str(out),
        "--dense",
        str(dense),
        "--calibration",
        str(text),
        "--device",
        "cpu",
        *shape,
    ]


def test_the_command(
    recovered: Any, pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "out2", tmp_path / "r.json"
    command = [*words(pruned, out, tiny_llama, text_file), "--json", str(file)]
    assert run(command) == 0
    shown = capsys.readouterr()
    assert (out / "model.safetensors").read_bytes() == (recovered[0] / "model.safetensors").read_bytes()
    report = json.loads(file.read_bytes())
    assert report == json.loads((out / "recovery.json").read_bytes())
    lines = [line.split("] ", 1)[1] for line in shown.err.splitlines()]
    assert [line for line in lines if "epoch" not in line] == [
        "load model",
        "calibrate",
        "dense model",
        "train",
        "finish",
    ]
    epochs = [line for line in lines if "epoch" in line]
    assert epochs[0].startswith(f"before the first epoch, held-out loss {report['held_out_before']:.4g}, host ")
    third = report["history"][3]
    assert epochs[3].startswith(f"epoch 3 of 3, loss {third['loss']:.4g}, held-out loss {third['held_out']:.4g}, host ")
    change = f"{report['held_out_before']:.5f} → {report['held_out_after']:.5f} nats a token"
    assert change in shown.out
    assert "of step 4 of 6" in shown.out
    assert run([*command, "--resume"]) == 0
    again = capsys.readouterr()
    assert "already complete, in" in again.out
    assert "is already complete, made by the same run: nothing to do" in again.err


def test_an_interrupted_command_says_how_to_go_on(
    pruned: Path,
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = PlainLines.__call__

    def show(self: PlainLines, event: thanos.Event) -> None:
        original(self, event)
        if event.phase == "train" and event.kind == "progress" and event.done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(display.PlainLines, "__call__", show)
    assert run(words(pruned, tmp_path / "out2", tiny_llama, text_file)) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: interrupted; 2 of 6 steps are finished, continue with: thanos recover ")
    assert error.endswith(" --resume")


def test_live_lines_show_loss_and_held_out_loss() -> None:
    position = Position()
    position(thanos.Event(kind="phase", phase="train", seconds=10.0, done=30, total=300))
    position(thanos.Event(kind="epoch", phase="train", seconds=10.0, done=1, total=10, held_out=0.5))
    event = thanos.Event(kind="progress", phase="train", seconds=20.0, done=60, total=300, tokens=1000, loss=0.25)
    position(event)
    head, tail = live_lines(position, 20.0)
    assert head == "train · 60 of 300 · 100 tokens/s · loss 0.25 · held-out loss 0.5"
    assert "1:20 left" in tail  # 30 steps of this part took 10 seconds, and 240 are left


def test_plain_lines_say_that_a_loss_is_not_a_number() -> None:
    stream = io.StringIO()
    PlainLines(stream)(thanos.Event(kind="epoch", phase="train", done=2, total=3, loss=1.0))
    assert "epoch 2 of 3, loss 1, held-out loss not a number" in stream.getvalue()


def test_events_are_logged(recovered: tuple[Path, Any], text_file: Path) -> None:
    from thanos.events import read_events

    with (recovered[0] / "events.jsonl").open() as lines:
        events = list(read_events(lines))
    assert [event.done for event in events if event.kind == "epoch"] == [0, 1, 2, 3]
    steps = [event.done for event in events if event.kind == "progress" and event.phase == "train"]
    assert steps == list(range(1, settings(text_file).steps + 1))
