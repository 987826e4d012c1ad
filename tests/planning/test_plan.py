"""A plan says beforehand what a run then takes, and changes nothing."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import thanos
from helpers import save_tiny, tiny_tokenizer
from random_model import write_checkpoint
from thanos.bench.synthetic import Shape
from thanos.cli import run
from thanos.engine import activations, block_runner, tuning_passes
from thanos.engine.stages import tune
from thanos.engine.stages.base import BlockContext
from thanos.errors import UserError
from thanos.events import Event
from thanos.model.source import resolve_model
from thanos.planning import plan as planning
from thanos.planning.kinds import Amount, Job, Kind, Sample
from thanos.recipe import Override, Recipe
from thanos.run import engine_setup, setup

KEYS = [
    "schema", "thanos_version", "recipe", "device", "blocks", "layers", "activations", "activations_bytes", "batch",
    "disk_bytes", "disk_besides_bytes", "disk_free_bytes", "host_peak_bytes", "host_base_bytes", "host_free_bytes",
    "device_peak_bytes", "device_free_bytes", "phases", "seconds", "does_not_fit", "cut",
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
        assert plan.recipe["calibration"] == str(text_file)
        assert plan.recipe | {"calibration": text_file.name} == report.recipe, "OUT names no local folder"

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

    @pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude", "admm"])
    @pytest.mark.parametrize("pattern", ["unstructured", "2:4", "columns"])
    def test_every_method_and_pattern(
        self, method: str, pattern: str, tiny_llama: Path, text_file: Path, tmp_path: Path
    ) -> None:
        planned = thanos.plan(tiny_llama, tmp_path / "out", recipe(text_file, method=method, pattern=pattern))
        assert planned.phases["solve"].seconds > 0


class TestRepair:
    """Settings of the recipe's repair, which need the dense model's hidden states and hold sequences out."""

    @pytest.mark.parametrize("effort", ["high", "max"])
    def test_the_phases_are_those_of_the_run(
        self, effort: str, tiny_llama: Path, text_file: Path, tmp_path: Path, plan: thanos.Plan
    ) -> None:
        asked = recipe(text_file, effort=effort, samples=16)
        planned = thanos.plan(tiny_llama, tmp_path / "out", asked)
        report = thanos.prune(tiny_llama, tmp_path / "out", asked)
        assert set(planned.phases) == set(report.phases)
        # Two buffers more, and in both streams the inputs of o_proj and, twice as wide, of down_proj; four times the sequences.
        assert planned.activations_bytes == (3 + 2 * (1 + 2)) * 4 * plan.activations_bytes

    def test_the_tuning_is_tried_with_one_epoch_on_few_sequences(
        self, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tried: list[tuple[int, int, int]] = []
        original = tune.tune

        def watched(work: Any, **settings: Any) -> Any:
            tried.append((len(work.training), len(work.held_out), settings["epochs"]))
            return original(work, **settings)

        monkeypatch.setattr(tune, "tune", watched)
        monkeypatch.setitem(block_runner.BATCH_TOKENS, "cpu", 64)  # two sequences in a batch
        thanos.plan(tiny_llama, tmp_path / "out", recipe(text_file, effort="max", samples=32))
        assert {epochs for _, _, epochs in tried} == {1}
        assert {held_out for _, held_out, _ in tried} == {1, 2}, "of the run's 4"
        assert 8 == max(training for training, _, _ in tried) < 28, "a whole step of the tuning"

    def test_the_buffers_take_the_tiers_that_have_room(
        self, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: thanos.Plan
    ) -> None:
        monkeypatch.setattr(activations, "free_host_bytes", lambda: 3 * plan.activations_bytes)
        planned = thanos.plan(tiny_llama, tmp_path / "out", recipe(text_file, tune=1))
        assert planned.activations == "host"
        assert planned.activations_bytes == 3 * plan.activations_bytes
        assert planned.disk_besides_bytes - plan.disk_besides_bytes == plan.activations_bytes, (
            "the third is on the disk"
        )

    def test_inputs_of_branches_that_are_freed_before_the_tuning_do_not_count_in_it(
        self, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: thanos.Plan
    ) -> None:
        monkeypatch.setattr(Kind, "peak", lambda *_: (0, 0))  # so that only what is kept of the sequences counts
        asked = recipe(text_file, effort="max", samples=16)
        planned, one = thanos.plan(tiny_llama, tmp_path / "out", asked), 4 * plan.activations_bytes
        peaks = {name: phase.host_peak_bytes - planned.host_base_bytes for name, phase in planned.phases.items()}
        states, branches = 3 * one, 2 * (1 + 2) * one
        assert peaks["statistics"] == peaks["choose"] == peaks["solve"] == states + branches
        assert peaks["tune"] == peaks["propagate"] == states
        assert peaks["finish"] == 0
        tuned_alone = thanos.plan(tiny_llama, tmp_path / "out", asked.replace(effort="fast", tune=1))
        assert tuned_alone.phases["statistics"].host_peak_bytes - tuned_alone.host_base_bytes == states
        untuned = thanos.plan(tiny_llama, tmp_path / "out", asked.replace(effort="high"))
        assert untuned.phases["propagate"].host_peak_bytes - untuned.host_base_bytes == states + branches

    def test_the_tuning_is_tried_with_whole_steps(
        self, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Equal batches of 6 would be tried with 12 sequences, and the run has batches of 8."""
        sizes: list[int] = []
        original = tuning_passes.TuningPasses.gradients

        def watched(self: Any, masters: Any, batch: Any, *further: Any) -> Any:
            sizes.append(len(batch))
            return original(self, masters, batch, *further)

        monkeypatch.setattr(tuning_passes.TuningPasses, "gradients", watched)
        monkeypatch.setitem(
            block_runner.BATCH_TOKENS, "cpu", 16 * 32
        )  # 16 sequences in a batch: 4, and 4 + 8, are tried
        thanos.plan(tiny_llama, tmp_path / "out", recipe(text_file, effort="max", samples=32))
        assert max(sizes) == tuning_passes.BATCH

    def test_inputs_of_branches_are_planned_where_the_run_keeps_them(
        self, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: thanos.Plan
    ) -> None:
        asked, one = recipe(text_file, sequential=True), plan.activations_bytes
        assert thanos.plan(tiny_llama, tmp_path / "out", asked).activations_bytes == (1 + 1 + 2) * one
        assert thanos.plan(tiny_llama, tmp_path / "out", asked, activations="disk").activations_bytes == one
        for free, kept in ((15 * one, 1), (10 * one, 0)):  # the hidden states, then the input of o_proj take a part
            monkeypatch.setattr(activations, "free_host_bytes", lambda free=free: free)
            planned = thanos.plan(tiny_llama, tmp_path / "out", asked)
            assert (planned.activations, planned.activations_bytes) == ("host", (1 + kept) * one)

    def test_the_pass_that_chooses_sparsities_is_a_phase(
        self, tiny_llama: Path, text_file: Path, tmp_path: Path
    ) -> None:
        asked = recipe(text_file, allocation="error")
        planned = thanos.plan(tiny_llama, tmp_path / "out", asked)
        assert set(planned.phases) == {*PHASES, "allocate"}
        assert planned.phases["allocate"].seconds > 0
        assert set(thanos.prune(tiny_llama, tmp_path / "out", asked).phases) == set(planned.phases)


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
        assert "--json needs --plan" in capsys.readouterr().err


class TestWhatIsTried:
    def test_a_stage_that_the_recipe_lists_is_predicted(
        self, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[int | None, int]] = []

        class Extra:
            name = "extra"

            def __call__(self, context: BlockContext) -> Iterator[Event]:
                with context.meter.phase("extra"):
                    for first, hidden in context.batches(1):
                        yield context.progress("extra", first + len(hidden))  # type: ignore[arg-type]
                    seen.append((context.index, context.runner.shape[0]))

        listed = engine_setup.stages_of(recipe(text_file))
        monkeypatch.setattr(engine_setup, "stages_of", lambda _: (*listed, Extra()))
        monkeypatch.setitem(block_runner.BATCH_TOKENS, "cpu", 64)  # two sequences in a batch
        planned = thanos.plan(tiny_llama, tmp_path / "out", recipe(text_file, samples=16))
        assert list(planned.phases)[-1] == "finish"
        assert planned.phases["extra"].seconds > 0
        assert planned.phases["extra"].host_peak_bytes > planned.host_base_bytes
        sizes = {samples for _, samples in seen[2:]}
        assert len(sizes) == 2, "fewer and more sequences"
        assert max(sizes) < 16, "few tokens"

    def test_blocks_are_of_one_kind_if_structure_and_settings_are_the_same(
        self, tiny_llama: Path, text_file: Path
    ) -> None:
        def blocks(*overrides: Override, **settings: Any) -> list[list[int | None]]:
            chosen = recipe(text_file, overrides=overrides, **settings)
            prepared = setup.prepare(resolve_model(tiny_llama), chosen, lambda event: None, look=False)
            job = Job(prepared, chosen, torch.device("cpu"), torch.zeros(1, 1), Path(), "auto")
            return [kind.blocks for kind in job.kinds()]

        assert blocks() == [[0, 1, 2]]
        assert blocks(Override(match="*.0.*", settings={"sparsity": 0.25})) == [[0, 1, 2]]
        assert blocks(Override(match="*.0.*", settings={"method": "wanda"})) == [[0], [1, 2]]
        assert blocks(Override(match="*.1.*down_proj", skip=True)) == [[0, 2], [1]]
        assert blocks(targets=("lm_head", "*")) == [[0, 1, 2], [None]]

    def test_a_mixture_of_experts(self, text_file: Path, tmp_path: Path) -> None:
        model = save_tiny(tmp_path / "model", "mixtral")
        assert thanos.plan(model, tmp_path / "out", recipe(text_file)).phases["solve"].seconds > 0

    @pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="needs a newer transformers")
    def test_blocks_that_read_the_keys_of_earlier_blocks(self, text_file: Path, tmp_path: Path) -> None:
        config = transformers.Gemma4TextConfig(
            vocab_size=512, vocab_size_per_layer_input=512, hidden_size=32, hidden_size_per_layer_input=8,
            intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16, global_head_dim=16,
            num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2,
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        planned = thanos.plan(tmp_path / "model", tmp_path / "out", recipe(text_file))
        assert set(planned.phases) == PHASES

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_a_device(self, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
        asked = recipe(text_file, device="cuda")
        planned = thanos.plan(tiny_llama, tmp_path / "out", asked)
        report = thanos.prune(tiny_llama, tmp_path / "out", asked)
        assert planned.batch == report.execution["batch"]
        assert planned.activations == report.execution["activations"] == "device"
        assert planned.device_peak_bytes is not None
        assert report.device_peak_bytes is not None
        assert planned.device_peak_bytes == pytest.approx(report.device_peak_bytes, rel=0.25)

    def test_text_that_the_model_generates(self, tiny_llama: Path, tmp_path: Path) -> None:
        planned = thanos.plan(tiny_llama, tmp_path / "out", recipe(Path("self")))
        assert planned.phases["calibration"].seconds > 0
        assert list(tmp_path.iterdir()) == []

    def test_a_model_that_generates_counts_whole_where_it_does_not_fit(
        self, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(planning, "free_host_bytes", lambda: 0)
        planned = thanos.plan(tiny_llama, tmp_path / "out", recipe(Path("self")))
        whole = sum(path.stat().st_size for path in tiny_llama.glob("*.safetensors"))
        assert planned.phases["calibration"].host_peak_bytes >= planned.host_base_bytes + 0.9 * whole
        assert "out of memory on the host" in planned.does_not_fit[0]


def sample(sequences: int, batch: int, busy: float, *, slower: float = 1.0, growth: int = 0) -> Sample:
    return Sample(
        Amount(sequences), batch, {"statistics": busy * slower, "solve": 5.0}, {"statistics": busy, "solve": 4.0},
        {"statistics": (growth, 2 * growth)}, frozenset({"statistics"}), 1, 1, [], None,
    )  # fmt: skip


class TestExtrapolation:
    def test_a_cost_that_grows_with_the_sequences(self) -> None:
        kind = Kind([0], [(sample(2, 2, 3.0 + 2 * 0.5), sample(6, 4, 3.0 + 6 * 0.5))])
        assert kind.seconds("statistics", Amount(128)) == pytest.approx(3.0 + 128 * 0.5)
        assert kind.seconds("solve", Amount(128)) == 5.0
        assert kind.seconds("tune", Amount(128)) == 0.0

    def test_other_programs_count_as_in_the_trial(self) -> None:
        pairs = [(sample(2, 2, 4.0, slower=1.5), sample(6, 4, 6.0, slower=2.25))]
        assert Kind([0], pairs).seconds("statistics", Amount(128)) == pytest.approx((3.0 + 128 * 0.5) * 19.5 / 10)

    def test_held_out_sequences_have_a_cost_of_their_own(self) -> None:
        def one(training: int, held_out: int) -> Sample:
            amount, cost = Amount(training, held_out), 3.0 + training * 0.5 + held_out * 2.0
            seconds = {"dense": cost, "choose": 1.0 + held_out * 4.0}
            return Sample(amount, 2, seconds, seconds, {}, frozenset(seconds), 1, 3, [], None)

        kind = Kind([0], [(one(2, 1), one(6, 1), one(2, 2))])
        assert kind.seconds("dense", Amount(112, 16)) == pytest.approx(3.0 + 112 * 0.5 + 16 * 2.0)
        assert kind.seconds("choose", Amount(112, 16)) == pytest.approx(1.0 + 16 * 4.0)

    def test_the_tuning_grows_with_its_passes(self) -> None:
        def one(training: int, held_out: int, epochs: int) -> Sample:
            passes = epochs * (3 * training + 2 * held_out) + held_out + 2 * min(held_out, training)
            seconds = {"tune": 0.25 * passes}
            return Sample(
                Amount(training, held_out, epochs), 2, seconds, seconds, {}, frozenset(seconds), 1, 3, [], None
            )

        whole = one(112, 16, 10)
        for tries in ((one(2, 1, 1), one(8, 1, 1), one(2, 2, 1)), (one(3, 1, 1),)):
            assert Kind([0], [tries]).seconds("tune", whole.amount) == pytest.approx(whole.seconds["tune"])

    @pytest.mark.parametrize(("few", "more", "expected"), [(5.0, 4.0, 4.0), (1.0, 6.0, 128.0)])
    def test_noise_makes_no_part_negative(self, few: float, more: float, expected: float) -> None:
        kind = Kind([0], [(sample(2, 2, few), sample(6, 4, more))])
        assert kind.seconds("statistics", Amount(128)) == pytest.approx(expected)

    def test_blocks_of_a_kind_are_averaged(self) -> None:
        pairs = [(sample(2, 2, 4.0), sample(6, 4, 6.0)), (sample(2, 2, 8.0), sample(6, 4, 12.0))]
        assert Kind([0, 1], pairs).seconds("statistics", Amount(10)) == pytest.approx(4.5 + 0.75 * 10)

    @pytest.mark.parametrize(("batch", "expected"), [(4, 500), (8, 900), (2, 500)])
    def test_memory_grows_with_the_batch(self, batch: int, expected: int) -> None:
        kind = Kind([0], [(sample(2, 2, 1.0, growth=300), sample(6, 4, 1.0, growth=500))])
        assert kind.peak("statistics", batch) == (expected, 2 * expected)

    def test_memory_of_the_tuning_does_not_grow_with_the_batch(self) -> None:
        """The tuning has batches of its own, and the larger of the two samples has a whole one."""

        def one(sequences: int, growth: int) -> Sample:
            return replace(sample(sequences, sequences, 1.0), peaks={"tune": (growth, 2 * growth)})

        some = [replace(one(*each), over_sequences=frozenset({"tune"})) for each in ((2, 300), (4, 500))]
        assert Kind([0], [some]).peak("tune", 16) == (500, 1000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["--targets", "q_proj", "--targets", "down_proj"],
        ["--method", "wanda"],
        ["--targets", "q_proj", "--effort", "max"],
    ],
)
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
