"""Sources of text: every kind of file, every broken file, and the two halves of the documentation."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from thanos.calibration.text import calibration_documents, evaluation_rows
from thanos.errors import DataError

ROWS = ["first row", "", "dritte Zeile: äöü 😀", "  ", "line\nbreak\r\nhere", "last\n"]
DOCUMENTS = [row for row in ROWS if row.strip()]

READERS = pytest.mark.parametrize("read", [calibration_documents, evaluation_rows])


def json_lines(rows: list[Any]) -> str:
    return "".join(json.dumps({"text": row}) + "\n" for row in rows)


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def rows_file(folder: Path, suffix: str, rows: list[str]) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text(json_lines(rows), encoding="utf-8")
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(json_lines(rows).encode()))
    else:
        parquet(path, {"id": list(range(len(rows))), "text": rows})
    return path


# --- good files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_rows_of_a_file(tmp_path: Path, suffix: str) -> None:
    path = rows_file(tmp_path, suffix, ROWS)
    assert evaluation_rows(str(path)) == ROWS, "empty rows kept, nothing stripped"
    assert calibration_documents(str(path)) == DOCUMENTS


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo äöü 😀\n", encoding="utf-8")
    assert evaluation_rows(str(path)) == calibration_documents(str(path)) == ["one\n\ntwo äöü 😀\n"]


def test_json_lines_with_other_fields_unescaped_text_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "text": "äß", "x": null}\n\n   \n{"text": "b\\u2028c\u2028d"}', encoding="utf-8")
    assert evaluation_rows(str(path)) == ["äß", "b\u2028c\u2028d"]


def test_parquet_with_large_strings_and_row_groups(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [f"row {i}" for i in range(100)]
    table = pyarrow.table({"text": pyarrow.array(rows, pyarrow.large_string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert evaluation_rows(str(tmp_path / "a.parquet")) == rows


def test_wikitext_as_the_field_joins_it(thanos_data: Path) -> None:
    text = "\n\n".join(evaluation_rows(str(thanos_data / "wikitext-2-raw-v1" / "test.jsonl"))).encode()
    assert len(text) == 1_296_370
    assert hashlib.sha256(text).hexdigest() == "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"


def test_c4_sample(thanos_data: Path) -> None:
    path = thanos_data / "c4-sample.jsonl"
    expected = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert len(expected) == 1480
    assert calibration_documents(str(path)) == evaluation_rows(str(path)) == expected


# --- bad files --------------------------------------------------------------------------------------------------------


def refused(read: Any, source: Path | str, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        read(str(source))
    assert "\n" not in str(caught.value), "one line"


@READERS
@pytest.mark.parametrize(
    "name", ["wikitext", "WIKITEXT2", "text.csv", "a.json", "a.txt.gz", "", "some words", "a.parquet.gz"]
)
def test_unknown_sources(read: Any, name: str) -> None:
    refused(read, name, f"text source {re.escape(repr(name))} is unknown; choose wikitext2, c4, pydoc.*jsonl.gz")


@READERS
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".parquet"])
def test_missing_files(read: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"none{suffix}"
    refused(read, path, f"{re.escape(str(path))} does not exist")
    path.mkdir()
    refused(read, path, re.escape(str(path)))


def test_self_is_no_text_to_evaluate_on() -> None:
    refused(evaluation_rows, "self", "'self' is for calibration")


BAD = {
    "latin-1 text": ("a.txt", b"caf\xe9", "not UTF-8: .* at byte 3"),
    "latin-1 json": ("a.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8"),
    "not json": ("a.jsonl", b'{"text": "ok"}\n{"text": \n', "line 2: not valid JSON"),
    "text in a jsonl": ("a.jsonl", b"just words\n", "line 1: not valid JSON"),
    "no column": (
        "a.jsonl",
        b'{"text": "ok"}\n\n{"content": "x", "id": 3}\n',
        "line 3: no string under 'text'.*'content', 'id'",
    ),
    "a list": ("a.jsonl", b'["text"]\n', "line 1: no string under 'text'.*no object"),
    "a number": ("a.jsonl", b'{"text": 3}\n', "line 1: no string under 'text'"),
    "null": ("a.jsonl", b'{"text": null}\n', "line 1: no string under 'text'"),
    "no object": ("a.jsonl", b"{}\n", "line 1: no string under 'text'"),
    "not gzip": ("a.jsonl.gz", b'{"text": "ok"}\n', "cannot be read"),
    "cut gzip": (
        "a.jsonl.gz",
        gzip.compress(json_lines(["x" * 99, "yes"] * 50).encode(), mtime=0)[:-12],
        "cannot be read",
    ),
    "damaged gzip": ("a.jsonl.gz", gzip.compress(b"x" * 999, mtime=0)[:10] + b"\xff" * 30, "cannot be read"),
    "gzip of latin-1": ("a.jsonl.gz", gzip.compress(b'{"text": "caf\xe9"}\n'), "not UTF-8"),
    "gzip with bad json": ("a.jsonl.gz", gzip.compress(b'{"text": "ok"}\n{\n'), "line 2: not valid JSON"),
    "not parquet": ("a.parquet", b"hello, I am not a parquet file at all", "not a valid parquet file"),
    "empty parquet": ("a.parquet", b"", "not a valid parquet file"),
    "magic only": ("a.parquet", b"PAR1PAR1", "not a valid parquet file"),
}


@READERS
@pytest.mark.parametrize("case", BAD)
def test_broken_files(read: Any, tmp_path: Path, case: str) -> None:
    name, content, says = BAD[case]
    path = tmp_path / name
    path.write_bytes(content)
    refused(read, path, f"{re.escape(str(path))}.*{says}")


@READERS
def test_json_nested_too_deeply(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text('{"text": ' + "[" * 200_000)
    refused(read, path, f"{re.escape(str(path))}, line 1")


@READERS
def test_parquet_without_the_column(read: Any, tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"content": ["x"], "id": [1]})
    refused(read, path, f"{re.escape(str(path))} has no column 'text'; there are content, id")


@READERS
@pytest.mark.parametrize("values", [[1, 2], ["a", None], [["a"], ["b"]], [b"bytes"]])
def test_parquet_with_other_values(read: Any, tmp_path: Path, values: Any) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": values})
    refused(read, path, f"{re.escape(str(path))}: the column 'text' holds something other than strings")


@READERS
def test_truncated_parquet(read: Any, tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": [f"row {i}" * 20 for i in range(500)]})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(read, path, "not a valid parquet file")
    path.write_bytes(whole[:4] + bytes(len(whole) // 2 - 4) + whole[len(whole) // 2 :])
    refused(read, path, re.escape(str(path)))


@READERS
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("rows", [[""], ["", " \n\t", "\n\n"]])
def test_files_without_text(read: Any, tmp_path: Path, suffix: str, rows: list[str]) -> None:
    path = rows_file(tmp_path, suffix, rows)
    refused(read, path, f"{re.escape(str(path))} holds no text")


@READERS
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty_files(read: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    refused(read, tmp_path / name, "holds no text")
    (tmp_path / name).write_bytes(b" \n\n")
    refused(read, tmp_path / name, "holds no text")


@READERS
@pytest.mark.parametrize("source", ["wikitext2", "c4"])
def test_data_sets_without_a_network_say_what_to_give(
    read: Any, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # whatever this machine may have stored
    monkeypatch.setattr(datasets.config, "HF_HUB_CACHE", str(tmp_path), raising=False)
    refused(
        read,
        source,
        rf"{source} cannot be had from the hub .*give a local file.*--calibration FILE or --text FILE.*\.txt",
    )


@pytest.mark.parametrize(
    ("read", "source", "split", "name", "file"),
    [
        (calibration_documents, "wikitext2", "train", "wikitext-2-raw-v1", None),
        (evaluation_rows, "wikitext2", "test", "wikitext-2-raw-v1", None),
        (calibration_documents, "c4", "train", None, "en/c4-train.00000-of-01024.json.gz"),
        (evaluation_rows, "c4", "validation", None, "en/c4-validation.00000-of-00008.json.gz"),
    ],
)
def test_the_splits_and_joining_that_the_field_uses(
    read: Any, source: str, split: str, name: str | None, file: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(repository: str, **arguments: Any) -> dict[str, list[str]]:
        asked.append((repository, arguments))
        return {"text": [f"row {i}" if i % 5 else "" for i in range(3000)]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read(source)
    ((repository, arguments),) = asked
    assert repository == {"wikitext2": "Salesforce/wikitext", "c4": "allenai/c4"}[source]
    assert arguments["split"] == split
    assert arguments.get("name") == name
    assert arguments.get("data_files") == (None if file is None else {split: file})
    loaded = [f"row {i}" if i % 5 else "" for i in range(3000)]
    expected = {
        ("wikitext2", "test"): loaded,
        ("wikitext2", "train"): ["\n\n".join(loaded)],
        ("c4", "validation"): [" ".join(loaded[:1100])],
        ("c4", "train"): [row for row in loaded if row],
    }
    assert rows == expected[source, split]


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = parquet(tmp_path / "a.parquet", {"text": ["x"]})
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(evaluation_rows, "wikitext2", r"needs the package datasets: pip install 'thanos-llm\[data\]'")
    refused(evaluation_rows, path, r"need the package pyarrow: pip install 'thanos-llm\[data\]'")


# --- documentation ----------------------------------------------------------------------------------------------------


def test_pydoc_calibration_and_evaluation_are_disjoint() -> None:
    from pydoc_data.topics import topics

    calibration, evaluation = calibration_documents("pydoc"), evaluation_rows("pydoc")
    assert not set(calibration) & set(evaluation), "no identical text in both"
    assert set(calibration) | set(evaluation) == set(topics.values()), "nothing left out"
    assert len(calibration) == len(set(calibration))
    assert len(evaluation) == len(set(evaluation))
    assert len(evaluation) == pytest.approx(len(calibration) / 2, abs=1)
    assert sum(map(len, evaluation)) > 100_000, "enough to score"


def test_pydoc_is_the_same_every_time() -> None:
    assert calibration_documents("pydoc") == calibration_documents("pydoc")
    assert evaluation_rows("pydoc") == evaluation_rows("pydoc")


def test_pydoc_topics_with_several_names_stay_on_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library files one text under several names; each text must be in one half only."""
    import pydoc_data.topics

    texts = {f"t{i:02d}": f"text {i // 2}" for i in range(40)}  # neighbours are equal
    texts |= {f"z{i:02d}": f"text {i}" for i in range(20)}  # and so are distant ones
    monkeypatch.setattr(pydoc_data.topics, "topics", dict(reversed(texts.items())))
    calibration, evaluation = calibration_documents("pydoc"), evaluation_rows("pydoc")
    assert evaluation == [f"text {i}" for i in range(0, 20, 3)]
    assert calibration == [f"text {i}" for i in range(20) if i % 3]
