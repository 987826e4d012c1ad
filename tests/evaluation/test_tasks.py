"""Zero-shot accuracy is lm_eval's own, to the digit."""

from __future__ import annotations

import json
import math
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import thanos
from helpers import save_tiny, tiny_model, tiny_tokenizer
from thanos.cli import run
from thanos.errors import DataError
from thanos.evaluation import score_cache
from thanos.evaluation import tasks as harness
from thanos.model.source import resolve_model

lm_eval = pytest.importorskip("lm_eval")

TASKS = ("local_piqa", "local_winogrande", "local_arc_easy")
LIMIT = 12


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THANOS_CACHE", str(tmp_path / "cache"))


def score(model: Path, task_folder: Path, **changes: Any) -> harness.ZeroShot:
    arguments: dict[str, Any] = {"tasks": TASKS, "task_folder": task_folder, "limit": LIMIT, "device": "cpu"}
    return thanos.zero_shot(model, **{**arguments, **changes})


@pytest.mark.slow
def test_the_numbers_are_those_of_lm_eval_alone(tiny_llama: Path, task_folder: Path) -> None:
    from lm_eval.tasks import TaskManager

    ours = score(tiny_llama, task_folder)
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(tiny_llama), "dtype": "float32"}, tasks=list(TASKS), limit=LIMIT,
        batch_size=16, device="cpu", task_manager=TaskManager(include_path=str(task_folder)),
    )  # fmt: skip
    assert theirs is not None
    assert set(ours.tasks) == set(TASKS)
    for task, found in ours.tasks.items():
        expected = theirs["results"][task]
        for metric in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
            assert found[metric] == expected.get(f"{metric},none"), (task, metric)
        assert found["samples"] == LIMIT
    assert ours.tasks["local_winogrande"]["acc_norm"] is None


@pytest.mark.parametrize("package", ["lm_eval", "transformers"])
def test_another_version_of_a_package_has_scores_of_its_own(
    package: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, tasks = resolve_model(tiny_llama), {"one": SimpleNamespace(dump_config=dict, eval_docs=[])}

    def keys() -> dict[str, str]:
        return score_cache.keys_of(source, tasks, None, "float32", torch.device("cpu"), bos=False)

    before, version = keys(), metadata.version
    assert keys() == before
    monkeypatch.setattr(metadata, "version", lambda name: "0" if name == package else version(name))
    assert keys() != before


@pytest.mark.slow
def test_scores_are_cached_by_what_shapes_them(
    tiny_llama: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[list[str]] = []
    inner = harness._score

    def counted(network: Any, source: Any, tasks: Any, *others: Any, **named: Any) -> Any:
        runs.append(sorted(task.config.task for task in tasks))
        return inner(network, source, tasks, *others, **named)

    monkeypatch.setattr(harness, "_score", counted)
    one = ("local_piqa",)
    first = score(tiny_llama, task_folder, tasks=one)
    again = score(tiny_llama, task_folder, tasks=("local_piqa", "local_arc_easy"))
    assert runs == [["local_piqa"], ["local_arc_easy"]]
    assert (first.cached, again.cached) == ([], ["local_piqa"])
    assert again.tasks["local_piqa"] == first.tasks["local_piqa"]
    same_weights = save_tiny(tmp_path / "elsewhere")
    assert score(same_weights, task_folder, tasks=one).cached == ["local_piqa"]
    for changes in ({"limit": 5}, {"dtype": "bfloat16"}, {"cache": False}):
        assert score(tiny_llama, task_folder, tasks=one, **changes).cached == []
    assert score(save_tiny(tmp_path / "other", seed=3), task_folder, tasks=one).cached == []
    assert len(runs) == 6


@pytest.mark.slow
def test_a_bos_that_is_asked_for_is_lm_evals_own_option_with_scores_of_its_own(
    tiny_llama: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    from thanos.evaluation import lm_eval_model as answering

    options: list[Any] = []
    inner = harness.wrap

    def watched(*arguments: Any, **others: Any) -> Any:
        model = inner(*arguments, **others)
        options.append(model.add_bos_token)
        return model

    monkeypatch.setattr(harness, "wrap", watched)
    one = ("local_piqa",)
    usual, begun = score(tiny_llama, task_folder, tasks=one), score(tiny_llama, task_folder, tasks=one, bos="window")
    assert ((usual.bos, usual.cached), (begun.bos, begun.cached)) == (("text", []), ("window", []))
    assert options == [None, True]
    for bos in ("auto", "text", "window"):
        assert score(tiny_llama, task_folder, tasks=one, bos=bos).cached == list(one)
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(tiny_llama), "dtype": "float32", "add_bos_token": True}, tasks=list(one),
        limit=LIMIT, batch_size=16, device="cpu", task_manager=TaskManager(include_path=str(task_folder)),
    )  # fmt: skip
    assert theirs is not None
    assert begun.tasks["local_piqa"]["acc"] == theirs["results"]["local_piqa"]["acc,none"]
    # Ids of a text that was asked for in both ways are kept apart.
    known = answering.kept_ids(tiny_tokenizer())
    known.clear()
    network = tiny_model()
    for bos in (False, True):
        answering.wrap(network, tiny_tokenizer(), lambda event: None, bos=bos).tok_encode("ban")
    assert len(known) == 2

    other = save_tiny(tmp_path / "other")
    tiny_tokenizer(begins=False).save_pretrained(other)
    with pytest.raises(DataError, match="adds no beginning-of-text token; leave out"):
        score(other, task_folder, tasks=one, bos="window")


def test_auto_is_the_dtype_that_it_stands_for(tiny_llama: Path, task_folder: Path) -> None:
    one = {"tasks": ("local_piqa",), "limit": 2}
    first = score(tiny_llama, task_folder, **one)
    again = score(tiny_llama, task_folder, dtype="float32", **one)
    assert (first.dtype, first.cached) == ("float32", [])
    assert (again.dtype, again.cached) == ("float32", ["local_piqa"])


def test_progress_is_told(tiny_llama: Path, task_folder: Path) -> None:
    events: list[thanos.Event] = []
    score(tiny_llama, task_folder, tasks=("local_piqa",), limit=20, on_event=events.append)
    assert [(event.kind, event.phase) for event in events] == [("progress", "tasks")] * len(events)
    assert [event.done for event in events] == [16, 29], "40 requests, of which some are answered by one pass"
    assert {event.total for event in events} == {40}


def test_the_average_is_of_independent_tasks() -> None:
    scores = [
        {"acc": 0.5, "acc_stderr": 0.03, "acc_norm": 0.25, "acc_norm_stderr": 0.02},
        {"acc": 0.75, "acc_stderr": 0.04, "acc_norm": None, "acc_norm_stderr": None},
    ]
    assert harness.average(scores) == {
        "acc": 0.625, "acc_stderr": pytest.approx(math.sqrt(0.03**2 + 0.04**2) / 2), "acc_norm": 0.25, "acc_norm_stderr": 0.02,
    }  # fmt: skip
    assert harness.average([]) == dict.fromkeys(("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"))


def test_the_command_prints_and_writes_what_was_measured(
    tiny_llama: Path, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scores.json"
    arguments = [
        "eval",
        str(tiny_llama),
        "--tasks",
        "local_piqa, local_winogrande",
        "--task-folder",
        str(task_folder),
        "--limit",
        "5",
    ]
    assert run([*arguments, "--json", str(path)]) == 0
    shown = capsys.readouterr()
    values = json.loads(path.read_text())
    assert list(values) == [
        "schema", "model", "tasks", "average", "limit", "cached", "seconds", "dtype", "device", "versions",
        "bos",
    ]  # fmt: skip
    assert list(values["tasks"]) == ["local_piqa", "local_winogrande"]
    for score in [*values["tasks"].values(), values["average"]]:
        assert f"{score['acc']:.4f}" in shown.out
        assert f"{score['acc_stderr']:.4f}" in shown.out
    assert "average" in shown.out
    assert run([*arguments, "--json", "-", "--quiet"]) == 0
    streamed = capsys.readouterr()
    assert json.loads(streamed.out)["cached"] == ["local_piqa", "local_winogrande"]
    assert streamed.err == ""


def test_a_task_whose_data_is_not_here_names_the_way_without_a_network(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", str(tiny_llama), "--tasks", "boolq", "--quiet"]) == 2
    assert "without a network use local tasks: --task-folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "arc_eazy"], "similar names: arc_easy"),
        (["--tasks", "qqqqqqqq"], "no name is similar"),
        (["--tasks", "piqa", "--task-folder", "/nowhere"], "/nowhere does not exist"),
        (["--tasks", "piqa", "--limit", "0"], "limit must be at least 1"),
        (["--tasks", "piqa", "--text", "pydoc"], "instead of perplexity"),
        (["--limit", "3"], "need --tasks"),
    ],
)
def test_mistakes_are_refused(
    tiny_llama: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", str(tiny_llama), *arguments, "--quiet"]) == 2
    assert message in capsys.readouterr().err


def test_the_papers_tasks_are_known_to_lm_eval() -> None:
    assert len(harness.PAPER_TASKS) == 7
    harness.check_tasks(harness.PAPER_TASKS)


def test_names_of_tasks_are_expanded() -> None:
    assert harness.task_names(["paper"]) == harness.task_names(["default"]) == harness.PAPER_TASKS
    assert harness.task_names(["piqa", " sciq", "piqa"]) == ("piqa", "sciq")


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    harness._manager.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(DataError, match=r"pip install 'lm_eval==0\.4\.13'"):
        harness.check_tasks(["piqa"])
    harness._manager.cache_clear()
