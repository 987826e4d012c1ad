"""The journal: what was appended is read back, what was damaged does not count, and which records hold."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from thanos.engine.records import BlockRecord, LayerRecord
from thanos.run.journal import Journal, comes_after, current
from thanos.system.files import trim
from thanos.system.meter import PhaseRecord


def record(block: int | None, content: str = "a") -> BlockRecord:
    layer = LayerRecord(
        name=f"layers.{block}.q_proj",
        block=block,
        shape=(4, 8),
        dtype="bfloat16",
        method="thanos",
        pattern="2:4",
        sparsity=0.5,
        zeros=16,
        outlier_rows=0,
        error_before_compensation=0.1 + 0.2,
        error_after_compensation=None,
        damping=1e-300,
        damping_reason="µ → ∞",
        tokens=7,
        seconds=1 / 3,
        warnings=["a\nb"],
    )
    return BlockRecord(
        block=block,
        layers=[layer],
        tensors={f"layers.{block}.weight": content},
        batch=8,
        starts=[(0, 8), (16, 4)],
        tier="host",
        notes=["smaller batches"],
        phases={"solve": PhaseRecord(seconds=0.7, host_peak_bytes=2**40)},
    )


def test_what_is_appended_is_read_back_exactly(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.read() == []
    assert not journal.path.exists()
    records = [record(0), record(1), record(None)]
    for one in records:
        journal.append(one)
    assert journal.read() == records
    assert Journal(journal.path).read() == records
    assert len(journal.path.read_text().splitlines()) == 3
    assert all(json.loads(line) for line in journal.path.read_text().splitlines())


def test_wherever_the_file_ends_whole_lines_count_and_the_next_is_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    ends = [0]
    for block in range(3):
        journal.append(record(block))
        ends.append(journal.path.stat().st_size)
    data = journal.path.read_bytes()
    draw = random.Random(0)
    for size in {
        *ends,
        *(end - 1 for end in ends[1:]),
        *(end + 1 for end in ends[:-1]),
        *draw.choices(range(len(data)), k=40),
    }:
        journal.path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends[1:])
        assert [one.block for one in journal.read()] == list(range(whole))
        assert journal.path.read_bytes() == data[:size], "reading changes nothing"
        journal.append(record(7))
        assert [one.block for one in journal.read()] == [*range(whole), 7]


def test_any_flipped_bit_takes_its_line_out_or_changes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    records = [record(0), record(1), record(2)]
    for one in records:
        journal.append(one)
    data = journal.path.read_bytes()
    draw = random.Random(1)
    for _ in range(400):
        at = draw.randrange(len(data))
        journal.path.write_bytes(data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :])
        found = journal.read()
        assert all(one in records for one in found)
        assert len(found) >= 1, "at most the two lines beside a lost line end"


@pytest.mark.parametrize("size", [1, 100, 65_535, 65_536, 65_537, 200_000])
def test_long_torn_lines_are_cut(size: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for start in (b"", b"\n", b"whole\n", b"x" * 70_000 + b"\n"):
        path.write_bytes(start + b"t" * size)
        descriptor = os.open(path, os.O_RDWR)
        assert trim(descriptor) == len(start)
        assert trim(descriptor) == len(start)
        os.close(descriptor)
        assert path.read_bytes() == start


def test_the_later_record_of_a_block_holds() -> None:
    records = [record(0), record(1), record(1), record(2)]
    assert current(records) == {0: record(0), 1: record(1), 2: record(2)}
    assert current([*records, record(0)]).keys() == {0, 1, 2}, "the same bytes: what follows still fits"


def test_a_block_that_came_out_otherwise_voids_those_after_it() -> None:
    records = [record(0), record(1), record(2), record(3), record(None), record(1, "b")]
    assert current(records) == {0: record(0), 1: record(1, "b")}
    assert current([*records, record(2)]).keys() == {0, 1, 2}
    assert current([record(0), record(None), record(None, "b")]) == {0: record(0), None: record(None, "b")}


def test_what_follows_the_blocks_comes_after_every_block() -> None:
    assert comes_after(None, 0)
    assert comes_after(2, 1)
    assert not comes_after(1, 1)
    assert not comes_after(0, None)
    assert not comes_after(None, None)
