"""The recovery of a model with smaller sizes than its dense parent: no zeros are needed, and none are made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import thanos
from helpers import save_tiny
from recovering import VARIED, read, settings
from thanos.calibration.making import make_calibration
from thanos.errors import ModelError
from thanos.model.source import resolve_model
from thanos.recovery.distance import Distillation
from thanos.recovery.states import RecoveryFolder

pytest.importorskip("accelerate", reason="the extra recover is not installed")

GONE = 24


def shrink(dense: Path, out: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]) -> Path:
    """Write a plain folder with other tensors and sizes; ``change`` returns the tensors and edits the config."""
    out.mkdir()
    for path in dense.iterdir():
        if path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((dense / "config.json").read_bytes())
    tensors = change(load_file(dense / "model.safetensors"), config)
    (out / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    return out


def fewer_neurons(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    kept = config["intermediate_size"] = config["intermediate_size"] - GONE
    rows = (".mlp.gate_proj.weight", ".mlp.up_proj.weight")
    return {
        name: w[:kept] if name.endswith(rows) else w[:, :kept] if name.endswith(".mlp.down_proj.weight") else w
        for name, w in tensors.items()
    }


def fewer_blocks(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The first block goes, so every other block has another number than in the dense model."""
    config["num_hidden_layers"] -= 1
    moved = {}
    for name, w in tensors.items():
        parts = name.split(".")
        if parts[1] != "layers":
            moved[name] = w
        elif int(parts[2]):
            moved[".".join([*parts[:2], str(int(parts[2]) - 1), *parts[3:]])] = w
    return moved


def fewer_heads(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The last half of the key-value heads goes, with their query heads."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["head_dim"] = config["hidden_size"] // heads
    config |= {"num_attention_heads": heads // 2, "num_key_value_heads": groups // 2}
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    cut: dict[str, Callable[[Tensor], Tensor]] = {
        "q_proj": lambda w: w[:queries],
        "k_proj": lambda w: w[:keys],
        "v_proj": lambda w: w[:keys],
        "o_proj": lambda w: w[:, :queries],
    }
    return {name: cut.get(name.split(".")[-2], lambda w: w)(w) for name, w in tensors.items()}


@pytest.fixture(scope="module")
def child(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shrink(tiny_llama, tmp_path_factory.mktemp("child") / "smaller", fewer_neurons)


@pytest.fixture(scope="module")
def grown(
    child: Path, tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, thanos.RecoveryReport]:
    out = tmp_path_factory.mktemp("grown") / "out2"
    return out, thanos.recover(child, out, dense=tiny_llama, recipe=settings(text_file))


def test_it_is_trained_without_masks_and_keeps_its_sizes(
    grown: tuple[Path, thanos.RecoveryReport], child: Path
) -> None:
    out, report = grown
    assert report.masked_layers == report.zeros == 0
    assert report.best_step > 0
    assert report.held_out_after < report.held_out_before
    before, after = read(child), read(out)
    assert {name: w.shape for name, w in after.items()} == {name: w.shape for name, w in before.items()}
    assert all((after[name] != before[name]).any() for name in before)
    both: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    model, info = both
    assert not any(info.values())
    assert model.config.intermediate_size == before["model.layers.0.mlp.up_proj.weight"].shape[0]
    card = (out / "README.md").read_text()
    assert "the weights were trained, to reproduce" in card
    assert "zeros fixed" not in card


def test_by_default_the_parameters_of_its_blocks_train(
    child: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    report = thanos.recover(child, tmp_path / "out2", dense=tiny_llama, recipe=settings(text_file, **VARIED))
    assert report.train == "blocks"
    assert report.best_step > 0
    before, after = read(child), read(tmp_path / "out2")
    assert all((after[name] != before[name]).any() == (".layers." in name) for name in before)


def test_the_guards_loss_is_that_of_the_written_model(
    grown: tuple[Path, thanos.RecoveryReport], child: Path, tiny_llama: Path, text_file: Path
) -> None:
    out, report = grown
    ids = make_calibration(resolve_model(tiny_llama), settings(text_file).text, torch.device("cpu"), lambda e: None).ids
    teacher = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for folder, expected in ((child, report.held_out_before), (out, report.held_out_after)):
        with torch.no_grad():
            q = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids[8:]).logits.double().log_softmax(-1)
            p = teacher(input_ids=ids[8:]).logits.double().log_softmax(-1)
        assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(expected, rel=1e-5)


def test_its_gradient_is_that_of_a_reference_with_all_logits(child: Path, tiny_llama: Path) -> None:
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(folder).double().eval() for folder in (child, tiny_llama)]
    student, teacher = models
    ids = torch.arange(60).view(3, 20) % 50
    with torch.no_grad():
        p = teacher(input_ids=ids).logits.log_softmax(-1)
    q = student(input_ids=ids).logits.log_softmax(-1)
    (p.exp() * (p - q)).sum(-1).mean().backward()
    wanted = {name: w.grad.clone() for name, w in student.named_parameters()}
    student.zero_grad()
    Distillation(student, teacher, chunk=7)(ids).backward()
    for name, w in student.named_parameters():
        torch.testing.assert_close(w.grad, wanted[name], rtol=1e-5, atol=1e-7, msg=name)


def test_interrupted_and_resumed_equals_uninterrupted(
    grown: tuple[Path, thanos.RecoveryReport], child: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    def stop(event: thanos.Event) -> None:
        if event.kind == "progress" and event.phase == "train" and event.done == 5:
            raise KeyboardInterrupt

    out, recipe = tmp_path / "out2", settings(text_file)
    with pytest.raises(KeyboardInterrupt):
        thanos.recover(child, out, dense=tiny_llama, recipe=recipe, on_event=stop)
    assert RecoveryFolder(out).finished == 4
    thanos.recover(child, out, dense=tiny_llama, recipe=recipe, resume=True)
    assert (out / "model.safetensors").read_bytes() == (grown[0] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("change", [fewer_blocks, fewer_heads])
def test_fewer_blocks_and_fewer_heads(
    change: Callable[..., dict[str, Tensor]], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    child = shrink(tiny_llama, tmp_path / "child", change)
    report = thanos.recover(child, tmp_path / "out2", dense=tiny_llama, recipe=settings(text_file))
    assert report.held_out_after < report.held_out_before
    assert report.masked_layers == 0


def test_zeros_of_a_smaller_model_stay(child: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    def sparse(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
        return {name: w * (w.abs() > w.abs().median()) if "_proj." in name else w for name, w in tensors.items()}

    both = shrink(child, tmp_path / "both", sparse)
    report = thanos.recover(both, tmp_path / "out2", dense=tiny_llama, recipe=settings(text_file))
    after = read(tmp_path / "out2")
    for name, w in read(both).items():
        assert torch.equal(after[name] == 0, w == 0), name
    assert report.zeros > 0
    recipe = settings(text_file, epochs=1, train="auto")
    assert thanos.recover(both, tmp_path / "auto", dense=tiny_llama, recipe=recipe).train == "linear"


def test_what_is_no_child_is_refused(child: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    def refused(model: Path, dense: Path, match: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ModelError, match=match) as caught:
            thanos.recover(model, tmp_path / "out2", dense=dense, recipe=settings(text_file))
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before

    refused(tiny_llama, child, r"mlp\.\w+_proj\.weight has shape \[.*\] in OUT and \[.*\] in the dense model; give")
    refused(child, save_tiny(tmp_path / "other", seed=5), r"their embeddings do not resemble each other \(cosine -?0\.")
    narrow = save_tiny(tmp_path / "narrow", hidden_size=16)
    refused(narrow, tiny_llama, r"embed_tokens\.weight has shape \[.*\] in OUT")
    qwen = save_tiny(tmp_path / "qwen", "qwen3", num_key_value_heads=4)
    refused(child, qwen, r"OUT has no model\.layers\.0\.self_attn\.q_norm\.weight")
