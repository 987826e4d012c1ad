"""The help of each command and the options that are made from a recipe's fields."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from thanos import Recipe, RecoveryRecipe
from thanos.cli import run
from thanos.cli.app import app
from thanos.cli.options import given
from thanos.errors import RecipeError
from thanos.recipe import Repair
from thanos.registry.pattern_rows import PATTERNS
from thanos.settings import Heading, in_words, settings_of, value_types

HEADINGS = {
    "prune": {
        "What to prune": {"--targets", "--skip", "--recipe"},
        "Method and sparsity": {
            "--method", "--pattern", "--sparsity", "--outlier-rows", "--keep-budget", "--block-size", "--damping", "--scope",
            "--allocation", "--multiple-of", "--head-unit",
        },
        "Repair": {
            "--effort", "--dense-target", "--sequential", "--refit", "--tune", "--held-out", "--tune-rate", "--tune-loss",
        },
        "Calibration": {
            "--calibration", "--samples", "--generate", "--segment", "--prompt", "--prompts", "--sequence-length",
            "--seed", "--measure-error",
        },
        "Where and how it runs": {
            "--device", "--dtype", "--trust-remote-code", "--activations", "--threads", "--resume", "--plan",
        },
        "Output": {"--output-dtype", "--overwrite", "--json", "--quiet", "--help"},
    },
    "recover": {
        "Recovery": {
            *("--epochs", "--rate", "--train", "--vary", "--generate", "--segment", "--batch", "--micro-batch"),
            *("--held-out", "--shard", "--compile", "--dense"),
        },
        "Calibration": {"--calibration", "--samples", "--prompt", "--prompts", "--sequence-length", "--seed"},
        "Where and how it runs": {"--device", "--trust-remote-code", "--threads", "--resume"},
        "Output": {"--overwrite", "--json", "--quiet", "--help"},
    },
    "eval": {
        "Perplexity": {"--text", "--sequence-length", "--max-windows", "--dense", "--bos"},
        "Accuracy on tasks": {"--tasks", "--task-folder", "--limit", "--no-cache"},
        "Where and how it runs": {"--device", "--dtype", "--trust-remote-code", "--threads"},
        "Output": {"--json", "--quiet", "--help"},
    },
    "compare": {
        "What to compare": {"--quantised", "--prompts"},
        "What to time": {"--context", "--new-tokens", "--compile"},
        "Perplexity": {"--text", "--sequence-length", "--max-windows", "--bos"},
        "Accuracy on tasks": {"--tasks", "--task-folder", "--limit"},
        "Where and how it runs": {"--device", "--dtype", "--trust-remote-code", "--threads"},
        "Output": {"--out", "--overwrite", "--quiet", "--help"},
    },
    "inspect": {
        "What to check": {"--dense", "--require"},
        "Where and how it runs": {"--trust-remote-code"},
        "Output": {"--json", "--quiet", "--help"},
    },
    "study": {
        "Where and how it runs": {"--data", "--devices", "--workers", "--threads", "--list"},
        "Output": {"--quiet", "--help"},
    },
    "report": {"Output": {"--readme", "--quiet", "--help"}},
    "pack": {
        "What to pack": {"--least-weights"},
        "Where and how it runs": {"--trust-remote-code"},
        "Output": {"--overwrite", "--json", "--quiet", "--help"},
    },
    "unpack": {"Output": {"--overwrite", "--quiet", "--help"}},
    "bench layer": {
        "Method and sparsity": {"--method", "--pattern", "--sparsity", "--block-size", "--damping"},
        "Layer and timing": {"--seed", "--shape", "--tokens", "--repeats", "--peer"},
        "Where and how it runs": {"--device", "--threads"},
        "Output": {"--json", "--help"},
    },
    "bench decode": {
        "What to time": {"--dense", "--context", "--new-tokens", "--compile"},
        "Where and how it runs": {"--device", "--trust-remote-code", "--threads"},
        "Output": {"--json", "--quiet", "--help"},
    },
    "bench model": {
        "Method and sparsity": {"--method", "--pattern", "--sparsity", "--block-size", "--scope"},
        "Repair": {"--effort", "--dense-target", "--sequential", "--refit", "--tune"},
        "Calibration": {"--samples", "--sequence-length"},
        "Sizes of the model": {
            "--shape", "--hidden", "--intermediate", "--heads", "--kv-heads", "--vocabulary", "--model-blocks",
        },
        "Where and how it runs": {"--device", "--blocks", "--activations", "--threads"},
        "Output": {"--out", "--json", "--quiet", "--help"},
    },
}  # fmt: skip

SETTINGS = settings_of(Recipe)
NUMBERS = [(name, one) for name, one in SETTINGS.items() if one.lowest is not None]


def shown(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert run([*name.split(), "--help"]) == 0
    return capsys.readouterr().out


def entries(text: str) -> dict[str, str]:
    """Option → its entry in a help, blanks and line breaks made one."""
    options = text.split("Options:\n")[1].split("\nExamples:")[0]
    found = re.findall(r"^  (?:-\w, )?(--[a-z-]+)(.*(?:\n {3,}.*)*)", options, re.MULTILINE)
    return {name: " ".join(entry.split()) for name, entry in found}


def parser(name: str) -> Any:
    command: Any = typer.main.get_command(app)
    for word in name.split():
        command = command.commands[word]
    return command


@pytest.mark.parametrize("name", HEADINGS)
def test_the_options_stand_under_headings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = shown(name, capsys).split("Options:\n")[1].split("\nExamples:")[0]
    parts = re.split(r"^ (\S.*):\n", options, flags=re.MULTILINE)[1:]
    found = {
        heading: set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", part, re.MULTILINE))
        for heading, part in zip(parts[::2], parts[1::2], strict=True)
    }
    assert found == HEADINGS[name]
    order = [str(heading) for heading in Heading]
    assert list(found) == sorted(found, key=order.index)


@pytest.mark.parametrize("name", HEADINGS)
def test_every_option_states_its_default_once_unless_it_is_required(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    required = {text for one in parser(name).params if one.required for text in one.opts}
    assert not required & {"--help"}
    for option, entry in entries(shown(name, capsys)).items():
        assert entry.count("(default: ") == (option not in {"--help", *required}), entry
        assert entry.count("[required]") == (option in required), entry


@pytest.mark.parametrize("name", HEADINGS)
def test_the_examples_can_be_copied(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(name, capsys).split("\nExamples:\n")[1].splitlines()
    commands = [line.strip() for line in lines if line.startswith("    ")]
    assert 2 <= len(commands) <= 3
    assert len(lines) == 2 * len(commands)
    for command in commands:
        words = shlex.split(command)
        assert words[: 1 + len(name.split())] == ["thanos", *name.split()]
        context = parser(name).make_context(name, words[1 + len(name.split()) :])
        if name == "prune":
            Recipe(**given({key: value for key, value in context.params.items() if key in SETTINGS}))


def test_the_defaults_shown_are_those_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    found = entries(shown("prune", capsys))
    for option, default in {
        "--method": "thanos", "--pattern": "unstructured", "--outlier-rows": "0",
        "--sparsity": "0.5, or 0.2 for units of the model; some patterns set their own",
        "--keep-budget": "off", "--block-size": "the method's own, 128 or 512", "--damping": "0.01", "--calibration": "c4",
        "--samples": "128", "--sequence-length": "2048", "--seed": "0", "--skip": "none", "--activations": "auto",
    }.items():  # fmt: skip
        assert found[option].endswith(f"(default: {default})."), found[option]
    assert "thanos, sparsegpt, wanda, magnitude or admm (" in found["--method"]
    assert "auto, float32, bfloat16 or float16 (" in found["--dtype"]
    assert found["--sparsity"].startswith("FRACTION Fraction of the weights to remove, at least 0 and below 1 (")
    assert found["--sequence-length"].startswith("TOKENS Tokens per calibration sequence, at least 2 (")


def test_every_setting_of_a_recovery_is_an_option_of_recover() -> None:
    fields = RecoveryRecipe.__dataclass_fields__
    assert set(settings_of(RecoveryRecipe)) == set(fields) <= {parameter.name for parameter in parser("recover").params}


def test_every_setting_of_a_recipe_but_two_is_an_option_of_prune() -> None:
    """Overrides are tables, and ``measure_error`` is for files and Python alone."""
    assert {*SETTINGS, "overrides", "measure_error"} == set(Recipe.__dataclass_fields__)
    options = {parameter.name: parameter for parameter in parser("prune").params}
    assert set(SETTINGS) <= set(options)
    for name, (kind, several) in value_types(Recipe).items():
        parameter = options[name]
        assert parameter.multiple == several
        assert parameter.is_flag == (kind is bool)
        assert parameter.metavar == (SETTINGS[name].metavar or None)


@pytest.mark.parametrize(("name", "described"), NUMBERS, ids=[name for name, _ in NUMBERS])
def test_a_recipe_keeps_to_the_bounds_that_the_help_states(name: str, described: Any) -> None:
    def recipe(value: float) -> Recipe:
        pattern = {"block_size": "2:4", "multiple_of": "neurons"}.get(name, "unstructured")
        generated = {"segment": {"generate": 1}, "prompt": {"generate": 1}}
        uses = {"held_out": {"tune": 1}, "tune_rate": {"tune": 1}, **generated}.get(name, {})
        return Recipe(pattern=pattern, **{name: value}, **uses)  # type: ignore[arg-type]

    kind, _ = value_types(Recipe)[name]
    least = kind(described.lowest)
    valid = 4 if name == "block_size" else least  # 2:4 needs a multiple of 4
    assert getattr(recipe(valid), name) == valid
    with pytest.raises(RecipeError, match=rf"{name} must be .*{re.escape(described.bounds)}; got"):
        recipe(kind(least - 1))
    if described.below is not None:
        with pytest.raises(RecipeError, match=rf"{name} must be .*{re.escape(described.bounds)}; got"):
            recipe(kind(described.below))


def test_a_zero_that_is_given_counts_and_a_flag_that_is_not_does_not(tmp_path: Path) -> None:
    from thanos.cli.prune import merge_recipe

    path = tmp_path / "recipe.toml"
    path.write_text('seed = 3\noutlier_rows = 0.1\nkeep_budget = true\nskip = ["q_proj"]\n')
    command = parser("prune")
    context = command.make_context("prune", ["m", "o", "--seed", "0", "--outlier-rows", "0", "--targets", "a"])
    recipe = merge_recipe(path, given({key: value for key, value in context.params.items() if key in SETTINGS}))
    assert (recipe.seed, recipe.outlier_rows, recipe.keep_budget) == (0, 0.0, True)
    assert (recipe.targets, recipe.skip) == (("a",), ("q_proj",))


def test_a_part_of_the_repair_can_be_switched_off_where_the_effort_has_it_on(tmp_path: Path) -> None:
    from thanos.cli.prune import merge_recipe

    path = tmp_path / "recipe.toml"
    path.write_text('effort = "max"\ndense-target = 0.5\nrefit = 4\n')

    def recipe(*words: str) -> Recipe:
        context = parser("prune").make_context("prune", ["m", "o", *words])
        return merge_recipe(path, given({key: value for key, value in context.params.items() if key in SETTINGS}))

    assert recipe().repair == Repair(dense_target=0.5, sequential=True, refit=4, tune=10)
    off = recipe("--no-sequential", "--tune", "0", "--dense-target", "auto", "--refit", "0")
    assert off.repair == Repair(dense_target="auto", sequential=False, refit=0, tune=0)
    # An effort sets all of its parts, those that the file gives too.
    assert recipe("--effort", "fast", "--sequential").repair == Repair(dense_target=0, sequential=True, refit=0, tune=0)
    with pytest.raises(RecipeError, match=r"dense_target must be auto or a number, .*; got '1\.5'"):
        recipe("--dense-target", "1.5")


def test_a_setting_may_be_repeated_where_a_command_compares_its_values() -> None:
    words = ["--method", "wanda", "--method", "thanos", "--block-size", "8", "--block-size", "16", "--seed", "0"]
    params = parser("bench layer").make_context("layer", words).params
    assert given(params) == {
        "method": ("wanda", "thanos"), "block_size": (8, 16), "seed": 0, "repeats": 5,
    }  # fmt: skip


def test_the_benchmark_of_a_layer_lists_the_patterns_that_a_single_matrix_can_have(
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed = entries(shown("bench layer", capsys))["--pattern"]
    names = re.findall(r"([\w:]+) \(", listed.partition(": ")[2])
    assert names[:3] == ["unstructured", "N:M", "columns"]
    words = {"N:M": "2:4", "heads:N": "heads:4"}
    tried = {row.name for row in PATTERNS} | {"heads:N"}  # not those that other tests register
    for name in tried:
        code = run(
            [
                *["bench", "layer", "--shape", "16x16", "--repeats", "1", "--device", "cpu", "--pattern"],
                words.get(name, name),
            ]
        )
        printed = capsys.readouterr()
        assert code == (0 if name in names else 2), printed.err
    assert "0.2" not in entries(shown("bench layer", capsys))["--sparsity"], "every pattern has the same default here"


def test_default_names_are_written_as_a_list_in_words() -> None:
    assert [in_words("abc"[:count]) for count in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
