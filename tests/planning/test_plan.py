"""A plan says beforehand what a run then takes, and changes nothing."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from thanos.planning.memory_model import LayerWork, hessian_bytes, largest_sum, solve_bytes, solving_bytes
from thanos.planning.phases import Job, transfer_bytes

import thanos
from helpers import save_tiny
from thanos.bench.synthetic import Shape, write_checkpoint
from thanos.checkpoint.in_memory import LoadedCheckpoint
from thanos.cli import run
from thanos.engine import activations
from thanos.errors import UserError
from thanos.planning import plan as planning
from thanos.recipe import LayerRecipe, Recipe

KEYS = [
    "schema", "thanos_version", "recipe", "device", "blocks", "layers", "activations", "activations_bytes", "batch",
    "disk_bytes", "disk_besides_bytes", "disk_free_bytes", "host_peak_bytes", "host_base_bytes", "host_free_bytes",
    "device_peak_bytes", "device_free_bytes", "phases", "seconds", "does_not_fit",
]  # fmt: skip
PHASES = {"load", "calibration", "statistics", "solve", "write", "propagate", "finish"}


def recipe(text: Path, **settings: object) -> Recipe:
    return Recipe(**{"calibration": str(text), "samples": 4, "sequence_length": 32, "device": "cpu"} | settings)


@pytest.fixture(scope="module")
def plan(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> thanos.Plan:
    return thanos.plan(tiny_llama, tmp_path_factory.mktemp("plan") / "out", recipe(text_file))


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


class TestThePlan:
    def test_disk_is_what_the_weights_then_take(self, tmp_path: Path, text_file: Path) -> None:
        model = save_tiny(tmp_path / "model", max_shard_size="40KB")
        planned = thanos.plan(model, tmp_path / "out", recipe(text_file))
        thanos.prune(model, tmp_path / "out", recipe(text_file))
        written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
        assert planned.disk_bytes == written
        whole = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
        assert whole <= planned.disk_bytes + planned.disk_besides_bytes

    def test_nothing_is_written(self, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
        before = files(tiny_llama)
        thanos.plan(tiny_llama, tmp_path / "deep" / "out", recipe(text_file))
        assert files(tmp_path) == {}
        assert files(tiny_llama) == before

    def test_the_run_it_speaks_of_is_the_one_that_runs(
        self, plan: thanos.Plan, tiny_llama: Path, text_file: Path, tmp_path: Path
    ) -> None:
        report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file))
        assert plan.layers == len(report.layers)
        assert (plan.activations, plan.batch) == (report.execution["activations"], report.execution["batch"])
        assert set(plan.phases) == set(report.phases) == PHASES
        assert plan.recipe == report.recipe

    def test_hidden_states_are_counted_to_the_byte(self, plan: thanos.Plan, tiny_llama: Path) -> None:
        width = json.loads((tiny_llama / "config.json").read_text())["hidden_size"]
        assert plan.activations_bytes == 4 * 32 * width * 4, "sequences, tokens, width, float32"

    def test_what_sums_up_does(self, plan: thanos.Plan) -> None:
        assert plan.seconds == pytest.approx(sum(phase.seconds for phase in plan.phases.values()))
        assert plan.host_peak_bytes == max(phase.host_peak_bytes for phase in plan.phases.values())
        assert plan.host_peak_bytes >= plan.host_base_bytes > 0
        assert all(phase.seconds >= 0 for phase in plan.phases.values())
        assert plan.does_not_fit == []

    def test_the_model_is_left_as_it_was_for_a_run_after_it(
        self, tiny_llama: Path, text_file: Path, tmp_path: Path
    ) -> None:
        thanos.prune(tiny_llama, tmp_path / "a", recipe(text_file))
        thanos.plan(tiny_llama, tmp_path / "b", recipe(text_file))
        thanos.prune(tiny_llama, tmp_path / "b", recipe(text_file))
        name = "model.safetensors"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_layers_after_the_blocks_and_blocks_without_any(
        self, tiny_llama: Path, text_file: Path, tmp_path: Path
    ) -> None:
        planned = thanos.plan(tiny_llama, tmp_path / "out", recipe(text_file, targets=("lm_head", "*.1.*.q_proj")))
        assert planned.layers == 2

    @pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
    @pytest.mark.parametrize("pattern", ["unstructured", "2:4", "columns"])
    def test_every_method_and_pattern(
        self, method: str, pattern: str, tiny_llama: Path, text_file: Path, tmp_path: Path
    ) -> None:
        planned = thanos.plan(tiny_llama, tmp_path / "out", recipe(text_file, method=method, pattern=pattern))
        assert planned.phases["solve"].seconds > 0


class TestPlaces:
    def test_hidden_states_move_to_the_disk_where_the_host_is_small(
        self, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: thanos.Plan
    ) -> None:
        assert plan.activations == "host"
        monkeypatch.setattr(activations, "free_host_bytes", lambda: 1000)
        planned = thanos.plan(tiny_llama, tmp_path / "out", recipe(text_file))
        assert planned.activations == "disk"
        assert planned.disk_besides_bytes - plan.disk_besides_bytes == planned.activations_bytes

    def test_what_is_asked_for_is_kept(self, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
        assert thanos.plan(tiny_llama, tmp_path / "out", recipe(text_file), activations="disk").activations == "disk"

    def test_what_does_not_fit_is_said(
        self, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(planning, "free_host_bytes", lambda: 1000)
        monkeypatch.setattr(planning, "free_disk_bytes", lambda folder: 1000)
        disk, memory = thanos.plan(tiny_llama, tmp_path / "out", recipe(text_file)).does_not_fit
        assert "disk full" in disk
        assert "out of memory on the host" in memory


class TestTheCommand:
    def arguments(self, model: Path, text: Path, out: Path, *more: str) -> list[str]:
        common = ["--calibration", str(text), "--samples", "4", "--sequence-length", "32", "--device", "cpu"]
        return ["prune", str(model), str(out), *common, "--plan", "--quiet", *more]

    def test_json(self, tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(self.arguments(tiny_llama, text_file, tmp_path / "out", "--json", "-")) == 0
        values = json.loads(capsys.readouterr().out)
        assert list(values) == KEYS
        assert values["schema"] == 1
        assert values["device_peak_bytes"] is None
        assert list(tmp_path.iterdir()) == []

    def test_a_table(
        self, tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(self.arguments(tiny_llama, text_file, tmp_path / "out")) == 0
        shown = capsys.readouterr().out
        assert all(phase in shown for phase in PHASES)
        assert "kept on: host" in shown

    @pytest.mark.parametrize(
        ("more", "expected"),
        [
            (["--resume"], "leave out --resume"),
            (["--targets", "nothing*"], "matches no linear layer"),
            (["--outlier-rows", "0.99", "--sparsity", "0.005"], "impossible"),
            (["--samples", "9999"], "--samples"),
            (["--calibration", "self", "--sequence-length", "300"], "256 positions"),
            (["--activations", "attic"], "activations must be one of"),
            (["--json", "no/folder/x.json"], "--json"),
        ],
    )
    def test_a_users_mistake_is_one_here_too(
        self,
        more: list[str],
        expected: str,
        tiny_llama: Path,
        text_file: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert run(self.arguments(tiny_llama, text_file, tmp_path / "out", *more)) == 2
        assert expected in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_an_output_that_may_not_be_written(self, tiny_llama: Path, text_file: Path) -> None:
        with pytest.raises(UserError, match="own folder"):
            thanos.plan(tiny_llama, tiny_llama, recipe(text_file))

    def test_json_without_a_plan(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["prune", "a", str(tmp_path / "b"), "--json", "-"]) == 2
        assert "--json belongs to --plan" in capsys.readouterr().err


class TestFootprint:
    def work(self, group: int, rows: int, columns: int) -> LayerWork:
        return LayerWork(f"layer{group}", rows, columns, 2, LayerRecipe(), group)

    def test_hessians_go_one_by_one(self) -> None:
        first, second = self.work(0, 8, 100), self.work(1, 8, 10)
        assert solving_bytes([first, second]) == hessian_bytes(100) + hessian_bytes(10) + solve_bytes(first)
        assert solving_bytes([second, first]) == hessian_bytes(100) + max(
            hessian_bytes(10) + solve_bytes(second), solve_bytes(first)
        )

    def test_layers_that_share_an_input_share_its_hessian(self) -> None:
        one, other = self.work(0, 8, 100), self.work(0, 4, 100)
        assert solving_bytes([one, other]) == hessian_bytes(100) + solve_bytes(one)

    def test_a_blocks_weights_and_those_read_ahead(self) -> None:
        assert largest_sum([3, 1, 4, 1, 5]) == 6
        assert largest_sum([7]) == 7
        assert largest_sum([]) == 0

    @pytest.mark.parametrize(("dtype", "mib"), [(torch.float32, 64), (torch.bfloat16, 32)])
    def test_the_memory_of_a_transfer_is_a_chunk_and_two_pairs_of_buffers(self, dtype: torch.dtype, mib: int) -> None:
        state = {"large": torch.empty(1 << 25, dtype=dtype), "small": torch.empty(4, dtype=dtype)}
        job = object.__new__(Job)
        job.prepared = SimpleNamespace(opened=SimpleNamespace(checkpoint=LoadedCheckpoint(state)))  # type: ignore[assignment]
        assert job.chunk_bytes(["large", "small"]) == mib << 20
        assert job.chunk_bytes(["small"]) == 4 * dtype.itemsize
        assert job.chunk_bytes([]) == 0
        assert transfer_bytes(job) == (mib << 20) + 4 * (16 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["--targets", "q_proj", "--targets", "down_proj"], ["--method", "wanda"]])
def test_the_peak_is_within_a_quarter_of_the_plan(settings: list[str], tmp_path: Path) -> None:
    draw, text = random.Random(0), tmp_path / "numbers.txt"
    text.write_text(" ".join(str(draw.randrange(2, 512)) for _ in range(2000)), encoding="utf-8")
    shape = Shape(hidden=2048, intermediate=5632, heads=16, kv_heads=4, blocks=2, vocabulary=512)
    write_checkpoint(tmp_path / "model", shape)
    arguments = [sys.executable, "-m", "thanos", "prune", str(tmp_path / "model"), str(tmp_path / "out")]
    arguments += ["--calibration", str(text), "--samples", "2", "--sequence-length", "128", "--quiet", *settings]
    planned = subprocess.run([*arguments, "--plan", "--json", "-"], capture_output=True, text=True, check=True)
    subprocess.run(arguments, check=True, capture_output=True)
    predicted = json.loads(planned.stdout)
    measured = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert measured["host_peak_bytes"] > 1.25 * predicted["host_base_bytes"], "else any guess would do"
    assert predicted["host_peak_bytes"] == pytest.approx(measured["host_peak_bytes"], rel=0.25)
