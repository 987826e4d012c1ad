"""``thanos.recover`` from a folder to a folder: the training, the zeros, the guard, and what is written."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import thanos
from helpers import save_tiny
from recovering import VARIED, prune, read, settings, vary
from thanos.calibration.making import make_calibration
from thanos.checkpoint.reader import SafetensorsCheckpoint
from thanos.model.source import resolve_model
from thanos.recovery.distance import Distillation
from thanos.recovery.rate import one_cycle

pytest.importorskip("accelerate", reason="the extra recover is not installed")


def zeros(folder: Path) -> dict[str, Tensor]:
    return {name: tensor == 0 for name, tensor in read(folder).items() if name.endswith("_proj.weight")}


# --- the training -------------------------------------------------------------------------------------------------------


def reference_training(pruned: Path, dense: Path, recipe: thanos.RecoveryRecipe) -> dict[int, dict[str, Tensor]]:
    """The training written out: all logits at once, plain AdamW, and the mask applied by hand. Step → weights."""
    student: Any = AutoModelForCausalLM.from_pretrained(pruned).eval()
    teacher = AutoModelForCausalLM.from_pretrained(dense).eval().requires_grad_(False)
    calibration = make_calibration(resolve_model(dense), recipe.text, torch.device("cpu"), lambda event: None)
    masks = {name: p.detach() != 0 for name, p in student.named_parameters() if name.endswith("_proj.weight")}
    m = {name: torch.zeros_like(p) for name, p in student.named_parameters()}
    v = {name: torch.zeros_like(p) for name, p in student.named_parameters()}
    states: dict[int, dict[str, Tensor]] = {}
    step, batch = 0, recipe.batch
    count = (recipe.samples - max(1, recipe.samples // 16)) // batch * batch
    for epoch in range(recipe.epochs):
        draw = torch.Generator().manual_seed(1_000_003 * recipe.seed + epoch)
        order, ids = torch.randperm(count, generator=draw), calibration.ids[:count]
        if recipe.vary:
            ids = torch.tensor(vary(ids.tolist(), calibration.bos_ids, draw))
        for first in range(0, count, batch):
            rows = ids[order[first : first + batch]]
            q = student(input_ids=rows).logits.log_softmax(-1)
            p = teacher(input_ids=rows).logits.log_softmax(-1)
            loss = (p.exp() * (p - q)).sum(-1).mean()
            student.zero_grad()
            loss.backward()
            others = 1.0 if recipe.train == "all" else 0.0
            gradients = {n: w.grad * masks.get(n, others) for n, w in student.named_parameters()}
            norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
            rate = float(recipe.rate) * one_cycle(step, recipe.epochs * count // batch)
            step += 1
            with torch.no_grad():
                for name, weight in student.named_parameters():
                    g = gradients[name] * min(1.0, 1.0 / norm)
                    m[name] = 0.9 * m[name] + 0.1 * g
                    v[name] = 0.95 * v[name] + 0.05 * g**2
                    weight -= rate * (m[name] / (1 - 0.9**step)) / ((v[name] / (1 - 0.95**step)).sqrt() + 1e-8)
        states[step] = {name: p.detach().clone() for name, p in student.named_parameters()}
    return states


@pytest.mark.parametrize(("run", "changes"), [("recovered", {}), ("varied", VARIED)], ids=["recovered", "varied"])
def test_the_weights_are_those_of_a_training_written_out(
    run: str,
    changes: dict[str, Any],
    request: pytest.FixtureRequest,
    pruned: Path,
    tiny_llama: Path,
    text_file: Path,
) -> None:
    out, report = request.getfixturevalue(run)
    assert report.best_step > 0
    expected = reference_training(pruned, tiny_llama, settings(text_file, **changes))[report.best_step]
    found, before = read(out), read(pruned)
    for name, weight in expected.items():
        moved = (weight - before[name]).abs().max()
        if changes and not name.endswith("_proj.weight"):
            assert torch.equal(found[name], before[name]), name
            continue
        assert moved > 0, name
        # AdamW divides by the gradient's size, so rounding of a small gradient is not small.
        assert (found[name] - weight).abs().mean() < 2e-3 * moved, name


def test_the_schedule_is_torchs_one_cycle() -> None:
    for steps in (10, 37, 320):
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=steps, cycle_momentum=False)
        for step in range(steps):
            assert one_cycle(step, steps) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), (step, steps)
            optimizer.step()
            if step < steps - 1:
                schedule.step()
    assert all(0 < one_cycle(step, steps) <= 1 for steps in range(1, 6) for step in range(steps + 1))


@pytest.mark.parametrize("size", [2, 4])
def test_micro_batches_change_nothing_but_rounding(
    size: int, recovered: tuple[Path, Any], pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    other = thanos.recover(pruned, tmp_path / "o", dense=tiny_llama, recipe=settings(text_file, micro_batch=size))
    for entry, plain in zip(other.history, recovered[1].history, strict=True):
        assert entry["held_out"] == pytest.approx(plain["held_out"], rel=1e-3)
        assert entry["loss"] is plain["loss"] is None or entry["loss"] == pytest.approx(plain["loss"], rel=1e-3)


def test_the_held_out_loss_is_that_of_the_written_model(
    recovered: tuple[Path, thanos.RecoveryReport], pruned: Path, tiny_llama: Path, text_file: Path
) -> None:
    """Measured again with the loaded folders, on the sequences that the report says were not trained on."""
    out, report = recovered
    recipe = settings(text_file)
    ids = make_calibration(resolve_model(tiny_llama), recipe.text, torch.device("cpu"), lambda event: None).ids
    assert report.sequences == {"trained": 8, "held_out": 2}  # whole batches only
    teacher = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for folder, expected in ((pruned, report.held_out_before), (out, report.held_out_after)):
        with torch.no_grad():
            loss = Distillation(AutoModelForCausalLM.from_pretrained(folder), teacher)(ids[8:])
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert report.held_out_after == min(entry["held_out"] for entry in report.history) < report.held_out_before


# --- the zeros ----------------------------------------------------------------------------------------------------------


def test_zeros_stay_zeros_after_every_step(
    pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thanos.recovery.watch import Watch

    fixed, checked, original = zeros(pruned), [], Watch.on_step_end

    def check(self: Any, *args: Any, **kwargs: Any) -> None:
        weights = dict(self.trainer.model.named_parameters())
        for name, zero in fixed.items():
            assert torch.equal(weights[f"student.{name}"] == 0, zero), name
        checked.append(1)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Watch, "on_step_end", check)
    thanos.recover(pruned, tmp_path / "o", dense=tiny_llama, recipe=settings(text_file))
    assert len(checked) == 6


@pytest.mark.parametrize(
    "how",
    [{"pattern": "2:4"}, {"pattern": "columns", "outlier_rows": 0.1}, {"method": "wanda", "sparsity": 0.7}],
    ids=lambda how: next(iter(how.values())),
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_zeros_and_files_in_each_pattern_and_dtype(
    how: dict[str, Any], dtype: torch.dtype, text_file: Path, tmp_path: Path
) -> None:
    dense = save_tiny(tmp_path / "dense", dtype=dtype, max_shard_size="40KB")
    pruned = prune(dense, tmp_path / "out", text_file, **how)
    report = thanos.recover(pruned, tmp_path / "out2", dense=dense, recipe=settings(text_file))
    assert report.best_step > 0
    before, after = SafetensorsCheckpoint(pruned).layout, SafetensorsCheckpoint(tmp_path / "out2").layout
    assert before == after  # the same shards, headers and offsets
    found = zeros(tmp_path / "out2")
    for name, zero in zeros(pruned).items():
        assert not (zero & ~found[name]).any(), name
        assert (found[name] & ~zero).sum() <= 2, name  # a trained weight may round to zero
    assert report.zeros == sum(int(zero.sum()) for zero in found.values())
    required = how.get("pattern")
    if required == "2:4":
        assert not thanos.inspect_checkpoint(tmp_path / "out2", require=required).violations


@pytest.mark.parametrize("architecture", ["gpt-2", "opt-350m", "tinyllama", "gemma-2", "qwen3-moe"])
def test_architectures(architecture: str, text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", architecture)
    pruned = prune(dense, tmp_path / "out", text_file)
    report = thanos.recover(pruned, tmp_path / "out2", dense=dense, recipe=settings(text_file))
    assert report.held_out_after < report.held_out_before
    before, after = read(pruned), read(tmp_path / "out2")
    assert before.keys() == after.keys()
    assert report.zeros == sum(layer.zeros for layer in thanos.PruningReport.read(pruned / "pruning.json").layers)
    both: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out2", output_loading_info=True)
    loaded, info = both
    assert not any(info.values())
    assert loaded is not None


def test_a_checkpoint_that_another_tool_pruned(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Only the zeros say what was pruned; lm_head has some too."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "out"))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight") or name == "lm_head.weight":
            tensor[tensor.abs() < tensor.abs().median()] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text("# theirs\n")
    report = thanos.recover(folder, tmp_path / "out2", dense=tiny_llama, recipe=settings(text_file))
    after = read(tmp_path / "out2")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight") or name == "lm_head.weight":
            assert torch.equal(after[name] == 0, tensor == 0), name
    assert report.masked_layers == 22
    card = (tmp_path / "out2" / "README.md").read_text()
    assert card.startswith("# theirs\n\n## Recovery\n\n")
    assert not (tmp_path / "out2" / "pruning.json").exists()


# --- the guard ----------------------------------------------------------------------------------------------------------


def test_where_nothing_is_better_the_weights_stay_and_it_is_said(
    pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    notes: list[str] = []

    def watch(event: thanos.Event) -> None:
        if event.kind == "note":
            notes.append(event.message)

    out = tmp_path / "out2"
    report = thanos.recover(pruned, out, dense=tiny_llama, recipe=settings(text_file, rate=0.9), on_event=watch)
    assert report.best_step == 0
    assert report.held_out_after == report.held_out_before
    assert (out / "model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()
    assert "no epoch lowered the held-out loss: the original weights are written" in notes
    assert "No epoch was better on 2 × 32 held-out tokens" in (out / "README.md").read_text()
    before, after = (json.loads((folder / "pruning.json").read_bytes()) for folder in (pruned, out))
    assert after.pop("recovery") == report.to_dict()
    assert before == after


@pytest.mark.parametrize("step", [1, 5])
def test_a_loss_that_is_not_a_number_ends_the_training_and_keeps_what_was_before(
    step: int, recovered: Any, pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    calls, original = [], Distillation.forward

    def forward(self: Distillation, *args: Tensor) -> Tensor:
        loss = original(self, *args)
        if torch.is_grad_enabled():
            calls.append(1)
            loss = loss * math.nan if len(calls) == 4 * step - 1 else loss
        return loss

    monkeypatch.setattr(Distillation, "forward", forward)
    out = tmp_path / "out2"
    report = thanos.recover(pruned, out, dense=tiny_llama, recipe=settings(text_file))
    assert report.ended == f"the loss of step {step} is NaN or infinite"
    assert report.history == recovered[1].history[: 1 + (step - 1) // 2]
    assert report.best_step == (0 if step == 1 else 4)
    assert report.warnings == [f"{report.ended}: the training ended early"]
    assert all(torch.isfinite(tensor).all() for tensor in read(out).values())
    if step == 1:
        assert (out / "model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()


# --- the folder ---------------------------------------------------------------------------------------------------------


def test_the_folder_and_its_reports(recovered: tuple[Path, thanos.RecoveryReport], pruned: Path) -> None:
    out, report = recovered
    assert {path.name for path in out.iterdir()} == {path.name for path in pruned.iterdir()} | {"recovery.json"}
    assert [path.name for path in out.parent.iterdir()] == ["out2"]
    for name in ("config.json", "tokenizer.json", "recipe.toml", "generation_config.json"):
        assert (out / name).read_bytes() == (pruned / name).read_bytes(), name
    stored = json.loads((out / "recovery.json").read_bytes())
    assert stored == report.to_dict()
    assert thanos.RecoveryReport.from_dict(stored) == report
    pruning = thanos.PruningReport.read(out / "pruning.json")
    assert pruning.recovery == report.to_dict()
    tensors = read(out)
    for layer in pruning.layers:
        assert layer.changed_by == ["recovery"]
        assert layer.zeros == int((tensors[f"{layer.name}.weight"] == 0).sum())
    assert pruning.totals["zeros_all"] == sum(int((tensor == 0).sum()) for tensor in tensors.values())
    card = (out / "README.md").read_text()
    assert "without retraining" not in card
    assert (
        f"the KL divergence fell from {report.held_out_before:.4f} to {report.held_out_after:.4f} nats a token" in card
    )


def test_no_folder_of_this_machine_is_named(recovered: tuple[Path, Any], text_file: Path) -> None:
    out, _ = recovered
    for name in ("recovery.json", "README.md", "run.json"):
        assert str(text_file.parent) not in (out / name).read_text(), name
        assert str(out.parent.parent) not in (out / name).read_text(), name


def test_the_global_random_state_stays(pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    import random

    import numpy

    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    thanos.recover(pruned, tmp_path / "o", dense=tiny_llama, recipe=settings(text_file, epochs=1))
    assert random.getstate() == before[0]
    assert numpy.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[2])
