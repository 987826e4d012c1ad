"""The store: append-only, whole records only, the last one of a cell counts."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from thanos.errors import DataError, ResourceError
from thanos.study.store import SCHEMA, CellRecord, StoreWriter, cell_key, read_store, store_path
from thanos.system import files

CELL = {"model": "m", "method": "wanda", "pattern": "2:4", "sparsity": None, "seed": 0}


def record(**changes: Any) -> CellRecord:
    cell = {**CELL, **changes.pop("cell", {})}
    asked = {"text": "pydoc"}
    values: dict[str, Any] = {
        "key": cell_key(cell, asked), "status": "done", "reason": None, "date": "2026-01-01T00:00:00+00:00",
        "commit": "abc", "thanos_version": "0", "versions": {"torch": "2"}, "machine": {"device": "cpu", "cores": 2},
        "cell": cell, "asked": asked, "sources": {"model": None}, "evaluation": {"perplexity": 12.5},
        "layers": [{"name": "läyer", "error_after_compensation": float("nan")}],
    }  # fmt: skip
    return CellRecord(**{**values, **changes})


def write(folder: Path, *records: CellRecord) -> Path:
    writer = StoreWriter(folder)
    for one in records:
        writer.append(one)
    return folder / "store.jsonl"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    first, second = record(), record(cell={"seed": 1}, status="failed", reason="why")
    write(tmp_path, first, second)
    contents = read_store(tmp_path)
    assert [r.to_dict() for r in contents.records] == [first.to_dict(), second.to_dict()]
    assert (contents.done, contents.failed) == ([contents.records[0]], [contents.records[1]])
    assert contents.warnings == []
    assert read_store(tmp_path / "store.jsonl").records == contents.records


def test_a_packed_store_is_read_and_unpacked_to_go_on(tmp_path: Path) -> None:
    first, second = record(), record(cell={"seed": 1})
    path = write(tmp_path, first)
    packed = tmp_path / "store.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    for place in (tmp_path, packed):
        assert [r.key for r in read_store(place).records] == [first.key]
    write(tmp_path, second)
    assert [r.key for r in read_store(tmp_path).records] == [first.key, second.key]
    assert [r.key for r in read_store(packed).records] == [first.key], "the packed one is left alone"


def test_an_empty_store_does_not_hide_the_packed_one(tmp_path: Path) -> None:
    path, packed = write(tmp_path, record()), tmp_path / "store.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.write_bytes(b"")
    assert store_path(tmp_path) == packed
    contents = read_store(tmp_path)
    assert (len(contents.records), contents.warnings) == (1, [])
    write(tmp_path, record(cell={"seed": 1}))
    assert [r.cell["seed"] for r in read_store(path).records] == [0, 1]
    packed.unlink()
    path.write_bytes(b"")
    assert store_path(tmp_path) == path


def test_an_unpacked_store_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, record())
    (tmp_path / "store.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(files, "sync", lambda one: synced.append((one.name, path.exists())))
    StoreWriter(tmp_path)
    assert synced == [(f"store.jsonl.{os.getpid()}.part", False), (tmp_path.name, True)]


def test_cells_that_only_the_packed_store_has_are_warned_of(tmp_path: Path) -> None:
    path, packed = write(tmp_path, record(), record(cell={"seed": 1})), tmp_path / "store.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_store(tmp_path).warnings == []
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    contents = read_store(tmp_path)
    assert [r.cell["seed"] for r in contents.records] == [0]
    (warning,) = contents.warnings
    assert f"{packed} has 1 cell not in {path}" in warning
    assert "remove store.jsonl " in warning
    assert (read_store(path).warnings, read_store(packed).warnings) == ([], []), "a file that is named is read alone"
    packed.write_bytes(b"torn")
    (warning,) = read_store(tmp_path).warnings
    assert str(packed) in warning
    assert "remove one of the two" in warning


@pytest.mark.parametrize("content", [b"{}", gzip.compress(b"{}\n" * 99)[:-9]], ids=["not packed", "cut short"])
def test_a_damaged_packed_store_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "store.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"store\.jsonl\.gz cannot be read"):
        read_store(tmp_path)


def test_a_line_is_strict_json_that_begins_with_the_schema(tmp_path: Path) -> None:
    path = write(tmp_path, record())

    def refuse(name: str) -> None:
        raise AssertionError(name)

    values = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert next(iter(values.items())) == ("schema", SCHEMA)
    assert values["layers"] == [{"name": "läyer", "error_after_compensation": None}]


def test_pandas_opens_it_in_one_line(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    path = write(tmp_path, record(), record(cell={"seed": 1}))
    frame = pandas.read_json(path, lines=True)
    assert list(frame["cell"].str["seed"]) == [0, 1]
    assert list(frame["evaluation"].str["perplexity"]) == [12.5, 12.5]


def test_the_last_record_of_a_cell_counts(tmp_path: Path) -> None:
    write(tmp_path, record(status="failed", reason="no room"), record(cell={"seed": 1}), record())
    contents = read_store(tmp_path)
    assert [(r.cell["seed"], r.status) for r in contents.records] == [(0, "done"), (1, "done")]


@pytest.mark.parametrize("cut", [1, 2, 40, 200])
def test_a_torn_last_line_is_dropped_with_a_warning_and_nothing_else(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, record(), record(cell={"seed": 1}))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 1 - cut])
    contents = read_store(tmp_path)
    assert [r.cell["seed"] for r in contents.records] == [0]
    (warning,) = contents.warnings
    assert "line 2" in warning
    assert path.read_bytes() == whole[: len(whole) - 1 - cut], "reading changes nothing"
    write(tmp_path, record(cell={"seed": 2}))
    assert [r.cell["seed"] for r in read_store(tmp_path).records] == [0, 2]
    assert read_store(tmp_path).warnings == []
    assert path.read_bytes().startswith(whole.splitlines(keepends=True)[0])


def test_a_record_that_lacks_only_its_line_end_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path, record())
    path.write_bytes(path.read_bytes()[:-1])
    assert (len(read_store(tmp_path).records), read_store(tmp_path).warnings) == (1, [])
    write(tmp_path, record(cell={"seed": 1}))
    assert [r.cell["seed"] for r in read_store(tmp_path).records] == [0, 1]


@pytest.mark.parametrize("end", [b"\n", b"\n\n", b" \t\r\n", b"  "])
def test_blank_lines_at_the_end_are_skipped(tmp_path: Path, end: bytes) -> None:
    path = write(tmp_path, record())
    whole = path.read_bytes()
    path.write_bytes(whole + end)
    contents = read_store(tmp_path)
    assert (len(contents.records), contents.warnings) == (1, [])
    assert path.read_bytes() == whole + end, "reading changes nothing"
    write(tmp_path, record(cell={"seed": 1}))
    assert path.read_bytes().startswith(whole + b"{")
    assert [r.cell["seed"] for r in read_store(tmp_path).records] == [0, 1]


def test_a_store_of_white_space_is_empty(tmp_path: Path) -> None:
    (tmp_path / "store.jsonl").write_bytes(b"\n \n")
    assert read_store(tmp_path).records == []
    write(tmp_path, record())
    assert len(read_store(tmp_path).records) == 1


def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, record())
    newer = {**record(cell={"seed": 1}).to_dict(), "schema": SCHEMA + 1, "cell": ["all", "different"]}
    with path.open("a") as file:
        file.write(json.dumps(newer) + "\n")
    with pytest.raises(DataError, match=r"line 2.*newer version.*schema 2.*upgrade"):
        read_store(tmp_path)


def test_keys_of_a_later_minor_version_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, record())
    path.write_text(json.dumps({**record().to_dict(), "mood": "good"}) + "\n")
    assert read_store(tmp_path).records[0].to_dict() == record().to_dict()


@pytest.mark.parametrize("line", [b"{", b"[]", b"{}", b'{"schema": 1}', b"\xff\xfe", b'{"schema": "x"}', b""])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path, record())
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    with pytest.raises(DataError, match="line 2: not a record"):
        read_store(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("schema", value) for value in ("1", "2", 1.0, 2.0, True, None)],
        *[(name, None) for name in ("key", "status", "date", "cell", "asked", "sources", "machine", "versions")],
        *[("cell", []), ("key", 3), ("layers", None), ("layers", {}), ("phases", None), ("evaluation", "x")],
    ],
)
def test_a_field_of_another_type_is_damage(tmp_path: Path, name: str, value: Any) -> None:
    path = write(tmp_path, record())
    line = json.dumps({**record(cell={"seed": 1}).to_dict(), name: value})
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"line 2: not a record.*{name} must be .*remove this line"):
        read_store(tmp_path)


def test_a_missing_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"store\.jsonl"):
        read_store(tmp_path)


def test_a_folder_that_is_gone_cannot_be_written(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "gone")
    with pytest.raises(ResourceError, match="cannot be written"):
        writer.append(record())


def test_the_key_covers_every_value_and_no_order() -> None:
    assert cell_key({"a": 1, "b": None}, {"c": "x"}) == cell_key({"b": None, "a": 1}, {"c": "x"})
    keys = {cell_key({"a": a}, {"c": c}) for a in (0.5, 0.25, None, "0.5") for c in ("x", "y")}
    assert len(keys) == 8


def test_cells_of_a_method_that_is_no_longer_measured_are_skipped(tmp_path: Path) -> None:
    kept, former = record(), record(cell={"method": "formula"}).to_dict()
    former["formula"] = {"layer": "model.layers.0.mlp.down_proj", "errors": {"eq13": 0.1}}
    path = write(tmp_path, kept)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(former) + "\n")
    later = record(cell={"seed": 1})
    write(tmp_path, later)  # the study goes on: the file keeps the line, and no reader sees it
    assert [one.key for one in read_store(tmp_path).records] == [kept.key, later.key]
    assert read_store(tmp_path).warnings == []
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[1]) == former
