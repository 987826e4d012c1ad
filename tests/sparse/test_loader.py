"""Packed models in transformers."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import thanos
from helpers import windows
from sparse_matrices import save_pruned, sparse_weight
from thanos.errors import ModelError, UserError
from thanos.export.pack import pack
from thanos.export.unpack import unpack
from thanos.sparse import loader, packed_modules
from thanos.sparse.modules import DenseLinear
from thanos.system import library_warnings


@pytest.fixture
def stay_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.UNPACK, "never")


def load(folder: Path, **arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **arguments).eval()


def both(tmp_path: Path, architecture: str = "llama", **changes: Any) -> tuple[Path, Path]:
    source = save_pruned(tmp_path / "model", architecture, **changes)
    pack(source, tmp_path / "packed", least_weights=1)
    return source, tmp_path / "packed"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(windows(2, 17)).logits


@pytest.mark.usefixtures("stay_packed")
@pytest.mark.parametrize("architecture", ["llama", "tinyllama", "opt-350m", "qwen2", "gemma-2", "gpt-neox", "mixtral"])
def test_a_packed_model_computes_what_the_dense_one_does(architecture, tmp_path):
    source, packed = both(tmp_path, architecture)
    dense, model = load(source), load(packed)
    layers = packed_modules(model)
    assert len(layers) == len(json.loads((packed / "config.json").read_text())["quantization_config"]["layers"])
    for name, layer in layers.items():
        assert torch.equal(layer.weight, dense.get_submodule(name).weight)
    assert torch.allclose(logits(model).float(), logits(dense).float(), atol=0.05)
    ids = windows(1, 9)
    tokens = [m.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (model, dense)]
    assert torch.equal(*tokens)


@pytest.mark.usefixtures("stay_packed")
def test_a_loaded_model_is_saved_packed_and_can_be_unpacked(tmp_path):
    source, packed = both(tmp_path, "opt-350m")
    model = load(packed)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert packed_modules(again).keys() == packed_modules(model).keys()
    assert torch.equal(logits(again), logits(model))
    unpack(tmp_path / "saved", tmp_path / "dense")
    assert torch.equal(logits(load(tmp_path / "dense")), logits(load(source)))


@pytest.mark.usefixtures("stay_packed")
def test_a_device_map_places_packed_layers(tmp_path):
    pytest.importorskip("accelerate")
    _, packed = both(tmp_path)
    model = load(packed, device_map="cpu")
    assert packed_modules(model)
    assert torch.equal(logits(model), logits(load(packed)))


@pytest.mark.usefixtures("stay_packed")
def test_layers_that_are_offloaded_are_refused(tmp_path):
    pytest.importorskip("accelerate")
    _, packed = both(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": "cpu" if index else "disk" for index in range(3)}
    with pytest.raises(ModelError, match="would be offloaded"):
        load(packed, device_map=places, offload_folder=tmp_path / "offload")


@pytest.mark.usefixtures("stay_packed")
def test_layers_that_processes_would_divide_are_refused(tmp_path, monkeypatch):
    _, packed = both(tmp_path)
    monkeypatch.setattr("transformers.PreTrainedModel._tp_size", 2)  # as tp_plan sets it
    with pytest.raises(ModelError, match="cannot be divided among processes"):
        load(packed)


@pytest.mark.usefixtures("stay_packed")
@pytest.mark.parametrize("every", [False, True])
def test_layers_that_somebody_made_dense_are_saved_dense(tmp_path, every):
    _, packed = both(tmp_path)
    model = load(packed)
    for name, layer in packed_modules(model).items():
        if every or name.endswith("up_proj"):
            model.set_submodule(name, layer.dense())
    kept = packed_modules(model).keys()
    assert bool(kept) != every
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert packed_modules(again).keys() == kept
    assert torch.equal(logits(again), logits(model))


@pytest.mark.usefixtures("stay_packed")
@pytest.mark.parametrize("head", [False, True])
def test_the_base_model_keeps_its_layers_packed(tmp_path, head):
    source, packed = both(tmp_path)
    if head:  # packed too
        tensors = load_file(source / "model.safetensors")
        tensors["lm_head.weight"] = sparse_weight(*tensors["lm_head.weight"].shape)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        packed = tmp_path / "with_head"
        pack(source, packed, least_weights=1)
    whole, base = load(packed), AutoModel.from_pretrained(packed, dtype="auto")
    assert len(packed_modules(base)) == len(packed_modules(whole)) - head
    base.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved", dtype="auto")
    with torch.no_grad():
        expected = whole.model(windows(1, 5)).last_hidden_state
        assert all(torch.equal(one(windows(1, 5)).last_hidden_state, expected) for one in (base, again))


@pytest.mark.usefixtures("stay_packed")
def test_dequantize_gives_the_dense_model(tmp_path):
    source, packed = both(tmp_path)
    model = load(packed).dequantize()
    assert not packed_modules(model)
    assert torch.equal(logits(model), logits(load(source)))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(load(source)))


@pytest.mark.usefixtures("stay_packed")
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_has_the_kernel_for_dense_layers_until_the_model_is_unpacked(tied, tmp_path):
    _, packed = both(tmp_path, tie_word_embeddings=tied)
    model = load(packed)
    assert type(model.lm_head) is DenseLinear
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert not any(isinstance(module, DenseLinear) for module in model.dequantize().modules())


@pytest.mark.usefixtures("stay_packed")
def test_gradients_go_through_packed_layers(tmp_path):
    """As under an adapter, or where the embedding is trained; on every path through a block."""
    source, packed = both(tmp_path, "qwen2")
    found = []
    for folder in (source, packed):
        model = load(folder)
        model(windows(2, 9), labels=windows(2, 9)).loss.backward()
        found.append(
            {name: one.grad.float() for name, one in model.named_parameters() if "norm" in name or "embed" in name}
        )
    assert all(
        torch.allclose(found[1][name], grad, rtol=0.05, atol=0.05 * grad.abs().max()) for name, grad in found[0].items()
    )


@pytest.mark.usefixtures("stay_packed")
def test_dequantize_takes_a_dtype_and_works_after_saving(tmp_path):
    source, packed = both(tmp_path)
    model = load(packed)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(model.dequantize()), logits(load(source)))
    wide = load(packed).dequantize(torch.float32)
    assert torch.equal(logits(wide), logits(load(source).float()))


def test_a_device_without_a_kernel_gets_a_dense_model_and_one_message(tmp_path, monkeypatch):
    source, packed = both(tmp_path)
    monkeypatch.setattr(loader, "lacking", lambda device: "it is of another age")
    monkeypatch.setattr(library_warnings, "_SAID", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        models = [AutoModelForCausalLM.from_pretrained(packed, dtype="auto") for _ in range(2)]
    said = [str(one.message) for one in caught if "another age" in str(one.message)]
    assert said == ["21 packed layers were turned into dense ones: it is of another age"]
    for model in models:
        assert not packed_modules(model)
        assert torch.equal(logits(model), logits(load(source)))
    models[0].save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "saved")), logits(load(source)))


def test_the_environment_chooses_and_is_checked(tmp_path, monkeypatch):
    _, packed = both(tmp_path)
    monkeypatch.setenv(loader.UNPACK, "always")
    assert not packed_modules(load(packed))
    monkeypatch.setenv(loader.UNPACK, "sometimes")
    with pytest.raises(UserError, match="'sometimes'; set it to auto, always or never"):
        load(packed)


@pytest.mark.usefixtures("stay_packed")
def test_another_dtype_is_named_and_not_taken(tmp_path):
    _, packed = both(tmp_path)
    with pytest.warns(library_warnings.ThanosWarning, match=r"runs in torch\.bfloat16, not in torch\.float32"):
        model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    assert model.dtype == torch.bfloat16


@pytest.mark.usefixtures("stay_packed")
def test_a_config_of_another_model_is_refused(tmp_path):
    _, packed = both(tmp_path)
    for layer, words in (
        ("model.norm", "RMSNorm"),
        ("model.absent", "no such layer"),
        ("absent", "no such"),
        ("model.layers.0", "Layer"),
    ):
        config = json.loads((packed / "config.json").read_text())
        entries = config["quantization_config"]["layers"]
        entries[layer] = entries.pop("model.layers.0.mlp.up_proj")
        folder = shutil.copytree(packed, tmp_path / layer)
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=words) as caught:
            load(folder)
        assert str(caught.value).isprintable()


def test_evaluate_reads_packed_models_and_others_say_what_to_do(tmp_path, text_file, monkeypatch):
    source, packed = both(tmp_path)
    settings: dict[str, Any] = {"text": str(text_file), "sequence_length": 32, "max_windows": 4, "device": "cpu"}
    expected = thanos.evaluate(source, **settings)
    monkeypatch.setenv(loader.UNPACK, "never")
    got = thanos.evaluate(packed, dense=str(source), **settings)
    assert got.perplexity == pytest.approx(expected.perplexity, rel=0.01)
    assert got.kl_divergence == pytest.approx(0, abs=1e-3)
    out = tmp_path / "o"
    for refused in (thanos.inspect_checkpoint, lambda m: thanos.prune(m, out), lambda m: thanos.plan(m, out)):
        with pytest.raises(ModelError, match="is packed; give the unpacked one: thanos unpack"):
            refused(packed)


def on_devices(model: Any) -> set[torch.device]:
    return {layer.weight_words.device for layer in packed_modules(model).values()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", ["llama", "tinyllama", "qwen2", "opt-350m"])
def test_a_model_on_a_device_stays_packed_and_gives_the_tokens_of_the_dense_one(architecture, tmp_path):
    source, packed = both(tmp_path, architecture)
    dense, model = load(source, device_map="cuda:0"), load(packed, device_map="cuda:0")
    assert on_devices(model) == {torch.device("cuda", 0)}
    ids = windows(2, 17).to("cuda")
    with torch.no_grad():
        assert torch.allclose(model(ids).logits.float(), dense(ids).logits.float(), atol=0.05)
        assert torch.allclose(model(ids[:1, :5]).logits.float(), dense(ids[:1, :5]).logits.float(), atol=0.05)
    unpacked = load(packed, device_map="cuda:0").dequantize()
    assert torch.equal(unpacked(ids).logits, dense(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", device_map="cuda:0")(ids).logits, model(ids).logits)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_map_spreads_packed_layers_over_devices(tmp_path):
    source, packed = both(tmp_path)
    places = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    places |= {f"model.layers.{index}": min(index, 1) for index in range(3)}
    dense, model = load(source, device_map=places), load(packed, device_map=places)
    assert on_devices(model) == {torch.device("cuda", 0), torch.device("cuda", 1)}
    ids = windows(2, 17).to("cuda:0")
    with torch.no_grad():
        assert torch.allclose(model(ids).logits.float().cpu(), dense(ids).logits.float().cpu(), atol=0.05)


def test_every_launch_of_the_table_and_of_the_rules_is_possible():
    from thanos.sparse.kernels.tuned import FEW, MANY, device_settings, launch_for

    for family, most in ((FEW, 16), (MANY, 8)):
        for device in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "another"):
            assert device_settings(device).most_tokens >= 16
            for n in (0, 1, 16, 31):
                for strips, across in ((1, 1), (32, 128), (128, 448), (896, 128), (256, 896)):
                    launch = launch_for(device, family, n, 18, strips, across)
                    assert launch.flight in (1, 2, 4)
                    assert launch.splits in (1, 2, 4, 8)
                    assert 1 <= launch.warps <= most
