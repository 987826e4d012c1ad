"""Sources of text: every kind of file, every broken file, and the two halves of the documentation."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny_tokenizer
from thanos.calibration.text import NAMED, calibration_documents, check_text_source, evaluation_rows, text_sha256
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


@pytest.mark.parametrize("suffix", [".json", ".JSON", ".json.gz", ".Json.GZ"])
@pytest.mark.parametrize("form", ["lines", "list", "indented list"])
def test_json_is_a_list_of_rows_or_a_row_a_line(tmp_path: Path, suffix: str, form: str) -> None:
    rows = [{"id": i, "text": text} for i, text in enumerate(ROWS)]
    texts = {
        "lines": "\n" + "".join(json.dumps(row) + "\n" for row in rows),
        "list": json.dumps(rows),
        "indented list": json.dumps(rows, indent=2),
    }
    data = texts[form].encode()
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.lower().endswith(".gz") else data)
    assert evaluation_rows(str(path)) == ROWS
    assert calibration_documents(str(path)) == DOCUMENTS


def test_json_of_one_row_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": "alone"}, indent=1), encoding="utf-8-sig")
    assert evaluation_rows(str(path)) == ["alone"]


@pytest.mark.parametrize("suffix", [".TXT", ".Jsonl", ".JSONL.gz", ".PARQUET"])
def test_endings_in_capitals(tmp_path: Path, suffix: str) -> None:
    if suffix == ".TXT":
        path = tmp_path / "a.TXT"
        path.write_text("words")
        assert evaluation_rows(str(path)) == ["words"]
        return
    made = rows_file(tmp_path, suffix.lower(), ROWS)
    assert evaluation_rows(str(made.rename(tmp_path / f"B{suffix}"))) == ROWS


# --- halves of surrogate pairs ----------------------------------------------------------------------------------------


@READERS
def test_half_a_surrogate_pair_is_replaced_and_told(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83d b"}\n{"text": "whole \\ud83d\\ude00"}\n{"text": "\\ude00\\ud83d"}\n')
    notes: list[str] = []
    rows = read(str(path), on_note=notes.append)
    assert rows == ["a\ufffd b", "whole 😀", "\ufffd\ufffd"]
    "".join(rows).encode()  # as every tokenizer does
    (note,) = notes
    assert note == f"{path} holds 3 halves of surrogate pairs; a half is not a character, so U+FFFD replaces it"
    path.write_text(json.dumps({"text": "a\ud83d"}) + "\n")
    assert read(str(path), on_note=notes.append) == ["a\ufffd"]
    assert notes[1].startswith(f"{path} holds 1 half of a surrogate pair; a half is not")


# --- several files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files with text, one without, a hidden one, and one in a folder."""
    made = tmp_path / "many"
    (made / "deeper").mkdir(parents=True)
    for name, rows in (("b.jsonl", ["b0", "b1"]), (".hidden.jsonl", ["no"]), ("deeper/d.jsonl", ["d"])):
        (made / name).write_text(json_lines(rows))
    (made / "a.txt").write_text("the first")
    (made / "c.JSONL").write_text(json_lines(["c"]))
    (made / "notes.md").write_text("no")
    return made


@READERS
def test_folders_patterns_and_lists(read: Any, folder: Path) -> None:
    assert read(str(folder)) == read(f"{folder}/") == ["the first", "b0", "b1", "c"]
    assert read(f"{folder}/*.jsonl") == ["b0", "b1"]
    assert read(f"{folder}/**/[b-d].jsonl") == ["b0", "b1", "d"]
    assert read(f"{folder}/c.JSONL, {folder}/a.txt") == ["c", "the first"], "in the order of the list"
    assert read(f"{folder}/*.txt,{folder}/deeper/") == ["the first", "d"]


@READERS
def test_a_name_that_looks_like_a_list_or_pattern_is_a_file_if_there_is_one(read: Any, tmp_path: Path) -> None:
    for name in ("a,b.txt", "a[1].txt", "a:b.txt"):
        (tmp_path / name).write_text(name)
        assert read(str(tmp_path / name)) == [name]


@READERS
def test_folders_and_patterns_without_text_files(read: Any, tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(read, empty, rf"text folder {re.escape(str(empty))} holds no file ending in \.txt.*\*\*/\*\.jsonl")
    refused(read, f"{folder}/*.md", r"\*\.md' matches no file ending in \.txt")
    refused(read, f"{folder}/a.txt,{folder}/none.txt", "none.txt does not exist")
    refused(read, f"{folder}/a.txt,pydoc", "is unknown")


# --- columns ----------------------------------------------------------------------------------------------------------


@READERS
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_column_by_name(read: Any, tmp_path: Path, suffix: str) -> None:
    columns = {"id": [1, 2], "text": ["t1", "t2"], "body": ["b1", "b2"]}
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet(path, columns)
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("\n".join(map(json.dumps, rows)))
    notes: list[str] = []
    assert read(str(path), on_note=notes.append) == ["t1", "t2"]
    assert read(f"{path}:body", on_note=notes.append) == ["b1", "b2"]
    assert read(f"{path}:body,{path}", on_note=notes.append) == ["b1", "b2", "t1", "t2"]
    assert read(f"{tmp_path}/*:body", on_note=notes.append) == ["b1", "b2"]
    assert notes == []


@READERS
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_only_column_of_strings_is_taken_and_told(read: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet(path, {"id": [1, 2], "content": ["x", "y"]})
    else:
        path.write_text('{"id": 1, "content": "x"}\n{"id": 2, "content": "y", "more": "z"}\n')
    notes: list[str] = []
    assert read(str(path), on_note=notes.append) == ["x", "y"]
    assert notes == [f"{path} has no column 'text'; 'content' is read, the only one that holds strings"]


@READERS
def test_a_column_must_be_named_where_several_hold_strings(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "x", "content": "y"}\n')
    refused(read, path, "line 1: no string under 'text'; there are 'title', 'content'; name one with FILE:COLUMN")
    refused(read, f"{path}:body", "line 1: no string under 'body'; there are 'title', 'content'")
    assert read(f"{path}:title") == ["x"]
    (tmp_path / "a.txt").write_text("words")
    refused(read, f"{tmp_path / 'a.txt'}:title", "has no columns")


# --- rows whose text is null ------------------------------------------------------------------------------------------


def with_nulls(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        return parquet(path, {name: [row[name] for row in rows] for name in rows[0]})
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@READERS
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_rows_whose_text_is_null_are_left_out_and_counted(read: Any, tmp_path: Path, name: str) -> None:
    rows = [{"text": None, "id": "0"}, {"text": "a", "id": "1"}, {"text": None, "id": "2"}, {"text": "b", "id": "3"}]
    path, notes = with_nulls(tmp_path / name, rows), []
    assert read(str(path), on_note=notes.append) == ["a", "b"]
    assert notes == [f"{path} has 2 rows whose text is null, left out"]
    check_text_source(str(path))


@READERS
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_null_under_the_column_that_is_named_or_the_only_one(read: Any, tmp_path: Path, name: str) -> None:
    path = with_nulls(tmp_path / name, [{"id": 1, "body": None}, {"id": 2, "body": "x"}])
    for source in (str(path), f"{path}:body"):
        notes: list[str] = []
        assert read(source, on_note=notes.append) == ["x"]
        assert notes[-1] == f"{path} has 1 row whose text is null, left out"


@READERS
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_chat_that_is_null(read: Any, tmp_path: Path, name: str) -> None:
    path = with_nulls(tmp_path / name, [{"id": "x", "messages": None}, {"id": "y", "messages": CHATS[0]}])
    assert read(str(path), talkative(begins=True)) == ["[user] ban [assistant] bar "]


@READERS
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_rows_whose_texts_are_all_null_are_no_text(read: Any, tmp_path: Path, name: str) -> None:
    import pyarrow

    rows = [{"text": None}] * 3
    if name == "a.parquet":
        path = parquet(tmp_path / name, {"text": pyarrow.array([None] * 3, pyarrow.string())})
    else:
        path = with_nulls(tmp_path / name, rows)
    says = "holds no text (rows that are empty or null do not count)"
    refused(read, path, re.escape(f"{path} {says}"))
    with pytest.raises(DataError, match=re.escape(says)):
        check_text_source(str(path))


# --- chats ------------------------------------------------------------------------------------------------------------

CHATS = [
    [{"role": "user", "content": "ban"}, {"role": "assistant", "content": "bar"}],
    [{"role": "user", "content": "den\ud83d"}],
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"


def talkative(*, begins: bool, template: str | None = TEMPLATE) -> Any:
    """A tokenizer with a chat template that writes BOS."""
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer(begins=begins))
    tokenizer.chat_template = template
    return tokenizer


@READERS
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_chats_become_text_by_the_tokenizers_template(read: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet(path, {"messages": CHATS[:1], "source": ["web"]})
        expected = ["[user] ban [assistant] bar "]
    else:
        rows = [{"messages": chat, "source": "web"} for chat in CHATS]
        path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
        expected = ["[user] ban [assistant] bar ", "[user] den\ufffd "]
    assert read(str(path), talkative(begins=True)) == expected, "the tokenizer adds BOS in any case"
    assert read(str(path), talkative(begins=False)) == [f"<s>{text}" for text in expected]
    assert read(f"{path}:messages", talkative(begins=True)) == expected
    refused(lambda source: read(source, talkative(begins=True, template=None)), path, "tokenizer has no chat template")
    refusing = "{{ raise_exception('roles must alternate') }}"
    refused(
        lambda source: read(source, talkative(begins=True, template=refusing)),
        path,
        r"refuses \(roles must alternate\)",
    )


PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"


@READERS
@pytest.mark.parametrize("column", ["conversations", "messages"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_sharegpt_is_read_as_roles_and_contents(read: Any, tmp_path: Path, suffix: str, column: str) -> None:
    chats = [
        [{"from": "system", "value": "a"}, {"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}],
        [{"from": "user", "value": "d"}, {"from": "observation", "value": "e"}, {"from": "assistant", "value": ""}],
    ]
    path = with_nulls(tmp_path / f"a{suffix}", [{"id": str(n), column: chat} for n, chat in enumerate(chats)])
    expected = ["[system] a [user] b [assistant] c ", "[user] d [tool] e [assistant]  "]
    for source in (str(path), f"{path}:{column}"):
        assert read(source, talkative(begins=False, template=PLAIN)) == expected


def test_a_chat_keeps_what_a_template_may_read(tmp_path: Path) -> None:
    said = "{{ m.tool_calls[0].name if m.tool_calls else m.content }}"
    template = f"{{% for m in messages %}}{{{{ m.role }}}} {said} {{{{ m.weight }}}} {{% endfor %}}"
    row = [
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "weight": 1},
        {"role": "user", "content": [{"type": "text", "text": "x"}], "weight": 2},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": row}))
    found = calibration_documents(str(tmp_path / "a.jsonl"), talkative(begins=False, template=template))
    assert found == ["assistant f 1 user [{'type': 'text', 'text': 'x'}] 2 "]


@READERS
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            {"speaker": "x", "text": "y"},
            "message 2 holds 'speaker', 'text'; a message has role and content, or from and",
        ),
        ({"role": "user", "text": "y"}, "message 2 holds 'role', 'text'; a message has"),
        ({"role": "user", "content": None}, "message 2 holds 'role'; a message has"),
        ({"content": "y"}, "message 2 holds 'content'; a message has"),
        ({"from": "human"}, "message 2 holds 'from'; a message has"),
        ({"from": "narrator", "value": "y"}, "message 2 is from 'narrator'; choose one of human, user, gpt"),
    ],
)
def test_no_message_becomes_an_empty_turn(
    read: Any, tmp_path: Path, suffix: str, message: dict[str, Any], said: str
) -> None:
    path = with_nulls(tmp_path / f"a{suffix}", [{"messages": [{"role": "user", "content": "x"}, message]}])
    place = "line" if suffix == ".jsonl" else "row"
    refused(lambda source: read(source, talkative(begins=False)), path, f"^{re.escape(str(path))}, {place} 1, {said}")
    with pytest.raises(DataError, match=said):
        check_text_source(str(path))


@READERS
def test_messages_that_are_none(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": ["hello"]}\n')
    refused(read, path, "line 1, message 1 is not an object; a chat is a list of messages with role and content")
    path.write_text('{"text": ["hello"]}\n')
    refused(read, path, "line 1: no string under 'text'; it is a list; remove such rows, or name")
    path.write_text(json.dumps({"messages": CHATS[0]}))
    refused(
        lambda source: read(source, talkative(begins=True, template=" ")), path, "template writes nothing; check its"
    )


@READERS
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_chat_without_messages_is_an_empty_row(read: Any, tmp_path: Path, suffix: str) -> None:
    path = with_nulls(tmp_path / f"a{suffix}", [{"messages": []}, {"messages": CHATS[0]}])
    assert [row for row in read(str(path), talkative(begins=False, template=PLAIN)) if row] == [
        "[user] ban [assistant] bar "
    ]
    with_nulls(path, [{"messages": []}])
    refused(read, path, re.escape(f"{path} holds no text (rows that are empty or null do not count)"))
    with pytest.raises(DataError, match="holds no text"):
        check_text_source(str(path))


# --- a glance before anything is loaded -------------------------------------------------------------------------------


def glance(source: str) -> None:
    check_text_source(source, evaluation=True)


def test_a_glance_finds_what_reading_would_refuse(tmp_path: Path, folder: Path) -> None:
    for source in ("pydoc", "self", "wikitext2", "c4", str(folder), f"{folder}/*.jsonl"):
        check_text_source(source)
    (tmp_path / "blank.jsonl").write_text(json_lines(["", " "]))
    (tmp_path / "other.jsonl").write_text('{"a": "x", "b": "y"}\n')
    (tmp_path / "empty.json.gz").write_bytes(gzip.compress(b""))
    refused(glance, "self", "'self' is for calibration")
    refused(glance, "WIKITEXT2", "is unknown")
    refused(glance, tmp_path / "none.jsonl", "does not exist")
    refused(glance, tmp_path / "blank.jsonl", "holds no text")
    refused(glance, tmp_path / "empty.json.gz", "holds no text")
    refused(glance, tmp_path / "other.jsonl", "no string under 'text'")


def test_a_glance_reads_the_first_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json_lines(["", "enough"]) + "not JSON\n")
    check_text_source(str(path))
    refused(calibration_documents, path, "line 3: not valid JSON")


def test_a_glance_asks_for_the_tokenizer_where_there_are_chats(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHATS[0]}))
    check_text_source(str(path))
    check_text_source(str(path), tokenizer=lambda: talkative(begins=True))
    check_text_source(str(folder), tokenizer=lambda: pytest.fail("no chat, no tokenizer"))
    with pytest.raises(DataError, match="no chat template"):
        check_text_source(str(path), tokenizer=lambda: talkative(begins=True, template=None))


# --- bad files --------------------------------------------------------------------------------------------------------


def refused(read: Any, source: Path | str, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        read(str(source))
    assert "\n" not in str(caught.value), "one line"


@READERS
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("wikitext-2", "wikitext2"),
        ("wiki", "wikitext2"),
        ("Salesforce/wikitext", "wikitext2"),
        ("pydocs", "pydoc"),
        ("goood.jsonl", "good.jsonl"),
        ("goood.jsonl:body", "good.jsonl"),
        ("good.jsonl,goood.jsonl", "good.jsonl"),
        ("txts", "texts"),
    ],
)
def test_what_was_meant_by_a_source_that_is_not_there(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for other in ("good.jsonl", "goood.png", ".goood.txt"):
        (tmp_path / other).write_text(json_lines(["a"]))
    refused(read, name, re.escape(f"(did you mean {meant}?)"))


@READERS
def test_an_ending_alone_resembles_no_other_file(read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for other in ("news.jsonl", "abc.jsonl.gz", "prose.txt"):
        (tmp_path / other).write_text(json_lines(["a"]))
    for name in ("nope.jsonl", "x.jsonl.gz", "a.txt"):
        refused(read, name, f"text file {re.escape(name)} does not exist$")
    refused(read, "newz.jsonl", re.escape("(did you mean news.jsonl?)"))
    refused(read, "prose.tx", re.escape("(did you mean prose.txt?)"))


@READERS
@pytest.mark.parametrize(
    "name", ["wikitext", "WIKITEXT2", "text.csv", "a.xml", "a.txt.gz", "", "some words", "a.parquet.gz"]
)
def test_unknown_sources(read: Any, name: str) -> None:
    refused(read, name, f"text source {re.escape(repr(name))} is unknown; choose wikitext2, c4, pydoc.*jsonl.gz")


@READERS
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".TXT"])
def test_missing_files(read: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"none{suffix}"
    refused(read, path, f"{re.escape(str(path))} does not exist")
    path.mkdir()
    refused(read, path, re.escape(str(path)))


def test_self_is_no_text_to_evaluate_on() -> None:
    refused(evaluation_rows, "self", "'self' is for calibration")


BAD = {
    "latin-1 text": ("a.txt", b"caf\xe9", "not UTF-8: .* at byte 3; save it as UTF-8"),
    "latin-1 json": ("a.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8"),
    "not json": ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"line 2: not valid JSON \(Expecting value at column 9\)"),
    "text in a jsonl": ("a.jsonl", b"just words\n", "line 1: not valid JSON"),
    "no column": (
        "a.jsonl",
        b'{"text": "ok"}\n\n{"content": "x", "id": 3}\n',
        "line 3: no string under 'text'.*'content', 'id'",
    ),
    "a list": ("a.jsonl", b'["text"]\n', "line 1: no string under 'text'; it is a list, not an object such as"),
    "a number": ("a.jsonl", b'{"text": 3}\n', "line 1: no string under 'text'"),
    "a list of nulls": (
        "a.jsonl",
        b'{"text": "ok"}\n{"text": [null]}\n',
        "line 2: no string under 'text'; it is a list; remove",
    ),
    "null in place of a row": ("a.jsonl", b'{"text": "ok"}\nnull\n', "line 2: .*; it is null, not an object such as"),
    "no rows": ("a.json", b'{"data": [1]}', "line 1: no string under 'text'; there are 'data'"),
    "a list of lists": ("a.json", b'[["text"]]', "row 1: no string under 'text'; it is a list, not"),
    "a cut list": (
        "a.json",
        b'[{"text": "ok"}, {"te',
        r"\(Unterm.* at line 1, column 19\); it holds a list of rows, or one",
    ),
    "json with a bad line": ("a.json", b'{"text": "ok"}\n{"te\n', "line 2: not valid JSON"),
    "json that is not gzip": ("a.json.gz", b'{"text": "ok"}\n', "cannot be read"),
    "binary text": ("a.txt", b"ab\0\0\1c" * 9, "is not text: it holds a NUL"),
    "binary json": ("a.json", bytes(range(256)), "not UTF-8"),
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
    path = parquet(tmp_path / "a.parquet", {"content": ["x"], "title": ["y"], "id": [1]})
    refused(read, path, f"{re.escape(str(path))} has no column 'text'; there are content, title, id")
    refused(read, f"{path}:body", f"{re.escape(str(path))} has no column 'body'; there are content, title, id")


@READERS
@pytest.mark.parametrize("values", [[1, 2], [["a"], ["b"]], [b"bytes"]])
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
        rf"{source} cannot be downloaded from the hub .*give pydoc, or a local file.*--calibration FILE or --text FILE.*\.txt",
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
    refused(evaluation_rows, "wikitext2", r"needs the package datasets: pip install 'datasets>=4'")
    refused(evaluation_rows, path, r"need the package pyarrow: pip install 'datasets>=4'")


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


@pytest.mark.parametrize("name", NAMED)
def test_a_folder_with_the_name_of_a_data_set_has_no_part_in_its_hash(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.txt").write_text("not the text that is read")
    monkeypatch.chdir(tmp_path)
    assert text_sha256(name) is None
    assert text_sha256(f"{name}/a.txt") == hashlib.sha256(b"not the text that is read").hexdigest()
