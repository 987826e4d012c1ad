"""The log of a run: whole lines, every event, and a display that plays it back as it was shown."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

import thanos
from thanos.cli.position import Position
from thanos.cli.progress import PlainLines, live_lines, watch
from thanos.events import Event, read_events
from thanos.system.event_stream import EventStream


class Stop(Exception):  # noqa: N818  it is a signal, not an error
    """Ends a run in a test."""


@pytest.fixture(scope="module")
def logged(
    tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Event], str]:
    """The log of a run, the events that its watcher got, and the lines that were shown meanwhile."""
    out, stream, events = tmp_path_factory.mktemp("log") / "out", io.StringIO(), []
    show = PlainLines(stream)

    def watch(event: Event) -> None:
        events.append(event)
        show(event)

    recipe = thanos.Recipe(calibration=str(text_file), samples=4, sequence_length=32, device="cpu")
    thanos.prune(tiny_llama, out, recipe, on_event=watch)
    return out / "events.jsonl", events, stream.getvalue()


def test_the_log_holds_every_event_as_it_was_handed_on(logged) -> None:
    path, events, _ = logged
    lines = path.read_text().splitlines(keepends=True)
    head = json.loads(lines[0])
    assert {key: head[key] for key in ("kind", "schema", "thanos_version")} == {
        "kind": "run",
        "schema": 1,
        "thanos_version": thanos.__version__,
    }
    assert list(read_events(lines)) == events
    assert [event.seconds for event in events] == sorted(event.seconds for event in events)
    assert all(0 < event.host_bytes <= event.host_peak_bytes * 1.01 for event in events)
    peaks = [event.host_peak_bytes for event in events]
    assert peaks == sorted(peaks), "a peak never sinks"
    assert all(event.device_bytes is None for event in events)


def test_played_back_the_log_shows_the_same_lines(logged) -> None:
    path, _, shown = logged
    stream = io.StringIO()
    show = PlainLines(stream)
    for event in read_events(path.read_text().splitlines(keepends=True)):
        show(event)
    assert stream.getvalue() == shown
    for block in (1, 2, 3):
        assert f"block {block} of 3, mean layer error " in shown


def test_the_live_display_tells_everything_that_was_promised() -> None:
    position = Position()
    common = {
        "blocks": 4,
        "host_bytes": 2 << 30,
        "host_peak_bytes": 3 << 30,
        "device_bytes": 5 << 30,
        "device_peak_bytes": 7 << 30,
    }
    position(Event(kind="phase", phase="statistics", block=0, seconds=10.0, **common))
    assert "left" not in live_lines(position, 12.0)[1], "nothing is known yet"
    position(Event(kind="block", phase="propagate", block=0, error=0.25, seconds=30.0, **common))
    position(Event(kind="phase", phase="statistics", block=1, seconds=30.0, **common))
    position(Event(kind="progress", phase="statistics", block=1, done=3, total=8, tokens=6000, seconds=33.0, **common))
    head, tail = live_lines(position, 35.0)
    assert head == "block 2/4 statistics · 3 of 8 · 2,000 tokens/s · error 0.25"
    assert tail.endswith("0:35 elapsed, 0:55 left · host 2.0 GiB, peak 3.0 GiB, device 5.0 GiB, peak 7.0 GiB")
    position(
        Event(
            kind="layer", phase="solve", block=1, layer="model.layers.1.mlp.up_proj", error=0.5, seconds=36.0, **common
        )
    )
    assert live_lines(position, 36.0)[0] == "block 2/4 solve · up_proj · error 0.25"


def test_the_error_of_a_block_is_shown_before_the_first_stage_and_after_each() -> None:
    stream, position = io.StringIO(), Position()
    show = PlainLines(stream)
    for event in (
        Event(kind="stage", phase="dense", block=0, blocks=2, stage="dense", error=0.0),
        Event(kind="stage", phase="dense", block=0, blocks=2, stage="prune", error=0.25),
        Event(kind="block", phase="propagate", block=0, blocks=2, error=0.125),
        Event(kind="stage", phase="dense", block=1, blocks=2, stage="dense", error=0.5),
        Event(kind="stage", phase="dense", block=1, blocks=2, stage="prune", error=0.375),
        Event(kind="stage", phase="dense", block=1, blocks=2, stage="tune", error=0.25),
        Event(kind="layer", phase="solve", block=1, blocks=2, layer="up_proj", error=0.75),
    ):
        show(event)
        position(event)
    assert "block 1 of 2, mean layer error 0.125, block error 0 → 0.25 (prune), host" in stream.getvalue()
    assert live_lines(position, 0.0)[0] == (
        "block 2/2 solve · up_proj · error 0.125 · block error 0.5 → 0.375 (prune) → 0.25 (tune)"
    )


def test_both_displays_tell_the_losses_of_tuning() -> None:
    stream = io.StringIO()
    plain, position = PlainLines(stream), Position()

    def show(**details: Any) -> None:
        event = Event(**{"block": 0, "blocks": 2, **details})
        plain(event)
        position(event)

    show(kind="progress", phase="solve", done=7, total=7, seconds=5.0)
    assert position.done == pytest.approx(0.4)
    show(kind="phase", phase="tune", total=64, seconds=10.0)
    show(kind="progress", phase="tune", done=8, total=64, tokens=800, held_out=0.5, held_out_before=0.5, seconds=20.0)
    assert position.done == pytest.approx((0.2 + 0.75 / 8) / 2)
    assert live_lines(position, 20.0)[0] == "block 1/2 tune · 8 of 64 · 80 tokens/s · held-out error 0.5 → 0.5"
    tuned = {"loss": 0.375, "held_out": 0.25, "held_out_before": 0.5}
    show(kind="progress", phase="tune", done=64, total=64, tokens=6400, seconds=40.0, **tuned)
    assert live_lines(position, 40.0)[0].endswith(
        "64 of 64 · 213 tokens/s · tuning loss 0.375, held-out error 0.5 → 0.25"
    )
    show(kind="block", phase="propagate", error=0.125, seconds=41.0)
    show(kind="phase", phase="statistics", block=1, seconds=41.0)
    assert "held-out" not in live_lines(position, 41.0)[0], "the next block is not tuned yet"
    show(kind="block", phase="propagate", block=1, error=0.125, seconds=42.0)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[0:20] block 1 of 2, tune 8 of 64, 80 tokens/s, held-out error 0.5 → 0.5"
    assert lines[1].endswith("tune 64 of 64, 213 tokens/s, tuning loss 0.375, held-out error 0.5 → 0.25")
    assert "mean layer error 0.125, tuning loss 0.375, held-out error 0.5 → 0.25, host" in lines[2]
    assert "held-out" not in lines[3]


class Terminal(io.StringIO):
    """What a terminal was sent."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [36, 80, 200])
def test_on_a_narrow_terminal_no_figure_is_cut_off(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    memory = {"host_bytes": 2 << 30, "host_peak_bytes": 3 << 30, "device_bytes": 5 << 30, "device_peak_bytes": 7 << 30}
    common = {"block": 1, "blocks": 126, "error": 0.0125, "seconds": 40_000.0, **memory}
    stream = Terminal()
    with watch(stream=stream) as show:
        show(Event(kind="phase", phase="propagate", block=1, blocks=126))
        show(Event(kind="block", phase="propagate", **common))
    shown = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).split())
    assert "block 2/126 propagate · error 0.0125" in shown
    assert re.search(
        r"11:06:40 elapsed, 1377:46:40 left · host 2.0 GiB, peak 3.0 GiB, device 5.0 GiB, peak 7.0 GiB", shown
    )
    assert "…" not in shown
    assert ("━" in shown or "╌" in shown) == (width >= 200)


def test_the_rest_is_reckoned_by_blocks_that_were_pruned_not_by_those_taken_over() -> None:
    position = Position()
    for block in range(6):
        position(Event(kind="phase", phase="propagate", block=block, blocks=10, seconds=float(block)))
        position(Event(kind="block", phase="propagate", block=block, blocks=10, seconds=block + 1.0, replayed=True))
        assert position.remaining(block + 1.0) is None
    position(Event(kind="phase", phase="statistics", block=6, blocks=10, seconds=6.0))
    position(Event(kind="block", phase="propagate", block=6, blocks=10, seconds=106.0))
    assert position.remaining(106.0) == 300.0


def test_blocks_that_do_not_run_count_as_no_work() -> None:
    """A removed block has one event, at its end."""
    position = Position()
    position(Event(kind="block", phase="propagate", block=0, blocks=10, seconds=0.5))
    assert position.remaining(0.5) is None
    position(Event(kind="phase", phase="statistics", block=1, blocks=10, seconds=1.0))
    position(Event(kind="block", phase="propagate", block=1, blocks=10, seconds=101.0))
    for block in (2, 3):
        position(Event(kind="block", phase="propagate", block=block, blocks=10, seconds=101.0))
        assert position.remaining(101.0) == 100.0 * (9 - block)


def test_a_resumed_run_adds_to_the_log_after_its_torn_line(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = thanos.Recipe(calibration=str(text_file), samples=4, sequence_length=32, device="cpu")

    def stop(event: Event) -> None:
        if event.kind == "block" and event.block == 1:
            raise Stop

    with pytest.raises(Stop):
        thanos.prune(tiny_llama, tmp_path / "out", recipe, on_event=stop)
    with (tmp_path / ".out.partial/model/events.jsonl").open("a") as file:
        file.write('{"kind": "progress", "pha')
    thanos.prune(tiny_llama, tmp_path / "out", recipe, resume=True)
    lines = (tmp_path / "out/events.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["kind"] for line in lines].count("run") == 2
    blocks = [(event.block, event.replayed) for event in read_events(lines) if event.kind == "block"]
    assert blocks == [(0, False), (1, False), (0, True), (1, True), (2, False)]


def test_a_log_of_another_schema_is_refused_and_a_torn_end_left_out() -> None:
    with pytest.raises(ValueError, match="schema 2; this version reads 1"):
        list(read_events(['{"kind": "run", "schema": 2}\n']))
    assert list(read_events(['{"kind": "note", "phase": "load"}\n', '{"kind": "no'])) == [
        Event(kind="note", phase="load")
    ]


def test_without_a_log_nothing_is_kept() -> None:
    seen: list[Event] = []
    stream = EventStream(seen.append)
    stream(Event(kind="phase", phase="load"))
    stream.close()
    assert seen[0].host_bytes > 0


def test_memory_is_read_for_each_block_and_else_a_few_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.05, 1.06, 1.17, 1.18])
    readings = iter([(5, 9), (6, 8), (4, 4)])
    monkeypatch.setattr("thanos.system.event_stream.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("thanos.system.event_stream.host_memory", lambda: next(readings))
    seen: list[Event] = []
    stream = EventStream(seen.append)
    for kind in ("phase", "progress", "block", "layer", "layer"):
        stream(Event(kind=kind, phase="solve"))
    assert [event.seconds for event in seen] == [1.0, 1.05, 1.06, 1.17, 1.18]
    assert [(event.host_bytes, event.host_peak_bytes) for event in seen] == [(5, 9), (5, 9), (6, 9), (4, 9), (4, 9)]
