"""The command as a user meets it: options, exit codes, one-line errors, what is printed and written."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import prose, save_tiny
from thanos.cli import run
from thanos.cli.progress import PlainLines
from thanos.cli.prune import merge_recipe
from thanos.errors import RecipeError
from thanos.events import Event
from thanos.recipe import Recipe
from thanos.study.events import StudyEvent

PRUNE = ["--samples", "4", "--sequence-length", "32", "--device", "cpu"]

OPTIONS = {
    "prune": {
        "--method", "--pattern", "--sparsity", "--outlier-rows", "--keep-budget", "--block-size", "--damping", "--calibration",
        "--samples", "--sequence-length", "--seed", "--device", "--dtype", "--targets", "--skip", "--recipe", "--overwrite",
        "--resume", "--activations", "--measure-error", "--plan", "--json", "--trust-remote-code", "--threads", "--quiet",
        "--help",
        "--scope", "--allocation", "--multiple-of", "--head-unit", "--output-dtype",
        "--effort", "--dense-target", "--sequential", "--no-sequential", "--refit", "--tune", "--held-out", "--tune-rate",
        "--tune-loss", "--generate", "--segment", "--prompt", "--prompts",
    },
    "eval": {
        "--text", "--sequence-length", "--max-windows", "--dense", "--tasks", "--task-folder",
        "--limit", "--bos", "--no-cache", "--json", "--device", "--dtype", "--trust-remote-code",
        "--threads", "--quiet", "--help",
    },
    "study": {"--data", "--devices", "--workers", "--threads", "--list", "--quiet", "--help"},
    "inspect": {"--require", "--dense", "--json", "--trust-remote-code", "--quiet", "--help"},
    "report": {"--readme", "--quiet", "--help"},
    "pack": {"--least-weights", "--trust-remote-code", "--overwrite", "--json", "--quiet", "--help"},
    "unpack": {"--overwrite", "--quiet", "--help"},
}  # fmt: skip


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "thanos", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", **environment},
        check=False,
    )


@pytest.fixture(scope="session")
def pruned_24(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "two-four"
    arguments = ["prune", str(tiny_llama), str(out), "--pattern", "2:4", "--calibration", str(text_file), *PRUNE]
    assert run([*arguments, "--quiet"]) == 0
    return out


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_of_a_command_are_frozen(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text.split("Options:")[1])) == OPTIONS[name]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "does not exist"),
        ("empty.txt", b"", "holds no text"),
        ("blank.jsonl", b'{"text": " "}', "holds no text"),
        ("other.jsonl", b'{"a": "x", "b": "y"}', "no string under 'text'; there are 'a', 'b'"),
        ("bad.json.gz", b"no gzip", "cannot be read"),
        ("binary.txt", b"\0\1\2", "holds a NUL"),
        ("empty/", None, "holds no file ending in"),
        ("chat.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}', "no chat template"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "plan", "eval"])
def test_a_text_that_cannot_be_used_is_refused_before_anything_is_loaded(
    command: str,
    name: str,
    content: bytes | None,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = save_tiny(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name.endswith("/"):
        path.mkdir()
    for module in ("calibration.making", "evaluation.perplexity"):
        monkeypatch.setattr(f"thanos.{module}.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    for module in ("run.prune", "planning.plan"):
        monkeypatch.setattr(f"thanos.{module}.prepare", lambda *_, **__: pytest.fail("the model was opened"))
    prune = ["prune", str(model), str(tmp_path / "out"), "--calibration", str(path), *PRUNE]
    arguments = {
        "prune": prune,
        "plan": [*prune, "--plan"],
        "eval": ["eval", str(model), "--text", str(path), *PRUNE[2:4]],
    }
    assert run([*arguments[command], "--quiet"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_states_its_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run([name, "--help"])
    options = capsys.readouterr().out.split("Options:")[1]
    entries = re.split(r"\n  (?=-)", options)[1:]
    for entry in entries:
        if "--help" not in entry:
            assert re.search(r"default", entry), entry


def test_python_m_thanos_and_the_version_are_quick() -> None:
    result = command("--version")
    assert result.returncode == 0
    assert re.fullmatch(r"thanos \d+\.\d+\.\d+\n", result.stdout)
    program = "import thanos.cli.app, sys; print('torch' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "False", "help must not wait for torch"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prune"], "MODEL"),
        (["prune", "a", "b", "--nonsense"], "--nonsense"),
        (["frobnicate"], "frobnicate"),
        (["prune", "a", "b", "--sparsity", "much"], "sparsity"),
        (["prune", "{model}", "{out}", "--method", "obs"], "thanos, sparsegpt, wanda, magnitude, admm"),
        (["prune", "{model}", "{out}", "--pattern", "4:2"], "0 < n < m"),
        (["prune", "{model}", "{out}", "--pattern", "diagonal"], "unstructured, N:M such as 2:4"),
        (["prune", "{model}", "{out}", "--sparsity", "1.0"], "below 1"),
        (["prune", "{model}", "{out}", "--sparsity", "-0.1"], "at least 0"),
        (["prune", "{model}", "{out}", "--sparsity", "nan"], "sparsity"),
        (["prune", "{model}", "{out}", "--pattern", "2:4", "--sparsity", "0.6"], "contradicts"),
        (["prune", "{model}", "{out}", "--sparsity", "0.8", "--outlier-rows", "0.3"], "impossible"),
        (["prune", "{model}", "{out}", "--pattern", "2:4", "--block-size", "30"], "multiple of 4"),
        (["prune", "{model}", "{out}", "--device", "cuda"], "CUDA"),
        (["prune", "{model}", "{out}", "--device", "tpu"], "auto, cpu, cuda"),
        (["prune", "{model}", "{out}", "--dtype", "int8"], "float32"),
        (["prune", "{model}", "{out}", "--sequence-length", "300", "--calibration", "{text}"], "256 positions"),
        (
            ["prune", "{model}", "{out}", "--samples", "9999", "--sequence-length", "32", "--calibration", "{text}"],
            "--samples",
        ),
        (["prune", "{model}", "{out}", "--sequence-length", "32", "--calibration", "none.txt"], "does not exist"),
        (
            ["prune", "{model}", "{out}", "--sequence-length", "32", "--calibration", "c4"],
            "give pydoc, or a local file",
        ),
        (
            [
                "prune",
                "{model}",
                "{out}",
                "--targets",
                "nothing*",
                "--calibration",
                "{text}",
                "--sequence-length",
                "32",
            ],
            "matches no linear layer",
        ),
        (["prune", "{model}", "{model}"], "own folder"),
        (["prune", "{model}", "{model}/inside"], "inside it"),
        (["prune", "no/such/model", "{out}"], "no/such/model"),
        (["prune", "nobody/nothing", "{out}"], "local folder"),
        (["prune", "{model}", "{out}", "--recipe", "none.toml"], "none.toml"),
        (["eval", "{model}", "--text", "wikitext2", "--sequence-length", "32"], "give pydoc, or a local file"),
        (["eval", "{model}", "--text", "{text}", "--sequence-length", "1"], "at least 2"),
        (["eval", "{model}", "--text", "{text}", "--max-windows", "0"], "at least 1"),
        (["eval", "{model}", "--text", "self"], "self"),
        (["eval", "{model}", "--text", "{text}", "--sequence-length", "32", "--json", "no/folder/x.json"], "--json"),
        (["inspect", "{model}", "--require", "unstructured"], "N:M or columns"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_users_mistake_is_one_line_and_exit_2(
    arguments: list[str],
    expected: str,
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"model": str(tiny_llama), "out": str(tmp_path / "out"), "text": str(text_file)}
    before = sorted(path.name for path in tiny_llama.iterdir())
    assert run([argument.format(**names) for argument in arguments]) == 2
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert error.startswith("error: ")
    assert expected in error
    assert captured.err.count("error: ") == 1
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == [], "something was written"
    assert sorted(path.name for path in tiny_llama.iterdir()) == before


def test_without_a_command_there_is_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert [name for name in OPTIONS if re.search(rf"^  {name} ", captured.out, re.MULTILINE)] == list(OPTIONS)


def test_a_name_that_is_too_long_is_a_users_mistake(
    tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["prune", "m" * 300, str(tmp_path / "out")], ["prune", str(tiny_llama), "o" * 300]):
        assert run([*arguments, "--calibration", str(text_file), "--quiet"]) == 2
        assert "give a shorter name" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_is_a_users_mistake(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tiny_llama), "--quiet", "--json", "/dev/full"]) == 2
    error = capsys.readouterr().err
    assert "free some space" in error
    assert len(error.splitlines()) == 1


def test_a_limit_on_file_sizes_is_a_users_mistake_and_nothing_is_left(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["prune", str(tiny_llama), str(out), "--calibration", str(text_file), *PRUNE, "--quiet"]
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from thanos.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "ulimit -f" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_anything_unexpected_is_exit_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("thanos.cli.prune.merge_recipe", lambda *_: 1 / 0)
    monkeypatch.delenv("THANOS_DEBUG", raising=False)
    assert run(["prune", "a", "b"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: unexpected ZeroDivisionError")
    assert len(error.splitlines()) == 1


def test_an_interruption_is_exit_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("thanos.cli.prune.merge_recipe", interrupt)
    assert run(["prune", "a", "b"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_prune_prints_a_summary_and_progress(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = command("prune", str(tiny_llama), str(out), "--calibration", str(text_file), "--seed", "3", *PRUNE)
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "pruning.json").read_text())
    zeros, targeted = report["totals"]["zeros_targeted"], report["totals"]["targeted_parameters"]
    assert f"({zeros:,} of {targeted:,})" in result.stdout
    assert f"{report['totals']['mean_error_after_compensation']:.5f}" in result.stdout
    for phase in report["phases"]:
        assert re.search(rf"^ *{phase} .* s, host peak .* GiB", result.stdout, re.MULTILINE), phase
    assert "block 1 of 3" in result.stderr
    assert "block 3 of 3" in result.stderr
    assert report["recipe"]["seed"] == 3


@pytest.mark.parametrize("words", ["prune", "plan", "eval"])
def test_quiet_hides_progress_and_shows_notes(
    words: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": None}, *({"text": prose(1500, seed=row)} for row in range(8))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = ["--calibration", str(tmp_path / "rows.jsonl"), "--samples", "2"]
    arguments = {
        "prune": ["prune", str(tiny_llama), str(tmp_path / "out"), *texts],
        "plan": ["prune", str(tiny_llama), str(tmp_path / "out"), *texts, "--plan"],
        "eval": ["eval", str(tiny_llama), "--text", str(tmp_path / "rows.jsonl"), "--max-windows", "1"],
    }[words]
    assert run([*arguments, "--sequence-length", "32", "--device", "cpu", "--quiet"]) == 0
    said = capsys.readouterr().err.splitlines()
    notes = [line for line in said if "note: " in line]
    assert all(line in notes or line.startswith("warning: ") for line in said), "no progress"
    if words != "plan":  # a plan reads no text
        [note] = notes
        assert note.endswith("rows.jsonl has 1 row whose text is null, left out")


@pytest.mark.parametrize(("which", "expected"), [("all", True), ("none", False), ("auto", None), (None, False)])
def test_measure_error_overrides_the_recipe_file(
    which: str | None, expected: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "recipe.toml", []
    path.write_text("measure_error = false\n")

    def prune(model: str, out: Path, recipe: Recipe, **others: object) -> None:
        seen.append(recipe.measure_error)
        raise RecipeError("enough")

    monkeypatch.setattr("thanos.prune", prune)
    words = [] if which is None else ["--measure-error", which]
    assert run(["prune", "model", str(tmp_path / "out"), "--recipe", str(path), *words]) == 2
    assert seen == [expected]


def test_measure_error_knows_three_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prune", "model", "out", "--measure-error", "al"]) == 2
    assert "--measure-error must be one of all, none, auto; got 'al' (did you mean all?)" in capsys.readouterr().err


def test_quiet_hides_progress_and_shows_notes_of_a_study(capsys: pytest.CaptureFixture[str]) -> None:
    from thanos.cli.study import watch

    with watch(quiet=True) as show:
        show(StudyEvent(message="converting model.gguf to safetensors, once"))
        show(StudyEvent(event=Event(kind="progress", phase="solve", done=1, total=2)))
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("note: converting model.gguf to safetensors, once")


def test_quiet_shows_no_progress(tiny_llama: Path, text_file: Path) -> None:
    result = command("eval", str(tiny_llama), "--text", str(text_file), "--sequence-length", "64", "--quiet")
    assert result.returncode == 0
    [note] = result.stderr.splitlines()
    assert "note: the first windows have perplexity" in note


def test_prune_does_not_overwrite_unless_told(
    pruned_24: Path, tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["prune", str(tiny_llama), str(out), "--calibration", str(text_file), *PRUNE, "--quiet"]
    assert run([*arguments, "--sparsity", "0.25"]) == 0
    first = (out / "model.safetensors").read_bytes()
    assert run(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == first
    assert run([*arguments, "--overwrite"]) == 0
    assert (out / "model.safetensors").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_eval_writes_the_json_that_it_prints(
    tiny_llama: Path, pruned_24: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    arguments = [
        "eval",
        str(pruned_24),
        "--dense",
        str(tiny_llama),
        "--text",
        str(text_file),
        "--sequence-length",
        "64",
    ]
    assert run([*arguments, "--max-windows", "5", "--json", str(path)]) == 0
    values = json.loads(path.read_text())
    assert list(values) == [
        "schema", "model", "text", "text_sha256", "sequence_length", "bos", "bos_ids", "windows", "tokens", "perplexity",
        "mean_loss", "dense", "dense_perplexity", "kl_divergence", "top1_agreement", "seconds", "tokens_per_second", "dtype",
        "device", "versions",
    ]  # fmt: skip
    assert (values["windows"], values["tokens"]) == (5, 5 * 63)
    assert f"{values['perplexity']:.4f}" in capsys.readouterr().out
    assert run([*arguments, "--max-windows", "5", "--json", "-", "--quiet"]) == 0
    streamed = json.loads(capsys.readouterr().out)
    assert streamed["perplexity"] == values["perplexity"]


def test_inspect_require_passes_and_fails(
    pruned_24: Path, tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(pruned_24), "--require", "2:4"]) == 0
    assert "satisfied by every targeted layer" in capsys.readouterr().out
    out = tmp_path / "unstructured"
    run(["prune", str(tiny_llama), str(out), "--calibration", str(text_file), *PRUNE, "--quiet"])
    capsys.readouterr()
    assert run(["inspect", str(out), "--require", "2:4", "--quiet"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("groups hold more than 2 non-zeros") == 21, "7 layers in each of 3 blocks"
    assert "model.layers.2.mlp.down_proj" in captured.err
    assert "lm_head" not in captured.err


def test_inspect_into_a_closed_pipe_is_quiet(pruned_24: Path) -> None:
    line = f"{sys.executable} -m thanos inspect {pruned_24} --quiet | head -1"
    result = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert result.stderr == ""


class TestRecipeFile:
    def write(self, tmp_path: Path, text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        return path

    def test_flags_win(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, 'method = "wanda"\nsparsity = 0.6\nsamples = 7\n')
        merged = merge_recipe(path, {"sparsity": 0.3})
        assert (merged.method, merged.sparsity, merged.samples) == ("wanda", 0.3, 7)

    def test_a_pattern_flag_drops_what_belonged_to_the_files_pattern(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, 'pattern = "unstructured"\nsparsity = 0.6\nblock-size = 127\n')
        assert merge_recipe(path, {"pattern": "2:4"}) == Recipe(pattern="2:4")
        with pytest.raises(RecipeError, match="contradicts"):
            merge_recipe(path, {"pattern": "2:4", "sparsity": 0.6})
        path = self.write(tmp_path, 'pattern = "2:4"\nblock-size = 64\n')
        assert merge_recipe(path, {"pattern": "02:04"}).block_size == 64  # the same pattern

    def test_only_the_flag_lets_code_of_the_checkpoint_run(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "trust_remote_code = true\n")
        with pytest.raises(RecipeError, match="give --trust-remote-code"):
            merge_recipe(path, {"samples": 7})
        assert merge_recipe(path, {"trust_remote_code": True}).trust_remote_code

    def test_overrides_stay(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, '[[override]]\nmatch = "*.down_proj"\nmethod = "magnitude"\n')
        layer = merge_recipe(path, {"method": "wanda"}).for_layer("model.layers.0.mlp.down_proj")
        assert layer is not None
        assert layer.method == "magnitude"

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("sparsety = 0.5", "sparsety"),
            ("sparsity = 'half'", "sparsity"),
            ("method = ", "not valid TOML"),
            ("targets = 'q_proj'", "list of globs"),
            ("[[override]]\nmethod = 'wanda'", "needs match"),
        ],
    )
    def test_a_bad_file_is_a_users_mistake(
        self, text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = self.write(tmp_path, text)
        assert run(["prune", "model", str(tmp_path / "out"), "--recipe", str(path)]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert str(path) in error

    def test_the_recipe_beside_the_model_runs_again(
        self, pruned_24: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
    ) -> None:
        out, stored = tmp_path / "again", ["--recipe", str(pruned_24 / "recipe.toml")]
        assert run(["prune", str(tiny_llama), str(out), *stored, "--calibration", str(text_file), "--quiet"]) == 0
        assert (out / "model.safetensors").read_bytes() == (pruned_24 / "model.safetensors").read_bytes()


class TestPlainLines:
    def test_lines_tell_block_error_and_rest(self) -> None:
        stream = io.StringIO()
        show = PlainLines(stream)
        show(Event(kind="phase", phase="calibration"))
        show(Event(kind="phase", phase="statistics", block=0, blocks=4, seconds=30.0))
        show(Event(kind="block", phase="propagate", block=0, blocks=4, error=0.0125, seconds=60.0))
        show(Event(kind="progress", phase="statistics", block=1, blocks=4, done=1, total=9, seconds=60.0))
        show(Event(kind="progress", phase="statistics", block=1, blocks=4, done=5, total=9, seconds=75.0))
        show(Event(kind="note", phase="load", message="mind the gap", seconds=75.0))
        lines = stream.getvalue().splitlines()
        assert lines[0] == "[0:00] calibrate"
        assert re.fullmatch(r"\[1:00\] block 1 of 4, mean layer error 0.0125, .* GiB, 1:30 left", lines[1])
        assert lines[2:] == ["[1:15] block 2 of 4, statistics 5 of 9", "[1:15] note: mind the gap"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_live_line(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    arguments = ["prune", str(tiny_llama), str(tmp_path / "o"), "--calibration", str(text_file), *PRUNE]
    process = subprocess.Popen([sys.executable, "-m", "thanos", *arguments], stdout=subprocess.PIPE, stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    assert process.wait() == 0
    assert b"\x1b[" in shown
    assert re.search(rb"block \d/3", shown)


def test_a_sharded_model_with_a_read_only_folder_is_pruned(tmp_path: Path, text_file: Path) -> None:
    model = save_tiny(tmp_path / "model", max_shard_size="40KB")
    model.chmod(0o555)
    arguments = ["prune", str(model), str(tmp_path / "out"), "--calibration", str(text_file), *PRUNE, "--quiet"]
    assert run(arguments) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
