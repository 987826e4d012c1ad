"""``make demo`` on a small model: the folders that it writes, and a table that says of them what they are."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import thanos
from helpers import ROOT, save_tiny
from thanos.cli import demo as command
from thanos.recipe import Recipe

HEAD = ["MB on disk", "MB in memory", "tokens/s", "perplexity", "seconds of work"]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder of a demo, and what it printed on the standard output and the standard error."""
    out = tmp_path_factory.mktemp("demo")
    model = save_tiny(out / "model", hidden_size=128, intermediate_size=512, max_position_embeddings=512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(command._SETTINGS, "samples", 2)
        patch.setitem(command._EVALUATION, "max_windows", 2)
        with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as errors:
            command.demo(str(model), out)
    return out, printed.getvalue(), errors.getvalue()


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
