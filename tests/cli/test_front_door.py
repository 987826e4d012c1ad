"""What a newcomer gets wrong: one line that names what was meant, before anything is loaded."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import thanos
from helpers import save_tiny, tiny_model, tiny_tokenizer
from thanos.cli import run
from thanos.cli.app import app
from thanos.cli.options import NUMBERS
from thanos.errors import DataError, ModelError, RecipeError, ResourceError, UserError
from thanos.recipe import Recipe
from thanos.registry import method_names
from thanos.run.work_folder import check_output
from thanos.system.suggestions import meant_fraction, near, near_device, near_dtype, near_number, near_whole


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that is a user's mistake; return its line."""
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    return error


# --- what was meant -----------------------------------------------------------------------------------------------------


def hint_of(pattern: str) -> str:
    """The part of the error's line that says what was meant."""
    with pytest.raises(RecipeError) as caught:
        Recipe(pattern=pattern)
    return re.search(r"( \(did you mean .*\?\))?$", str(caught.value)).group()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (50, 0.5), (50.0, 0.5), (10, 0.1), (66.6, 0.666), ("50%", 0.5), ("50 %", 0.5), ("0,5", 0.5), ("0.5", 0.5), (0.5, 0.5),
        ("7.5%", 0.075), ("50", 0.5), (1, None), (100, None), ("100%", None), (-0.5, None), ("half", None), (True, None),
        (float("nan"), None), ("inf", None), (None, None), ([], None),
        ("2%", 0.02), (2, None), ("5", None), (9.9, None),
    ],
)  # fmt: skip
def test_the_fraction_that_was_meant(given: Any, meant: float | None) -> None:
    assert meant_fraction(given) == meant


@pytest.mark.parametrize(
    ("hint", "meant"),
    [
        (hint_of("2-4"), "2:4"),
        (hint_of("2/4"), "2:4"),
        (hint_of(" 4 : 8"), "4:8"),
        (hint_of("4:2"), None),
        (hint_of("nm"), "2:4"),
        (hint_of("semi-structured"), "2:4"),
        (hint_of("semi_structured"), "2:4"),
        (hint_of("structured"), "columns"),
        (hint_of("Unstructured"), "unstructured"),
        (hint_of("unstructred"), "unstructured"),
        (hint_of("50%"), "unstructured with sparsity 0.5"),
        (hint_of("diagonal"), None),
        (near_device("gpu"), "cuda"),
        (near_device("GPU"), "cuda"),
        (near_device("gpu:1"), "cuda:1"),
        (near_device("cuda1"), "cuda:1"),
        (near_device("cuda:x"), "cuda"),
        (near_device("CPU"), "cpu"),
        (near_device("tpu"), None),
        (near_dtype("fp16", ("float16", "bfloat16", "float32")), "float16"),
        (near_dtype("half", ("float16", "bfloat16", "float32")), "float16"),
        (near_dtype("bf16", ("float16", "bfloat16", "float32")), "bfloat16"),
        (near_dtype(torch.bfloat16, ("float16", "bfloat16", "float32")), "bfloat16"),
        (near_dtype("int8", ("float16", "bfloat16", "float32")), None),
        (near("sparse-gpt", method_names()), "sparsegpt"),
        (near("SparseGPT", method_names()), "sparsegpt"),
        (near("magnitud", method_names()), "magnitude"),
        (near("obs", method_names()), None),
        (near_whole("1e3"), "1000"),
        (near_whole("1,000"), "1000"),
        (near_whole(128.0), "128"),
        (near_whole("12.5"), None),
        (near_whole(-1), None),
        (near_number("0,01", fraction=False), "0.01"),
        (near_number(-0.5, fraction=True), None),
        (near_number("1,5", fraction=False, allows=lambda number: number <= 1), None),
        (near_whole("1e3", lambda number: number <= 100), None),
    ],
)
def test_hints(hint: str, meant: str | None) -> None:
    found = re.search(r"did you mean (.*)\?\)$", hint)
    assert (found and found[1]) == meant


def test_apples_gpu_is_named(capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> None:
    line = refused(["prune", str(tiny_llama), str(tmp_path / "out"), "--device", "mps"], capsys)
    assert "does not run on Apple's GPU; did you mean cpu?" in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--verion"], "no option --verion before the command (did you mean --version?); see thanos --help"),
        (["-version"], "no option -version before the command (did you mean --version?); see thanos --help"),
        (["--threads", "1", "prune"], "no option --threads before the command; give it after the command; see thanos"),
        (["--nonesuch"], "no option --nonesuch before the command; see thanos --help"),
        (
            ["bench", "--shape=8x8", "layer"],
            "no option --shape before the command; give it after the command; see thanos bench",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_before_the_command(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(words, capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--sparsity", "50"], "got 50.0 (did you mean 0.5?)"),
        (["--sparsity", "50%"], "got '50%' (did you mean 0.5?)"),
        (["--sparsity", "0,5"], "got '0,5' (did you mean 0.5?)"),
        (["--outlier-rows", "10"], "got 10.0 (did you mean 0.1?)"),
        (["--sparsity", "1.5"], "got 1.5\n"),
        (["--sparsity", "2"], "got 2.0\n"),
        (["--dense-target", "2"], "at least 0 and at most 1; got '2'\n"),
        (["--dense-target", "50"], "got '50' (did you mean 0.5?)"),
        (["--dense-target", "200%"], "got '200%'\n"),
        (["--tune", "1", "--tune-rate", "50"], "got 50.0\n"),
        (["--tune-rate", "1,5"], "got '1,5'; see"),
        (["--samples", "1e3"], "got '1e3' (did you mean 1000?)"),
        (["--samples", "-1"], "got -1\n"),
        (["--method", "sparse-gpt"], "(did you mean sparsegpt?)"),
        (["--pattern", "2/4"], "(did you mean 2:4?)"),
        (["--dtype", "half"], "(did you mean float16?)"),
        (["--activations", "gpu"], "(did you mean device?)"),
        (["--sparsty", "0.5"], "no option --sparsty (did you mean --sparsity?); see thanos prune --help"),
        (["-sparsity", "0.5"], "no option -sparsity (did you mean --sparsity?)"),
        (["--calibration", ""], "--calibration is empty; give SOURCE, or leave --calibration out"),
        (["--json"], "--json needs a value: --json FILE, or - for the standard output; see thanos prune --help"),
        (
            ["--json", "--plan"],
            "--json needs a value: --json FILE, or - for the standard output; got the option --plan",
        ),
        (["--json", "-"], "--json needs --plan"),
        (["--plan", "--resume"], "leave out --resume"),
        (["extra"], "'extra' is one argument too many: thanos prune takes MODEL OUT"),
        (["--threads", "0"], "--threads must be a whole number, 1 to 1024; got 0"),
        (["--threads", "9999"], "got 9999"),
        (["--targets", "q_proj,k_proj"], "looks like several globs"),
        (["--targets", "layers\\.0"], "has \\; a glob over layer names has"),
        (["--skip", "layers.[0-3"], "unmatched bracket"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_told_before_the_model_is_looked_for(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(["prune", str(tmp_path / "no/model"), str(tmp_path / "out"), *words], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["eval", "m"], ["inspect", "m"], ["bench", "layer"], ["bench", "model"]])
def test_json_without_a_file(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = refused([*command, "--json"], capsys)
    assert "--json needs a value: --json FILE, or - for the standard output" in line
    assert f"see thanos {command[0]}" in line


def test_a_misspelt_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no command 'prun' (did you mean prune?)" in refused(["prun"], capsys)
    assert "there is no command 'layr' (did you mean layer?); choose one of layer, model" in refused(
        ["bench", "layr"], capsys
    )


def test_a_group_without_a_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert re.search(r"^  layer .*\n  model ", captured.out, re.MULTILINE)


def test_a_missing_model_is_told_before_any_progress(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect", "./nowhere"], ["eval", "./nowhere", "--text", "pydoc"]):
        assert "nowhere does not exist" in refused(command, capsys)


def test_of_an_option_given_twice_the_last_counts_and_a_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "no/model")
    assert run(["prune", missing, str(tmp_path / "out"), "--seed", "1", "--seed", "2"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "warning: --seed is given twice; the last one counts: 2"
    assert "warning" not in refused(["prune", missing, str(tmp_path / "out"), "--skip", "a", "--skip", "b"], capsys)


def test_every_number_is_checked_before_the_parser_reads_it() -> None:
    import typer

    for command in ("prune", "eval", "study"):
        for parameter in typer.main.get_command(app).commands[command].params:  # type: ignore[attr-defined]
            if parameter.name in (
                "sparsity",
                "outlier_rows",
                "damping",
                "seed",
                "samples",
                "threads",
                "limit",
                "workers",
            ):
                assert parameter.metavar in NUMBERS, parameter.name


# --- recipe files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty; write a setting"),
        (b"\x80\x81\x82", "not UTF-8 text"),
        (b"sparsity = 50", "did you mean 0.5?"),
        (b'sparsity = "50%"', "did you mean 0.5?"),
        (b"sparsety = 0.5", "did you mean sparsity?"),
        (b"nsamples = 5", "did you mean samples?"),
        (b'[[override]]\nmatch = "q_proj"\noutlier_rows = 10', "did you mean 0.1?"),
        (b'[[override]]\nmatch = "q_proj"\noutlier_row = 0.1', "did you mean outlier_rows?"),
        (b'[[override]]\nmatch = "q_proj"\npattern = "2-4"', "did you mean 2:4?"),
        (b"sparsity: 0.5", "a setting is a line such as sparsity = 0.5"),
    ],
)
def test_a_bad_recipe_file(content: bytes, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    line = refused(["prune", "./no-model", str(tmp_path / "out"), "--recipe", str(path)], capsys)
    assert expected in line
    assert str(path) in line


def test_a_folder_as_recipe_names_the_file_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.toml").write_text("seed = 1")
    line = refused(["prune", "./no-model", str(tmp_path / "out"), "--recipe", str(tmp_path)], capsys)
    assert f"Is a directory; give a TOML file, such as {tmp_path / 'recipe.toml'}" in line


# --- models and folders ---------------------------------------------------------------------------------------------------


def test_an_object_in_memory_is_refused_saying_to_save_it(tmp_path: Path) -> None:
    for thing in (tiny_model(), tiny_tokenizer()):
        for call in (
            lambda m: thanos.prune(m, tmp_path / "out"),
            lambda m: thanos.plan(m, tmp_path / "out"),
            thanos.evaluate,
            thanos.inspect_checkpoint,
            lambda m: thanos.evaluate("a/name", dense=m),
        ):
            with pytest.raises(ModelError, match=rf"{type(thing).__name__}.*save_pretrained\(FOLDER\)") as caught:
                call(thing)
            assert len(str(caught.value)) < 400
    for thing in (None, 5, ["a"]):
        with pytest.raises(ModelError, match="must be a hub name, a local folder"):
            thanos.inspect_checkpoint(thing)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="is empty"):
        thanos.prune("", tmp_path / "out")
    with pytest.raises(UserError, match="OUT must be the path of a folder"):
        thanos.prune("model", "")
    with pytest.raises(RecipeError, match=r"must be a thanos\.Recipe"):
        thanos.prune("model", tmp_path / "out", {"sparsity": 0.5})  # type: ignore[arg-type]


def test_a_path_like_object_and_the_home_folder_are_understood(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Where:
        def __fspath__(self) -> str:
            return str(tiny_llama)

    expected = thanos.inspect_checkpoint(tiny_llama).totals
    assert thanos.inspect_checkpoint(Where()).totals == expected  # type: ignore[arg-type]
    monkeypatch.setenv("HOME", str(tiny_llama.parent))
    assert thanos.inspect_checkpoint(f"~/{tiny_llama.name}").totals == expected
    assert thanos.inspect_checkpoint(f"{tiny_llama}/../{tiny_llama.name}").totals == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(["inspect", str(tiny_llama), "--quiet", "--json=~/found.json"]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["totals"] == expected


def test_model_and_out_in_the_wrong_order(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "MODEL comes first, then OUT" in refused(["prune", "some/name", str(tiny_llama)], capsys)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert "is a file; give the name of a folder; MODEL comes first" in refused(["prune", "name", str(gguf)], capsys)


def test_out_in_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="file is a file; choose a path in a folder"):
        check_output(tmp_path / "file/a/out", model=None, overwrite=False)
    check_output(tmp_path / "a/b/out", model=None, overwrite=False)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ResourceError, match=f"you have no permission to write in {re.escape(str(tmp_path))}"):
        check_output(tmp_path / "a/b/out", model=None, overwrite=False)


# --- cheap checks come first ----------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where weights are opened or loaded."""
    for place in (
        "run.setup.open_model",
        "evaluation.inspect.open_model",
        "evaluation.perplexity.load_model",
        "evaluation.perplexity.evaluation_rows",
        "evaluation.tasks.load_model",
        "evaluation.tasks._load_tasks",
        "bench.model.time_model",
        "bench.layer.device_rates",
        "bench.layer.synthetic_layer",
    ):
        monkeypatch.setattr(f"thanos.{place}", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.fixture
def no_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("bare") / "model")
    for path in folder.glob("*token*"):
        path.unlink()
    return folder


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["prune", "{model}", "{file}/out"], "is a file"),
        (["prune", "{model}", "{file}"], "OUT .* is a file"),
        (["prune", "{model}", "{out}", "--device", "gpu"], "did you mean cuda"),
        (["prune", "{model}", "{out}", "--targets", "a b"], "several globs"),
        (["prune", "{model}", "{out}", "--sequence-length", "300"], "256 positions"),
        (["prune", "{bare}", "{out}", "--sequence-length", "32"], "no tokenizer"),
        (["prune", "{model}", "{out}", "--plan", "--sequence-length", "300"], "256 positions"),
        (["prune", "{model}", "{file}/out", "--plan", "--device", "gpu"], "is a file"),
        (["prune", "{bare}", "{out}", "--plan", "--sequence-length", "32"], "no tokenizer"),
        (["eval", "{model}", "--text", "{file}", "--dtype", "half"], "did you mean float16"),
        (["eval", "{model}", "--text", "{file}", "--dense", "./nowhere", "--device", "gpu"], "nowhere does not exist"),
        (["eval", "./nowhere", "--text", "{file}", "--device", "gpu"], "nowhere does not exist"),
        (["eval", "{model}", "--text", "{file}", "--sequence-length", "300"], "256 positions"),
        (["eval", "{bare}", "--text", "{file}", "--sequence-length", "32"], "no tokenizer"),
        (["eval", "{model}", "--text", "{file}", "--json", "{out}/x/y.json"], "there is no folder"),
        (["eval", "{model}", "--text", "{out}/no.txt", "--sequence-length", "300"], "no.txt does not exist"),
        (["eval", "{bare}", "--text", "{empty}", "--sequence-length", "32"], "no tokenizer"),
        (["eval", "{model}", "--text", "{empty}", "--sequence-length", "300"], "256 positions"),
        (["eval", "{model}", "--text", "{empty}", "--sequence-length", "32"], "holds no text"),
        (["eval", "./nowhere", "--tasks", "x y"], "nowhere does not exist"),
        (["eval", "{bare}", "--tasks", "x y"], "no tokenizer"),
        (["eval", "{model}", "--tasks", "piqa", "--device", "gpu"], "did you mean cuda"),
        (
            ["eval", "{model}", "--tasks", "piqa", "--task-folder", "{out}", "--device", "gpu"],
            "task folder .* does not",
        ),
        (["bench", "model", "--shape", "llama-3-8c"], "did you mean llama-3-8b"),
        (["bench", "model", "--device", "gpu"], "did you mean cuda"),
        (["bench", "model", "--sparsity", "50"], "did you mean 0.5"),
        (["bench", "model", "--out", "{file}"], "is not a folder"),
        (["bench", "layer", "--shape", "12"], "rows x columns"),
        (["bench", "layer", "--device", "gpu"], "did you mean cuda"),
        (["bench", "layer", "--sparsity", "50"], "did you mean 0.5"),
        (["bench", "layer", "--json", "{out}/x/y.json"], "there is no folder"),
        (["inspect", "{model}", "--require", "2-4"], "did you mean 2:4"),
        (["inspect", "{model}", "--json", "{folder}"], "is a folder; give a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_be_known_at_once_is_told_before_anything_is_loaded(
    words: list[str],
    expected: str,
    tiny_llama: Path,
    no_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file.txt").write_text("some words")
    (tmp_path / "empty.txt").write_text("")
    names = {
        "model": tiny_llama, "bare": no_tokenizer, "out": tmp_path / "out", "file": tmp_path / "file.txt", "folder": tmp_path,
        "empty": tmp_path / "empty.txt",
    }  # fmt: skip
    words = [word.format(**names) for word in words]
    more = ["--calibration", str(tmp_path / "file.txt")] if words[0] == "prune" else []
    more += [] if words[:2] == ["bench", "layer"] else ["--quiet"]
    assert re.search(expected, refused([*words, *more], capsys))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "file.txt"]


def test_the_list_of_tasks_is_read_after_a_local_config_and_before_a_download(
    no_tokenizer: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    order: list[str] = []

    def listed(tasks: Any, folder: Any) -> Any:
        order.append("tasks")
        raise DataError("unknown to lm_eval")

    def resolved(model: Any, **others: Any) -> Any:
        order.append("config")
        return inner(model, **others)

    from thanos.evaluation import tasks as harness

    inner = harness.resolve_model
    monkeypatch.setattr(harness, "_register", listed)
    monkeypatch.setattr(harness, "resolve_model", resolved)
    for model, expected in ((no_tokenizer, ["config"]), (tiny_llama, ["config", "tasks"]), ("some/model", ["tasks"])):
        order.clear()
        with pytest.raises(UserError, match=r"no tokenizer|unknown to lm_eval"):
            thanos.zero_shot(model, tasks=["x"], device="cpu")
        assert order == expected, model


def test_the_device_is_asked_for_after_the_files(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("run.prune", "planning.plan", "evaluation.perplexity"):
        monkeypatch.setattr(f"thanos.{module}.choose_device", lambda _: pytest.fail("a device was asked for"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/config.json").write_text("{}")
    for begin in (thanos.prune, thanos.plan):
        with pytest.raises(UserError, match="not empty"):
            begin(tiny_llama, tmp_path / "full", Recipe(calibration="pydoc"))
        with pytest.raises(UserError, match="does not exist"):
            begin("./nowhere", tmp_path / "out", Recipe(calibration="pydoc"))
    with pytest.raises(UserError, match="does not exist"):
        thanos.evaluate(tiny_llama, dense="./nowhere", text="pydoc", sequence_length=32)


# --- threads --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads_as_before() -> Any:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_threads_are_torchs_and_no_part_of_the_recipe(
    tiny_llama: Path, text_file: Path, tmp_path: Path, threads_as_before: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", str(tiny_llama), str(tmp_path / "out"), "--calibration", str(text_file), "--samples", "4"]
    words += ["--sequence-length", "32", "--device", "cpu", "--quiet"]
    assert run([*words, "--threads", "3"]) == 0
    assert torch.get_num_threads() == 3
    assert "threads" not in json.loads((tmp_path / "out/pruning.json").read_text())["recipe"]
    assert run([*words, "--threads", "2", "--resume"]) == 0, "the same run, already complete"
    assert torch.get_num_threads() == 2
    assert (
        run(["eval", str(tiny_llama), "--text", str(text_file), "--sequence-length", "64", "-q", "--threads", "1"]) == 0
    )
    assert torch.get_num_threads() == 1
    assert run(["eval", str(tiny_llama), "--text", str(text_file), "--sequence-length", "64", "-q"]) == 0
    assert torch.get_num_threads() == 1, "without the option nothing is set"


@pytest.mark.usefixtures("threads_as_before")
def test_a_resumed_run_with_other_threads_warns(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop(event: thanos.Event) -> None:
        if event.kind == "layer" and event.block == 1:
            raise Stop

    recipe = Recipe(calibration=str(text_file), samples=4, sequence_length=32, device="cpu")
    torch.set_num_threads(1)
    with pytest.raises(Stop):
        thanos.prune(tiny_llama, tmp_path / "out", recipe, on_event=stop)
    torch.set_num_threads(2)
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe, resume=True)
    (line,) = report.warnings
    assert line.startswith("resumed with another number of threads (--threads): threads 1 → 2; the result may differ")


def test_each_worker_of_a_study_gets_the_threads(monkeypatch: pytest.MonkeyPatch, threads_as_before: int) -> None:
    from thanos.study import workers as pool

    class Ended(Exception):  # noqa: N818
        pass

    def session(*_: Any, **__: Any) -> None:
        raise Ended

    monkeypatch.setattr(pool, "Session", session)
    monkeypatch.setattr(pool.signal, "signal", lambda *_: None)
    monkeypatch.setattr(pool, "_end_with_parent", lambda: None)
    for threads, expected in ((3, 3), (None, 1)):
        torch.set_num_threads(2)
        with pytest.raises(Ended):
            pool._work(None, None, None, "cpu", 2, 2, None, threads)  # type: ignore[arg-type]
        assert torch.get_num_threads() == expected


def test_control_characters_of_a_damaged_file_do_not_reach_the_terminal(tmp_path, capsys):
    folder = save_tiny(tmp_path / "model", "llama")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header[next(name for name in header if name != "__metadata__")]["dtype"] = "\x1b[31m\n\ud800"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :])
    error = refused(["inspect", str(folder), "--quiet"], capsys)
    assert r"dtype \x1b[31m \ud800 is not supported" in error
    assert error.removesuffix("\n").isprintable()
