"""What is kept between models makes scoring faster and changes no score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import thanos
from helpers import save_tiny
from thanos.errors import ResourceError
from thanos.evaluation import lm_eval_model as answering
from thanos.evaluation import tasks as harness
from thanos.model.loading import load_model
from thanos.model.source import resolve_model

lm_eval = pytest.importorskip("lm_eval")

TASKS = ("local_piqa", "local_winogrande", "local_openbookqa")


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    forget()


def forget() -> None:
    harness._load_tasks.cache_clear()
    answering._ids_of.cache_clear()


def score(model: Path, task_folder: Path, **changes: Any) -> harness.ZeroShot:
    arguments: dict[str, Any] = {
        "tasks": TASKS,
        "task_folder": task_folder,
        "limit": 8,
        "device": "cpu",
        "cache": False,
    }
    return thanos.zero_shot(model, **{**arguments, **changes})


def answers(model: Any, task_folder: Path, limit: int = 8) -> list[tuple[float, bool]]:
    """Return the log-likelihoods of all requests of the tasks, by lm_eval's own way of asking."""
    loaded = harness._load_tasks(TASKS, str(task_folder))
    lm_eval.evaluate(model, {"tasks": loaded, "groups": {}}, limit=limit, log_samples=False)
    return [request.resps[0] for task in loaded.values() for request in task.instances]


def tiny(path: Path) -> tuple[Any, Any]:
    source = resolve_model(path)
    return load_model(source, device="cpu"), source.tokenizer()


def test_a_model_after_another_is_scored_as_if_it_were_alone(
    tiny_llama: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [tiny_llama, save_tiny(tmp_path / "other", seed=3)]
    after_another = [score(model, task_folder).tasks for model in (*models, tiny_llama)]
    alone = []
    for model in (*models, tiny_llama):
        forget()
        alone.append(score(model, task_folder).tasks)
    # as lm_eval does it by itself
    monkeypatch.setattr(harness, "keep_requests", lambda task: task)
    monkeypatch.setattr(answering, "kept_ids", lambda tokenizer: {})
    plain = []
    for model in (*models, tiny_llama):
        forget()
        plain.append(score(model, task_folder).tasks)
    assert after_another == alone == plain
    assert len({repr(found) for found in plain}) == 2, "the models differ"


def test_requests_and_token_ids_are_made_once(
    tiny_llama: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM

    calls = {"build_all_requests": 0, "tok_encode": 0}
    for owner, name in ((Task, "build_all_requests"), (HFLM, "tok_encode")):
        inner = getattr(owner, name)

        def counted(*arguments: Any, name: str = name, inner: Any = inner, **others: Any) -> Any:
            calls[name] += 1
            return inner(*arguments, **others)

        monkeypatch.setattr(owner, name, counted)
    score(tiny_llama, task_folder)
    first = dict(calls)
    assert first["build_all_requests"] == len(TASKS)
    assert first["tok_encode"] > 0
    score(save_tiny(tmp_path / "other", seed=3), task_folder)
    assert calls == first
    score(tiny_llama, task_folder, limit=7)
    assert calls == {**first, "build_all_requests": 2 * len(TASKS)}


def test_token_ids_are_kept_for_the_same_tokenizer_only(tiny_llama: Path) -> None:
    _, tokenizer = tiny(tiny_llama)
    _, same = tiny(tiny_llama)
    assert answering.kept_ids(tokenizer) is answering.kept_ids(same)
    before = answering.kept_ids(tokenizer)
    same.add_tokens(["entirely new"])
    assert answering.kept_ids(same) is not before
    assert answering.kept_ids(object()) is not answering.kept_ids(object()), (
        "of one without a fast form nothing is known"
    )


def test_templates_are_compiled_once_and_only_inside() -> None:
    from lm_eval import utils

    with answering.templates_compiled_once():
        once = utils.env.from_string("{{a}}")
        assert utils.env.from_string("{{a}}") is once
        assert (utils.apply_template("{{a}} b", {"a": 1}), utils.apply_template("{{a}} b", {"a": 2})) == ("1 b", "2 b")
    assert utils.env.from_string("{{a}}") is not once


@pytest.mark.parametrize("tokens", [1, 500, 2500])
def test_batches_by_tokens_answer_as_batches_by_sequences(tiny_llama: Path, task_folder: Path, tokens: int) -> None:
    shapes: list[torch.Size] = []
    network, tokenizer = tiny(tiny_llama)
    network.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    expected = answers(answering.wrap(network, tokenizer, lambda event: None), task_folder)
    shapes.clear()
    model = answering.wrap(network, tokenizer, lambda event: None)
    model.tokens = tokens
    found = answers(model, task_folder)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close(
        torch.tensor([value for value, _ in found]),
        torch.tensor([value for value, _ in expected]),
        rtol=1e-4,
        atol=1e-4,
    )
    assert all(rows == 1 or rows * width <= tokens for rows, width in shapes)
    assert all(rows == 1 for rows, _ in shapes) == (tokens == 1)
    assert model.batch_size == 16, "what is no log-likelihood is batched as before"


@pytest.mark.parametrize("tokens", [0, 4000])
def test_batches_are_halved_where_memory_does_not_suffice(tiny_llama: Path, task_folder: Path, tokens: int) -> None:
    room = 3
    sizes: list[int] = []

    def refuse(_: Any, inputs: Any) -> None:
        sizes.append(len(inputs[0]))
        if sizes[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    network, tokenizer = tiny(tiny_llama)
    model = answering.wrap(network, tokenizer, lambda event: None)
    model.tokens = tokens
    expected = answers(model, task_folder)
    hook = network.register_forward_pre_hook(refuse)
    found = answers(model, task_folder)
    hook.remove()
    assert max(sizes) > room
    assert sizes[-1] <= room
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_memory_that_does_not_suffice_for_one_sequence_is_told(
    tiny_llama: Path, task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, _ = tiny(tiny_llama)
    sizes: list[int] = []

    def refuse(_: Any, inputs: Any) -> None:
        sizes.append(len(inputs[0]))
        raise torch.OutOfMemoryError("CUDA out of memory")

    network.register_forward_pre_hook(refuse)
    with pytest.raises(ResourceError, match="out of memory on cpu"):
        score(tiny_llama, task_folder, network=network)
    assert sizes == [16, 8, 4, 2, 1]


def test_a_model_that_is_loaded_already_is_not_loaded_again(
    tiny_llama: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THANOS_CACHE", str(tmp_path / "cache"))
    expected = score(tiny_llama, task_folder, dtype="float32", cache=True)
    network, _ = tiny(tiny_llama)
    monkeypatch.setattr(harness, "load_model", None)
    found = score(tiny_llama, task_folder, network=network, device="cuda", cache=True)
    assert (found.tasks, found.average) == (expected.tasks, expected.average)
    assert (found.cached, found.dtype, found.device) == ([], "float32", "cpu")


def test_tasks_of_a_folder_are_found_without_reading_the_harnesss_own(
    task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    inner = harness._manager

    def manager(task_folder: str | None, *, defaults: bool = True) -> Any:
        asked.append(defaults)
        return inner(task_folder, defaults=False)

    monkeypatch.setattr(harness, "_manager", manager)
    harness.check_tasks(TASKS, task_folder)
    assert asked == [False]
    harness.check_tasks(["local_zeroshot"], task_folder)
    assert asked == [False, False, True], "a tag may have more tasks among the harness's own"
