"""A comparison of models: its numbers against the models themselves, and what a failure leaves alone."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import thanos
from gguf_models import write_gguf
from helpers import prose, save_tiny
from sparse_matrices import save_pruned
from thanos.cli import run
from thanos.comparison.document import NAME, Comparison, Row, groups_of, read_comparisons
from thanos.comparison.entries import Entry, entries_of, labels_of
from thanos.comparison.measure import Facts, disk_bytes, kind_of
from thanos.comparison.prompts import NEW_TOKENS, PROMPTS, read_prompts
from thanos.comparison.report import PAGE, build_report, front_of, write_report
from thanos.comparison.run import Request, _Run, compare
from thanos.errors import DataError, ModelError, ResourceError
from thanos.export.pack import pack
from thanos.model.source import ModelSource, resolve_model
from thanos.sparse import loader
from thanos.study.config import read_study
from thanos.study.run import find_locations
from thanos.study.session import Session

ASKED = Request(sequence_length=64, max_windows=4, context=9, new_tokens=3, device="cpu", prompts=PROMPTS[:2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models ``dense``, ``pruned``, ``packed`` and ``narrow``, a text, and a model whose weights do not fit its config."""
    found = tmp_path_factory.mktemp("compare")
    save_tiny(found / "dense", dtype=torch.bfloat16)
    save_pruned(found / "pruned")
    pack(found / "pruned", found / "packed", least_weights=1)
    save_tiny(found / "narrow", dtype=torch.bfloat16, intermediate_size=32)
    shutil.copytree(found / "dense", found / "damaged")
    config = json.loads((found / "damaged" / "config.json").read_text())
    (found / "damaged" / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    (found / "prose.txt").write_text(prose(6000, seed=1), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def measured(folder: Path) -> Comparison:
    """All five models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(loader.UNPACK, "never")
        names = [str(folder / name) for name in ("dense", "pruned", "packed", "narrow", "damaged")]
        request = dataclasses.replace(ASKED, text=str(folder / "prose.txt"))
        return compare(names, request, command="thanos compare dense pruned packed narrow damaged")


def row(found: Comparison, label: str) -> Row:
    return next(one for one in found.rows if one.label == label)


def test_quality_is_what_evaluate_gives(folder: Path, measured: Comparison) -> None:
    text = str(folder / "prose.txt")
    for name in ("pruned", "narrow"):
        own = row(measured, name).evaluation
        found = thanos.evaluate(
            folder / name, text=text, sequence_length=64, max_windows=4, dense=folder / "dense", device="cpu"
        )
        assert own is not None
        assert own == {key: getattr(found, key) for key in own}
        assert measured.settings["text_sha256"] == found.text_sha256
    first = row(measured, "dense").evaluation
    assert first is not None
    assert first["perplexity"] == found.dense_perplexity
    assert (first["kl_divergence"], first["top1_agreement"]) == (pytest.approx(0, abs=1e-6), 1)


def test_a_study_measures_the_same_numbers(folder: Path, measured: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(
        'models = ["dense"]\ndtype = "bfloat16"\n[evaluation]\ntext = "prose.txt"\nsequence_length = 64\nmax_windows = 4\n'
        '[[grid]]\npattern = "2:4"\ncalibration = "prose.txt"\nsamples = 2\nsequence_length = 32\n'
    )
    study = read_study(path)
    study = dataclasses.replace(study, keep_models=True)
    (tmp_path / "out" / "cache").mkdir(parents=True)
    worker = Session(study, find_locations(study, tmp_path / "out", folder), "cpu")
    dense, pruned = (worker.run(cell, lambda event: None) for cell in study.cells)
    (model,) = (tmp_path / "out" / "models").iterdir()
    found = compare([str(folder / "dense"), str(model)], dataclasses.replace(ASKED, text=str(folder / "prose.txt")))
    for record, own in zip((dense, pruned), found.rows, strict=True):
        assert record.evaluation is not None
        assert own.evaluation is not None
        assert {key: record.evaluation[key] for key in own.evaluation} == own.evaluation


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"inner": 70}, "shrunk"),
        ({"inner": 70, "blocks": 3}, "shrunk"),
        ({"inner": 70, "blocks": 3, "parameters": 120}, "dense"),  # another embedding: another model
        ({"inner": 70, "blocks": 5}, "dense"),
        ({}, "dense"),
        ({"zeros": 0.5}, "sparse"),
        ({"packed": True}, "packed"),
    ],
)
def test_the_kind_of_a_model_beside_the_first(changes: dict[str, Any], kind: str) -> None:
    base = Facts(parameters=100, inner=80, blocks=4, zeros=0.0, packed=False)
    facts = dataclasses.replace(base, **changes)
    if "inner" in changes and "parameters" not in changes:
        facts = dataclasses.replace(facts, parameters=20 + facts.inner)
    assert kind_of(facts, base) == kind


def test_bytes_texts_and_kinds_are_those_of_the_models(folder: Path, measured: Comparison) -> None:
    assert [one.kind for one in measured.rows] == ["dense", "sparse", "packed", "shrunk", "dense"]
    for name in ("dense", "pruned", "packed", "narrow"):
        assert row(measured, name).disk_bytes == (folder / name / "model.safetensors").stat().st_size
    model = AutoModelForCausalLM.from_pretrained(folder / "narrow", dtype=torch.bfloat16)
    own = row(measured, "narrow")
    assert own.weight_bytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert own.parameters == model.num_parameters()
    assert row(measured, "packed").parameters == row(measured, "pruned").parameters
    assert row(measured, "packed").packed_layers == 21
    tokenizer = AutoTokenizer.from_pretrained(folder / "narrow")
    for prompt in PROMPTS[:2]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
        written = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert own.texts[prompt] == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_failure_has_its_reason_and_leaves_the_others_alone(measured: Comparison) -> None:
    assert [one.label for one in measured.failed] == ["damaged"]
    assert "other shapes than config.json" in measured.failed[0].reason
    assert all(one.tokens_per_second and one.first_token_seconds for one in measured.rows[:4])


def test_another_tokenizer_has_speed_and_no_perplexity(folder: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", dtype=torch.bfloat16, begins=False)
    request = dataclasses.replace(ASKED, text=str(folder / "prose.txt"))
    found = compare([str(folder / "dense"), str(other)], request).rows[1]
    assert "tokenizer" in found.reason
    assert (found.evaluation, found.tokens_per_second is None) == (None, False)


def test_an_error_of_any_library_leaves_the_others_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(network: object, source: ModelSource, request: Request) -> None:
        if source.name.endswith("pruned"):
            raise AssertionError("a kernel refuses\nthis shape")

    monkeypatch.setattr("thanos.comparison.run.speed", broken)
    request = dataclasses.replace(ASKED, text=str(folder / "prose.txt"))
    seen: list[list[str]] = []
    found = compare(
        [str(folder / name) for name in ("dense", "pruned", "narrow")],
        request,
        on_row=lambda one: seen.append([row.label for row in one.rows]),
    )
    assert [row.reason for row in found.rows] == ["", "AssertionError: a kernel refuses", ""]
    assert all(row.evaluation and row.texts for row in found.rows)
    assert seen == [["dense"], ["dense", "pruned"], ["dense", "pruned", "narrow"]]


def test_a_fault_of_the_device_ends_the_run_with_the_numbers_so_far(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal access every call to CUDA fails, for all models that would follow."""

    def fault(*arguments: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore lines")

    seen: list[list[str]] = []
    free = _Run._free

    def free_or_fail(self: _Run) -> None:
        if seen:  # after the second model
            fault()
        free(self)

    monkeypatch.setattr(_Run, "_free", free_or_fail)
    names = [str(folder / name) for name in ("dense", "pruned", "narrow")]
    request = dataclasses.replace(ASKED, text=str(folder / "prose.txt"))
    wanted = r"^pruned: the device reported a fault, .*\(CUDA error: an illegal memory access was encountered\); 1 of 3 models"
    with pytest.raises(ResourceError, match=wanted):
        compare(names, request, on_row=lambda one: seen.append([row.label for row in one.rows]))
    assert seen == [["dense"], ["dense", "pruned"]]
    seen.clear()
    assert [one.label for one in compare(names[:2], request, on_row=lambda one: seen.append([])).rows] == [
        "dense",
        "pruned",
    ]


def test_an_interrupted_run_leaves_the_numbers_so_far(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the extra report is not installed")

    def interrupted(network: object, source: ModelSource, request: Request) -> None:
        if source.name.endswith("narrow"):
            now = time.perf_counter() + 3600
            monkeypatch.setattr("time.perf_counter", lambda: now)
            raise KeyboardInterrupt

    monkeypatch.setattr("thanos.comparison.run.speed", interrupted)
    words = ["compare", *(str(folder / name) for name in ("dense", "pruned", "narrow")), "--text"]
    words += [str(folder / "prose.txt"), "--sequence-length", "64", "--max-windows", "1", "--device", "cpu", "--quiet"]
    assert run([*words, "--out", str(tmp_path / "c")]) == 130
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(
        rf"\[1:00:\d\d\] note: {tmp_path / 'c'} has the measurements of the first 2 models; measure the first", said
    )
    (left,) = read_comparisons([tmp_path / "c"])
    assert [row.label for row in left.rows] == ["dense", "pruned"]
    assert all(row.evaluation for row in left.rows)


def test_the_bytes_of_a_file_in_several_parts_are_those_of_all(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source = resolve_model(write_gguf(tmp_path / "m.gguf", "llama", parts=3))
    assert disk_bytes(source) == sum(part.stat().st_size for part in tmp_path.glob("m-*.gguf"))


def test_another_dtype_than_the_first_models_is_said(folder: Path, tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", dtype=torch.float32)
    request = dataclasses.replace(ASKED, text=str(folder / "prose.txt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(loader.UNPACK, "never")
        found = compare([str(plain), str(folder / "dense"), str(folder / "packed")], request)
    assert [row.dtype for row in found.rows] == ["float32", "float32", "bfloat16"]
    assert [("runs in bfloat16" in note) for row in found.rows for note in row.notes] == [True]
    (summary,) = [one for one in build_report([found]).tables if one.name == "comparison"]
    assert ", in float32" in "".join(str(part) for part in summary.note)


def test_the_first_model_must_load(folder: Path) -> None:
    with pytest.raises(ModelError, match="other shapes"):
        compare(
            [str(folder / "damaged"), str(folder / "dense")], dataclasses.replace(ASKED, text=str(folder / "prose.txt"))
        )


# --- names ------------------------------------------------------------------------------------------------------------


def test_quantised_versions_follow_their_model() -> None:
    assert entries_of(["a", "b"], "int8, b=int4,int4") == [
        Entry("a"), Entry("a", "int8"), Entry("a", "int4"), Entry("b"), Entry("b", "int4")
    ]  # fmt: skip
    with pytest.raises(DataError, match="int9"):
        entries_of(["a"], "int9")
    with pytest.raises(DataError, match="not among the models"):
        entries_of(["a"], "b=int8")
    with pytest.raises(DataError, match="named twice"):
        entries_of(["a", "a"])


def test_a_folder_is_the_same_with_and_without_a_slash() -> None:
    assert entries_of(["a", "b/"], "b=int8") == [Entry("a"), Entry("b/"), Entry("b/", "int8")]
    with pytest.raises(DataError, match="a/ is named twice"):
        entries_of(["a", "a/"])


def test_a_folder_is_the_same_by_a_link_and_by_another_path(tmp_path: Path) -> None:
    model, link = tmp_path / "model", tmp_path / "link"
    model.mkdir()
    link.symlink_to(model)
    for other, what in ((str(link), f"is the same model as {model}"), (f"{link}/../model", "is named twice")):
        with pytest.raises(DataError, match=f"^{other} {what}; name each model once$"):
            entries_of([str(model), other])
        assert entries_of([str(model), "b"], f"{other}=int8") == [
            Entry(str(model)),
            Entry(str(model), "int8"),
            Entry("b"),
        ]


def test_a_model_that_does_not_exist_is_an_error_before_the_first_one_is_measured(folder: Path) -> None:
    request = dataclasses.replace(ASKED, text=str(folder / "prose.txt"))
    rows: list[Comparison] = []
    with pytest.raises(ModelError, match="'pruned=int8' is not a hub name"):
        compare([str(folder / "dense"), "pruned=int8"], request, on_row=rows.append)
    assert not rows


def test_the_rate_of_the_evaluation_counts_no_time_of_the_texts(folder: Path) -> None:
    """Texts and speed have a phase of their own, before that of the scored windows."""
    request = dataclasses.replace(ASKED, text=str(folder / "prose.txt"))
    events: list[Any] = []
    compare([str(folder / "dense"), str(folder / "pruned")], request, on_event=events.append)
    phases = [event.phase for event in events if event.kind == "phase"]
    assert [phase for phase in phases if phase != "calibration"] == ["load", "generate", "evaluate"] * 2


def test_a_timed_text_beyond_the_positions_is_refused_before_the_measurements(folder: Path) -> None:
    request = dataclasses.replace(ASKED, text=str(folder / "prose.txt"), context=200)
    rows: list[Comparison] = []
    with pytest.raises(DataError, match="dense has 256 positions; lower --context"):
        compare([str(folder / "dense")], dataclasses.replace(request, new_tokens=60), on_row=rows.append)
    assert not rows


def test_labels_name_no_folder_unless_two_models_have_the_same_name() -> None:
    assert labels_of(entries_of(["/x/a", "/y/b"], "int8")) == ["a", "a int8", "b"]
    assert labels_of(entries_of(["/x/a", "/y/a", "/y/b"])) == ["/x/a", "/y/a", "b"]


def test_a_perplexity_beyond_all_numbers_is_explained(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "loud")
    AutoTokenizer.from_pretrained(folder / "dense").save_pretrained(tmp_path / "loud")
    request = dataclasses.replace(ASKED, text=str(folder / "prose.txt"))
    _, loud = compare([str(folder / "dense"), str(tmp_path / "loud")], request).rows
    assert loud.evaluation is not None
    assert loud.evaluation["perplexity"] is None
    assert [note for note in loud.notes if "is too large for a number" in note]
    assert not loud.reason


def test_prompts_are_divided_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Two\nlines\n\n\n  one more\n")
    assert read_prompts(path) == ("Two\nlines", "  one more")
    path.write_text("one", encoding="utf-8-sig")  # as some editors save it
    assert read_prompts(path) == ("one",)
    path.write_text("\n \n")
    with pytest.raises(DataError, match="no prompt"):
        read_prompts(path)


# --- page ------------------------------------------------------------------------------------------------------------------


def plain(label: str, size: float, perplexity: float) -> Row:
    return Row(label=label, weight_bytes=int(size), evaluation={"perplexity": perplexity})


def test_the_front_is_that_of_a_brute_force_search() -> None:
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randint(1, 8, (40, 2), generator=draw).tolist()
    rows = [plain(str(place), *pair) for place, pair in enumerate(numbers)]
    worse = [
        any(a <= x and b <= y and (a, b) != (x, y) for a, b in numbers) for x, y in numbers
    ]  # fmt: skip
    assert front_of(rows, "weight_bytes") == [one for one, beaten in zip(rows, worse, strict=True) if not beaten]


def test_the_page_is_drawn_again_from_its_document(measured: Comparison, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    write_report([measured], tmp_path / "first")
    write_report(read_comparisons([tmp_path / "first"]), tmp_path / "second")
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file()]
    assert len(files) > 8
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    page = (tmp_path / "first" / PAGE).read_text()
    assert "other shapes than config.json" in page
    assert all(one.label in page for one in measured.rows)
    assert "NaN" not in page


def test_runs_share_a_table_if_their_settings_and_first_model_agree(measured: Comparison) -> None:
    again = dataclasses.replace(measured, rows=[measured.rows[0], dataclasses.replace(measured.rows[1], label="other")])
    assert len(groups_of([measured, again])) == 1
    report = build_report([measured, again])
    shown = [line[0].shown for line in report.tables[0].rows]
    assert shown == ["dense", "pruned", "packed", "narrow", "damaged", "other"]
    assert "lower perplexity than" in "".join(map(str, report.lead))
    longer = dataclasses.replace(measured, settings={**measured.settings, "context": 99})
    apart = build_report([measured, longer])
    assert "".join(map(str, apart.lead)).startswith("2 groups of models")
    assert all("lower perplexity than" in "".join(map(str, one.sections[0].prose[0])) for one in apart.chapters)
    assert len(groups_of([measured, longer])) == 2
    assert len({table.name for table in build_report([measured, longer]).tables}) == len(
        build_report([measured, longer]).tables
    )


def test_the_command_writes_the_page_and_exits_with_1_after_a_failure(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    words = ["compare", str(folder / "dense"), str(folder / "narrow"), "--device", "cpu", "--quiet", "--out"]
    settings = [
        "--text",
        str(folder / "prose.txt"),
        "--sequence-length",
        "64",
        "--max-windows",
        "2",
        "--new-tokens",
        "2",
    ]
    assert run([*words, str(tmp_path / "c"), *settings]) == 0
    assert "narrow" in capsys.readouterr().out
    kept = (tmp_path / "c" / NAME).read_bytes()
    assert run([*words, str(tmp_path / "c"), *settings]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "has the measurements of an earlier comparison; give --out with another folder, or --overwrite" in said
    assert (tmp_path / "c" / NAME).read_bytes() == kept
    assert read_comparisons([tmp_path / "c"])[0].settings["windows"] == 2
    assert run([*words, str(tmp_path / "c"), *settings, "--overwrite", "--max-windows", "1"]) == 0
    assert read_comparisons([tmp_path / "c"])[0].settings["windows"] == 1
    assert run([*words[:2], str(folder / "damaged"), *words[3:], str(tmp_path / "d"), *settings]) == 1
    assert "1 of 2 models" in capsys.readouterr().err
    assert (
        run(["compare", str(tmp_path / "c"), str(tmp_path / "d" / "comparison.json"), "--out", str(tmp_path / "e")])
        == 0
    )
    assert (tmp_path / "e" / PAGE).is_file()
    assert run(["compare", str(tmp_path / "c"), str(folder / "dense"), "--out", str(tmp_path / "f")]) == 2
    assert "is a model" in capsys.readouterr().err
