"""Families whose blocks are called in ways of their own, pruned end to end: carried, left dense or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import thanos
from helpers import VOCABULARY, tiny_tokenizer
from thanos.cli import run
from thanos.model.layers import find_blocks
from thanos.planning.plan import plan
from whole_models import calibration_ids, compare, prune_modules, recipe

_COMMON = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
_GLM = {
    **_COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "mlp_layer_types": ["dense"] * 4,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # Blocks return a pair, whose second value nobody reads.
    "bamba": ("BambaConfig", {**_COMMON, **_MAMBA, "attn_layer_indices": [1]}),
    # ... and is handed to the next block, which reads it only if it has no indexer of its own.
    "glm-dsa, all full": ("GlmMoeDsaConfig", {**_GLM, "indexer_types": ["full"] * 4}),
    "glm-dsa, shared": ("GlmMoeDsaConfig", {**_GLM, "indexer_types": ["full", "full", "shared", "shared"]}),
    # Text alone does not reach the layers that attend to an image.
    "mllama": (
        "MllamaConfig",
        {
            "text_config": {
                **_COMMON,
                "cross_attention_layers": [1, 3],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
    ),
    "zamba2": (
        "Zamba2Config",
        {
            **_COMMON,
            "num_key_value_heads": 4,
            "n_mamba_heads": 4,
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        },
    ),
    "gemma-3n": (
        "Gemma3nTextConfig",
        {
            **_COMMON,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "laurel_rank": 8,
        },
    ),
    # The output embedding comes first, and gives the input embedding that it is tied to its name.
    "camembert": (
        "CamembertConfig",
        {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"} | {"is_decoder": True},
    ),
    "mamba": (
        "MambaConfig",
        {key: _COMMON[key] for key in ("vocab_size", "hidden_size", "pad_token_id", "bos_token_id", "eos_token_id")}
        | {"num_hidden_layers": 3, "state_size": 8, "time_step_rank": 4},
    ),
}

# Models whose tower for images holds more linear weights than the text model.
_PLAIN = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"} | {"num_hidden_layers": 2}
_TEXT = _PLAIN | {"num_key_value_heads": 2}
_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_HEARING = {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2, "input_size": 16}
TOWERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma-3": (
        "Gemma3Config",
        {"text_config": {**_TEXT, "head_dim": 8}, "vision_config": _TOWER, "mm_tokens_per_image": 4},
        "model.language_model.layers",
    ),
    "git": ("GitConfig", {**_PLAIN, "vision_config": _TOWER}, "git.encoder.layer"),
    "got-ocr2": (
        "GotOcr2Config",
        {
            "text_config": _TEXT,
            "vision_config": {**_TOWER, "output_channels": 32, "image_size": 64, "patch_size": 16, "mlp_dim": 256}
            | {"global_attn_indexes": [1]},
        },
        "model.language_model.layers",
    ),
    # The tower is a part of the decoder.
    "phi-4-multimodal": (
        "Phi4MultimodalConfig",
        {
            **_TEXT,
            "vision_config": {**_TOWER, "crop_size": 16},
            "audio_config": {**_HEARING, "ext_pw_out_channel": 16, "nemo_conv_channels": 16},
        },
        "model.layers",
    ),
}
CONFIGS |= {family: (name, values) for family, (name, values, _) in TOWERS.items()}


def save(folder: Path, family: str) -> Path:
    name, values = CONFIGS[family]
    config = getattr(transformers, name)(**values)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    config.save_pretrained(folder)  # of the whole model, where text is a part of it
    tiny_tokenizer().save_pretrained(folder)
    return folder


def reference(folder: Path, text: Path, **how: Any) -> dict[str, torch.Tensor]:
    """Prune what the whole model calls, block by block with hooks; return the weights of its blocks' linear layers."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prefix, _ = find_blocks(model)
    done = {}
    for index, block in enumerate(model.get_submodule(prefix)):
        linear = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        called: set[str] = set()
        handles = [m.register_forward_pre_hook(lambda *_, n=n, called=called: called.add(n)) for n, m in linear.items()]
        with torch.inference_mode():
            model(input_ids=calibration_ids(folder, text), use_cache=False)
        for handle in handles:
            handle.remove()
        modules: dict[str, nn.Module] = {f"{prefix}.{index}.{n}": linear[n] for n in linear if n in called}
        prune_modules(model, modules, calibration_ids(folder, text), stored, None, **how)
        done |= {f"{name}.weight": stored[f"{name}.weight"] for name in modules}
    return done


HOW = {"method": "thanos", "pattern": "unstructured", "sparsity": 0.5}


@pytest.mark.parametrize("family", ["bamba", "glm-dsa, all full", "mllama", "camembert"])
def test_what_can_be_carried_equals_a_slow_run_of_the_whole_model(family: str, text_file: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "dense", family)
    report = thanos.prune(folder, tmp_path / "out", recipe(text_file, **HOW))
    expected = reference(folder, text_file, **HOW)
    assert {f"{layer.name}.weight" for layer in report.layers} == expected.keys()
    compare(load_file(tmp_path / "out/model.safetensors"), expected)
    pruned, dense = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "out", folder))
    assert pruned.keys() == dense.keys()
    for name in dense.keys() - expected.keys():
        assert torch.equal(pruned[name], dense[name]), name


@pytest.mark.parametrize("family", TOWERS)
def test_the_text_model_is_pruned_where_another_tower_is_larger(family: str, text_file: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "dense", family)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    size = {False: 0, True: 0}
    prefix = TOWERS[family][2]
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and ".layer" in name:
            size[name.startswith(f"{prefix}.")] += module.weight.numel()
    assert size[False] > size[True], "the case is one"

    report = thanos.prune(folder, tmp_path / "out", recipe(text_file, **HOW))
    expected = reference(folder, text_file, **HOW)
    linear = {name for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    assert {layer.name for layer in report.layers} == {name for name in linear if name.startswith(f"{prefix}.")}
    assert {f"{layer.name}.weight" for layer in report.layers} == expected.keys()
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    compare(pruned, expected)
    for name, tensor in dense.state_dict().items():
        if name not in expected:
            assert torch.equal(pruned[name], tensor), name


def test_a_tied_head_that_comes_first_is_not_pruned(text_file: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "dense", "camembert")
    with pytest.raises(thanos.errors.ModelError, match=r"lm_head.decoder shares its weight with the input embedding"):
        thanos.prune(folder, tmp_path / "out", recipe(text_file, targets=("lm_head.decoder",), **HOW))


def test_blocks_that_text_does_not_reach_stay_dense_for_the_true_reason(text_file: Path, tmp_path: Path) -> None:
    folder, events = save(tmp_path / "dense", "mllama"), []
    report = thanos.prune(folder, tmp_path / "out", recipe(text_file, **HOW), on_event=events.append)
    linear = [r for r in report.dense if ".proj" in r.name or "_proj" in r.name]
    assert {r.name.split("layers.")[1][0] for r in linear} == {"1", "3"}
    assert {r.reason for r in linear} == {"text does not reach its decoder block"}
    assert report.warnings == ["text does not reach blocks 1, 3: 14 layers there stay dense"]
    assert [event.message for event in events if event.kind == "note"] == report.warnings
    assert [event.block for event in events if event.kind == "block"] == [0, 1, 2, 3]
    assert {layer.block for layer in report.layers} == {0, 2}


def test_the_tower_for_images_is_not_said_to_be_unread(text_file: Path, tmp_path: Path) -> None:
    # transformers reads it with the class for images and text.
    folder = save(tmp_path / "dense", "mllama")
    state = load_file(folder / "model.safetensors") | {"vision_model.class_embedding": torch.ones(8)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    report = thanos.prune(folder, tmp_path / "out", recipe(text_file, **HOW))
    (reason,) = (record.reason for record in report.dense if record.name.startswith("vision_model."))
    assert reason == f"no parameter of {report.model['architecture']}"


def test_a_run_over_blocks_that_text_does_not_reach_can_be_resumed(text_file: Path, tmp_path: Path) -> None:
    folder, asked = save(tmp_path / "dense", "mllama"), recipe(text_file, **HOW)
    whole = thanos.prune(folder, tmp_path / "whole", asked)

    def interrupt(event: Any) -> None:
        if event.kind == "phase" and event.phase == "solve" and event.block == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        thanos.prune(folder, tmp_path / "out", asked, on_event=interrupt)
    report = thanos.prune(folder, tmp_path / "out", asked, resume=True)
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [layer.name for layer in report.layers] == [layer.name for layer in whole.layers]


@pytest.mark.parametrize("targets", [(), ("lm_head",)])
def test_a_plan_tries_a_block_that_text_reaches(targets: tuple[str, ...], text_file: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "dense", "mllama")
    found = plan(folder, tmp_path / "out", recipe(text_file, targets=targets, **HOW))
    assert (found.blocks, found.layers) == (4, 1 if targets else 14)


def test_only_layers_that_text_does_not_reach_are_no_layers(text_file: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "dense", "mllama")
    with pytest.raises(thanos.errors.ModelError, match=r"no layer to prune: text does not reach block 1$"):
        thanos.prune(folder, tmp_path / "out", recipe(text_file, targets=("layers.1.*",), **HOW))


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("zamba2", "Zamba2ForCausalLM", "layers.3.shared_transformer.self_attn.q_proj.weight are one parameter"),
        (
            "glm-dsa, shared",
            "GlmMoeDsaForCausalLM",
            "block 2 reads values that another block returns in addition to its hidden states",
        ),
        ("gemma-3n", "Gemma3nForCausalLM", "the first size must be the number of sequences"),
    ],
)
def test_the_rest_is_refused_before_any_work(
    family: str,
    name: str,
    reason: str,
    planned: bool,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = save(tmp_path / "dense", family)
    arguments = ["prune", str(folder), str(tmp_path / "out"), "--calibration", str(text_file), "--samples", "4"]
    arguments += ["--sequence-length", "32", "--device", "cpu", "--quiet", *(["--plan"] if planned else [])]
    assert run(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{name} cannot be pruned block by block: " in line
    assert reason in line
    assert "resume" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("method", ["thanos", "magnitude"])
def test_the_error_of_a_layer_that_was_not_measured_is_unknown(method: str, text_file: Path, tmp_path: Path) -> None:
    # Mamba multiplies by the weight of dt_proj without calling it.
    folder, events = save(tmp_path / "dense", "mamba"), []
    report = thanos.prune(
        folder, tmp_path / "out", recipe(text_file, method=method, sparsity=0.5), on_event=events.append
    )
    unknown = [layer for layer in report.layers if layer.name.endswith("dt_proj")]
    known = [layer for layer in report.layers if not layer.name.endswith("dt_proj")]
    assert len(unknown) == 3
    for layer in unknown:
        assert all("no calibration token reached" not in line for line in layer.warnings), "tokens did"
        assert layer.error_before_compensation is layer.error_after_compensation is None
    errors = [layer.error_after_compensation for layer in known]
    assert all(error is not None and error > 0 for error in errors)
    mean = pytest.approx(sum(error or 0.0 for error in errors) / len(errors))
    assert report.totals["mean_error_after_compensation"] == mean
    assert [event for event in events if event.kind == "block"][-1].error == mean
    values = json.loads((tmp_path / "out/pruning.json").read_text())
    assert [v["error_after_compensation"] for v in values["layers"] if v["name"].endswith("dt_proj")] == [None] * 3
    log = map(json.loads, (tmp_path / "out/events.jsonl").read_text().splitlines())
    assert all("error" not in event for event in log if event.get("layer", "").endswith("dt_proj"))
