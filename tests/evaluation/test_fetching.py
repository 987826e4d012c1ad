"""A text that must be downloaded is fetched before any weight is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import thanos
from helpers import prose
from thanos.calibration.text import fetch_text
from thanos.comparison import run as comparison
from thanos.comparison.run import Request, compare
from thanos.errors import DataError, StudyError
from thanos.evaluation import perplexity
from thanos.study import run as study_run
from thanos.study import session
from thanos.study.run import run_study

datasets = pytest.importorskip("datasets")


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done with the network and with weights; there is no network."""
    steps: list[str] = []

    def download(repository: str, **arguments: Any) -> Any:
        steps.append(f"{repository} {arguments['split']}")
        raise ConnectionError("no network")

    def load(name: str) -> Callable[..., Any]:
        def fail(*_: Any, **__: Any) -> Any:
            steps.append(name)
            raise DataError("the weights were read, or a model was downloaded")

        return fail

    monkeypatch.setattr(datasets, "load_dataset", download)
    for module in (comparison, perplexity, session):
        monkeypatch.setattr(module, "load_model", load("weights"))
    return steps


@pytest.mark.parametrize(
    ("text", "download"), [("wikitext2", "Salesforce/wikitext test"), ("c4", "allenai/c4 validation")]
)
def test_compare_and_evaluate_fetch_it_before_weights(
    tiny_llama: Path, order: list[str], text: str, download: str
) -> None:
    settings: dict[str, Any] = {"text": text, "sequence_length": 32, "device": "cpu"}
    with pytest.raises(DataError, match=f"{text} cannot be downloaded"):
        compare([str(tiny_llama)], Request(**settings))
    assert order == [download]
    with pytest.raises(DataError, match=f"{text} cannot be downloaded"):
        thanos.evaluate(tiny_llama, **settings)
    assert order == [download] * 2


def test_it_is_fetched_before_a_model_of_the_hub(
    tiny_llama: Path, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (comparison, perplexity):
        monkeypatch.setattr(module, "resolve_model", lambda *_, **__: pytest.fail("a model was downloaded"))
    with pytest.raises(DataError, match="cannot be downloaded"):
        compare([str(tiny_llama), "some/model"], Request(sequence_length=32, device="cpu"))
    with pytest.raises(DataError, match="cannot be downloaded"):
        thanos.evaluate("some/model", sequence_length=32, device="cpu")
    with pytest.raises(DataError, match="cannot be downloaded"):
        thanos.evaluate(tiny_llama, dense="some/model", sequence_length=32, device="cpu")
    assert order == ["Salesforce/wikitext test"] * 3


def test_a_study_fetches_it_before_its_first_cell(
    tiny_llama: Path, tmp_path: Path, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_run, "Pool", lambda *_: pytest.fail("a cell was started"))
    shutil.copytree(tiny_llama, tmp_path / "tiny")
    (tmp_path / "prose.txt").write_text(prose(600), encoding="utf-8")
    path = tmp_path / "study.toml"
    path.write_text(
        'models = ["tiny"]\n[evaluation]\ntext = "wikitext2"\nsequence_length = 32\n'
        '[[grid]]\ncalibration = "prose.txt"\nsamples = 2\nsequence_length = 32\n'
    )
    with pytest.raises(StudyError, match=r"study\.toml, line 3.*text: wikitext2 cannot be downloaded"):
        run_study(path, tmp_path / "out", devices=["cpu"])
    assert order == ["Salesforce/wikitext test"]


def test_other_texts_need_no_download(order: list[str]) -> None:
    for text in ("pydoc", "prose.txt"):
        fetch_text(text, evaluation=True)
    assert order == []


def test_compare_reads_a_local_text_before_weights(tiny_llama: Path, tmp_path: Path, order: list[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no text"):
        compare([str(tiny_llama)], Request(text=str(tmp_path / "empty.txt"), sequence_length=32, device="cpu"))
    with pytest.raises(DataError, match="is beyond the"):
        compare([str(tiny_llama)], Request(text="pydoc", sequence_length=100_000, device="cpu"))
    assert order == []
