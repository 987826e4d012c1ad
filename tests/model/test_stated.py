"""What a model states about itself: read from a folder's README.md or from GGUF metadata, and written into the card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import thanos
from gguf_models import write_gguf
from thanos.model.source import ModelSource, resolve_model
from thanos.model.stated import _from_gguf, stated_facts


def of_readme(folder: Path, text: str) -> dict[str, Any]:
    (folder / "README.md").write_text(text, encoding="utf-8")
    return stated_facts(ModelSource("m", folder))


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        (
            "license: other\nlicense_name: llama3\nlicense_link: https://a.b/c\nlanguage: [en, 'no']\nbase_model: a/b",
            {
                "license": "other",
                "license_name": "llama3",
                "license_link": "https://a.b/c",
                "language": ["en", "no"],
                "base_model": ["a/b"],
            },
        ),
        ("language: de\nbase_model: [a/b, ./local, /home/ann/x, a/b, c/d]", {"language": ["de"], "base_model": ["a/b", "c/d"]}),
        ("license: [mit]\nlanguage: 7\nbase_model: {}", {}),
        ("license: ''", {}),
        (": : :", {}),
        ("- a list", {}),
    ],
)  # fmt: skip
def test_the_front_matter(tmp_path: Path, front: str, expected: dict[str, Any]) -> None:
    assert of_readme(tmp_path, f"---\n{front}\n---\n# A model\n") == expected


@pytest.mark.parametrize("text", ["", "# A model\n", "---\n", "license: mit\n"])
def test_no_front_matter(tmp_path: Path, text: str) -> None:
    assert stated_facts(ModelSource("m", tmp_path)) == {}
    assert of_readme(tmp_path, text) == {}


METADATA = {
    "general.license": "apache-2.0",
    "general.license.link": "https://huggingface.co/a/b/LICENSE",
    "general.languages": ["en", "no"],
    "general.base_model.count": 2,
    "general.base_model.0.repo_url": "https://huggingface.co/Org/Base-1B",
    "general.base_model.1.repo_url": "https://elsewhere.org/x/y",
}


def test_gguf_metadata(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "m.gguf", "llama", metadata=METADATA)
    assert stated_facts(resolve_model(path)) == {
        "license": "apache-2.0",
        "license_link": "https://huggingface.co/a/b/LICENSE",
        "language": ["en", "no"],
        "base_model": ["Org/Base-1B"],
    }
    assert stated_facts(resolve_model(write_gguf(tmp_path / "plain.gguf", "llama"))) == {}


def test_a_gguf_that_states_more_base_models_than_it_names() -> None:
    class Counting(dict[str, Any]):
        looked = 0

        def get(self, key: str, default: Any = None) -> Any:
            self.looked += 1
            assert self.looked < 100
            return super().get(key, default)

    metadata = Counting(METADATA | {"general.base_model.count": 1 << 60})
    assert _from_gguf(metadata)["base_model"] == ["Org/Base-1B"]


def front_matter(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_the_card_of_the_output_states_the_same(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    said = {"license": "other", "license_name": "a: b", "language": ["en", "no"], "base_model": ["Org/Base", "Org/Two"]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(said)}tags: [own]\n---\nIts own text.\n", encoding="utf-8")
    recipe = thanos.Recipe(calibration=str(text_file), samples=4, sequence_length=32, device="cpu")
    report = thanos.prune(folder, tmp_path / "out", recipe)
    assert report.model["stated"] == said
    card = front_matter(tmp_path / "out")
    assert {key: card[key] for key in said} == said
    assert card["tags"] == ["pruned", "sparse", "thanos"]
    again = thanos.prune(tmp_path / "out", tmp_path / "out2", recipe)  # and the card of its output
    assert again.model["stated"] == said
