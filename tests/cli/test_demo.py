"""``make demo`` on a small model: the folders that it writes, and a table that says of them what they are."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import thanos
from helpers import ROOT, save_tiny
from thanos.cli import demo as command
from thanos.engine.stages import prune as stage
from thanos.recipe import Recipe

HEAD = ["MB on disk", "MB in memory", "tokens/s", "perplexity", "seconds of work"]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder of a demo, and what it printed on the standard output and the standard error."""
    out = tmp_path_factory.mktemp("demo")
    model = save_tiny(out / "model", hidden_size=128, intermediate_size=512, max_position_embeddings=512)
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        printed, errors = run_demo(model, out, patch)
    return out, printed, errors


def run_demo(model: Path, out: Path, patch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Run a short demo; return what it printed on the standard output and the standard error."""
    patch.setitem(command._SETTINGS, "samples", 2)
    patch.setitem(command._EVALUATION, "max_windows", 2)
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as errors:
        command.demo(str(model), out)
    return printed.getvalue(), errors.getvalue()


def rows(text: str) -> dict[str, list[str]]:
    """The lines of the table by their first cell."""
    found = {}
    for line in text.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) == len(HEAD) + 1:
            found[cells[0]] = cells[1:]
    return found


def test_one_table_has_size_speed_and_quality_of_all_three(shown: tuple[Path, str, str]) -> None:
    out, printed, _ = shown
    table = rows(printed)
    assert list(table) == ["dense", "packed", "shrunk"]
    for name, (disk, memory, rate, perplexity, work) in table.items():
        assert disk == f"{(out / name / 'model.safetensors').stat().st_size / 1e6:.1f}"
        assert float(memory) > 0
        assert float(rate) > 0
        measured = thanos.evaluate(
            out / name, text="pydoc", sequence_length=512, max_windows=2, dense=out / "dense", device="cpu"
        )
        assert perplexity == f"{measured.perplexity:.2f}"
        assert work == "-" if name == "dense" else work.isdigit()
    dense = AutoModelForCausalLM.from_pretrained(out / "dense")
    assert table["dense"][1] == f"{sum(p.nbytes for p in dense.parameters()) / 1e6:.1f}"
    assert float(table["packed"][0]) < float(table["dense"][0]) > float(table["shrunk"][0])


def test_the_folders_are_what_the_table_calls_them(shown: tuple[Path, str, str]) -> None:
    out, _, _ = shown
    sizes = {
        name: json.loads((out / name / "config.json").read_text())["intermediate_size"] for name in ("dense", "shrunk")
    }
    assert sizes == {"dense": 512, "shrunk": 384}  # the multiple of 64 nearest to 80 %
    for name, weight in load_file(out / "pruned" / "model.safetensors").items():
        if "proj" in name:
            assert int((weight != 0).reshape(-1, 32).sum(1).max()) == 16, name
    thanos.unpack(out / "packed", out / "again")
    for name, weight in load_file(out / "again" / "model.safetensors").items():
        assert torch.equal(weight, load_file(out / "pruned" / "model.safetensors")[name])
    assert "packed" in (out / "comparison" / "comparison.html").read_text(encoding="utf-8")


def test_the_cards_have_the_licence_and_the_language_of_the_model(shown: tuple[Path, str, str]) -> None:
    out, _, _ = shown
    for name in ("dense", "pruned", "packed", "shrunk"):
        facts = metadata_load(out / name / "README.md")
        assert facts is not None
        assert facts["license"] == "apache-2.0"
        assert facts["language"] in ("en", ["en"])  # a card may have one language in either form


def test_each_step_is_announced_by_the_command_that_does_it(shown: tuple[Path, str, str]) -> None:
    out, _, errors = shown
    lines = re.findall(r"note: (thanos .*)", errors)
    assert [line.split()[1] for line in lines] == ["prune", "prune", "pack", "compare"]
    for line, name in zip(lines, ("pruned", "shrunk"), strict=False):
        options = dict(re.findall(r"--([a-z-]+) (\S+)", line))
        recipe = Recipe.from_toml(out / name / "recipe.toml")
        assert {option: str(getattr(recipe, option.replace("-", "_"))) for option in options} == options


def test_make_runs_the_demo_on_the_file_that_it_fetches() -> None:
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(
        r"^demo: \$\(DEMO\)/model\.gguf.*\n\t\$\(BIN\)/python -m thanos\.cli\.demo \$\(DEMO\)/model\.gguf ", make, re.M
    )


def solved_layers(patch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[str]:
    """Return the names of the layers that are solved from now on; the solver is interrupted at the layer ``fail_at``."""
    names: list[str] = []
    inner = stage.prune_layer

    def solver(*arguments: Any, name: str, **others: Any) -> Any:
        if len(names) == fail_at:
            raise KeyboardInterrupt
        names.append(name)
        return inner(*arguments, name=name, **others)

    patch.setattr(stage, "prune_layer", solver)
    return names


def test_an_interrupted_demo_continues_and_keeps_what_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = save_tiny(tmp_path / "model", hidden_size=128, intermediate_size=512, max_position_embeddings=512)
    with pytest.MonkeyPatch.context() as patch:
        first = solved_layers(patch, fail_at=8)  # in the second block of the first model
        with pytest.raises(KeyboardInterrupt):
            run_demo(model, out, patch)
    assert {name.split(".")[2] for name in first} == {"0", "1"}
    with pytest.MonkeyPatch.context() as patch:
        rest = solved_layers(patch)
        _, errors = run_demo(model, out, patch)
    assert {name.split(".")[2] for name in rest[:7]} == {"1"}, "block 0 is not solved again"
    assert "dense was made from this model earlier: it is kept" in errors
    lines = re.findall(r"note: thanos prune .*", errors)
    assert [line.endswith(" --resume") for line in lines] == [True, False]
    before = {name: (out / name / "model.safetensors").read_bytes() for name in ("dense", "pruned", "shrunk")}

    with pytest.MonkeyPatch.context() as patch:
        again = solved_layers(patch)
        printed, errors = run_demo(model, out, patch)
    assert again == []
    assert errors.count("is already complete, made by the same run") == 2
    assert list(rows(printed)) == ["dense", "packed", "shrunk"]
    for name, data in before.items():
        assert (out / name / "model.safetensors").read_bytes() == data

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(command._RECIPES, "pruned", {"pattern": "8:32"})
        changed = solved_layers(patch)
        _, errors = run_demo(model, out, patch)
    layers = 7 * json.loads((model / "config.json").read_text())["num_hidden_layers"]
    assert len(changed) == layers, "with other settings the model is pruned again"
    assert errors.count("is already complete, made by the same run") == 1, "the other model is kept"
    other = save_tiny(tmp_path / "other", seed=5, hidden_size=128, intermediate_size=512, max_position_embeddings=512)
    with pytest.MonkeyPatch.context() as patch:
        solved = solved_layers(patch)
        run_demo(other, out, patch)
    assert len(solved) > layers, "both models are made again from another dense model"
    assert (out / "dense" / "model.safetensors").read_bytes() != before["dense"]
