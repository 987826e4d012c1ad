"""Mixtures of experts against a slow run of transformers' own fused modules.

The reference collects each expert's tokens by the router's choice, one by one, computes the inner activations from the dense
matrices, sums XᵀX in float64 and prunes every matrix with ``prune_weight`` as the plain linear layer that it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import thanos
from helpers import MIXTURES, packed_windows, save_tiny, tiny_config, tiny_model, tiny_tokenizer, windows
from thanos.calibration import statistics
from thanos.cli import main
from thanos.errors import ModelError
from thanos.evaluation.inspect import inspect_checkpoint
from thanos.model.experts import rename_expert
from thanos.model.layers import linear_layers
from thanos.model.meta_model import build_meta_model
from thanos.model.opening import open_model
from thanos.model.source import resolve_model

SAMPLES, LENGTH = 4, 32

_MIXTRAL_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def key(architecture: str, block: int, expert: int, kind: str) -> str:
    """The name of an expert's matrix in checkpoints on the hub, as published."""
    if architecture == "mixtral":
        return f"model.layers.{block}.block_sparse_moe.experts.{expert}.{_MIXTRAL_NAMES[kind]}.weight"
    return f"model.layers.{block}.mlp.experts.{expert}.{kind}.weight"


def recipe(text: Path, **changes: Any) -> thanos.Recipe:
    return thanos.Recipe(
        **{"calibration": str(text), "samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu"} | changes
    )


def calibration_ids(folder: Path, text: Path) -> Tensor:
    return packed_windows(AutoTokenizer.from_pretrained(folder), text.read_text(), SAMPLES, LENGTH)


def see_inputs(model: Any, block: nn.Module, ids: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Run the whole model; return Σ xxᵀ of the block's linear layers, and what its experts were called with."""
    sums: dict[str, Tensor] = {}
    calls: list[tuple[Tensor, Tensor]] = []

    def hook(name: str) -> Any:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            sums[name] = x.T @ x

        return see

    linear = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linear.items()]
    handles.append(block.mlp.experts.register_forward_pre_hook(lambda _, args: calls.append((args[0], args[1]))))
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums, calls[0]


def reference_run(folder: Path, architecture: str, ids: Tensor, **how: Any) -> tuple[Any, dict[str, Any]]:
    """Prune the folder's model slowly; return it, and what ``prune_weight`` gave under the hub's names."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    done: dict[str, Any] = {}
    for index, block in enumerate(model.model.layers):
        sums, (states, choice) = see_inputs(model, block, ids)
        for name, hessian in sums.items():
            if name != "mlp.shared_expert_gate":
                weight = block.get_parameter(f"{name}.weight")
                done[f"model.layers.{index}.{name}.weight"] = pruned = thanos.prune_weight(weight, hessian, **how)
                weight.data.copy_(pruned.weight)
        experts = block.mlp.experts
        for expert in range(len(experts.down_proj)):
            rows = [states[token] for token in range(len(states)) if expert in choice[token].tolist()]
            x = torch.stack(rows).double() if rows else torch.zeros(0, states.shape[1], dtype=torch.float64)
            gate, up = experts.gate_up_proj[expert].detach().double().chunk(2)
            inner = nn.functional.silu(x @ gate.T) * (x @ up.T)
            down = experts.down_proj[expert].detach()
            for kind, weight, inputs in (("gate_proj", gate, x), ("up_proj", up, x), ("down_proj", down, inner)):
                result = thanos.prune_weight(weight.float(), (inputs.T @ inputs).float(), **how)
                done[key(architecture, index, expert, kind)] = result
            gate, up, down = (
                done[key(architecture, index, expert, k)].weight for k in ("gate_proj", "up_proj", "down_proj")
            )
            experts.gate_up_proj.data[expert] = torch.cat((gate, up))
            experts.down_proj.data[expert] = down
    return model, done


def assert_same_model(one: Path, other: Path) -> None:
    states = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("mixtures")
    return {architecture: save_tiny(base / architecture, architecture, begins=False) for architecture in MIXTURES}


HOW = {
    "thanos": {"method": "thanos", "pattern": "unstructured", "sparsity": 0.5, "block_size": 16},
    "thanos-2:4": {"method": "thanos", "pattern": "2:4", "outlier_rows": 0.1},
    "sparsegpt-4:8": {"method": "sparsegpt", "pattern": "4:8"},
    "wanda-columns": {"method": "wanda", "pattern": "columns", "sparsity": 0.3},
}


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_experts_are_pruned_like_linear_layers_on_their_own_tokens(
    architecture: str, how: dict[str, Any], dense: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    folder = dense[architecture]
    report = thanos.prune(folder, tmp_path / "out", recipe(text_file, **how))
    model, expected = reference_run(folder, architecture, calibration_ids(folder, text_file), **how)
    written, original = load_file(tmp_path / "out/model.safetensors"), load_file(folder / "model.safetensors")
    assert report.warnings == [
        line for line in report.warnings if "experts received" in line
    ]  # nothing else: it was streamed

    records = {layer.name: layer for layer in report.layers}
    assert len(records) == len(expected)
    for name, result in expected.items():
        assert torch.equal(written[name] != 0, result.weight != 0), name
        torch.testing.assert_close(
            written[name], result.weight, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
        module = name.removesuffix(".weight").replace("block_sparse_moe", "mlp")
        for kind, short in _MIXTRAL_NAMES.items():
            module = module.replace(f".{short}", f".{kind}")
        record = records[module]
        assert record.method == how["method"]
        assert record.error_before_compensation == pytest.approx(result.error_before_compensation, rel=1e-3)
        assert record.error_after_compensation == pytest.approx(result.error_after_compensation, rel=1e-3)

    assert written.keys() == original.keys()
    for name in written.keys() - expected.keys():  # routers, norms, embeddings
        assert torch.equal(written[name].view(torch.uint8), original[name].view(torch.uint8)), name
    assert any(name.endswith(("gate.weight", "router.weight")) for name in written.keys() - expected.keys())

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = windows(2, 40, seed=5)
    with torch.inference_mode():
        torch.testing.assert_close(reloaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    for block, layer in enumerate(reloaded.model.layers):
        for expert in range(len(layer.mlp.experts.down_proj)):
            stored = [written[key(architecture, block, expert, kind)] for kind in ("gate_proj", "up_proj", "down_proj")]
            assert torch.equal(layer.mlp.experts.gate_up_proj[expert], torch.cat(stored[:2]))
            assert torch.equal(layer.mlp.experts.down_proj[expert], stored[2])


@pytest.mark.parametrize("architecture", MIXTURES)
def test_the_meta_model_computes_what_transformers_computes(architecture: str, dense: dict[str, Path]) -> None:
    opened = open_model(resolve_model(dense[architecture]))
    model = tiny_model(architecture)
    for name in opened.key_of:
        module, _, attribute = name.rpartition(".")
        value = nn.Parameter(opened.checkpoint.read(opened.key_of[name]), requires_grad=False)
        setattr(opened.meta_model.get_submodule(module), attribute, value)
    ids = windows(3, 32, seed=2)
    with torch.inference_mode():
        one, other = opened.meta_model(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_checkpoint_with_fused_tensors_keeps_them_and_gives_the_same_weights(
    architecture: str, dense: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "fused", architecture, begins=False, save_original_format=False)
    before = load_file(folder / "model.safetensors")
    assert before["model.layers.0.mlp.experts.gate_up_proj"].dim() == 3
    report = thanos.prune(folder, tmp_path / "out", recipe(text_file, pattern="2:4"))
    thanos.prune(dense[architecture], tmp_path / "split", recipe(text_file, pattern="2:4"))
    fused, split = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "split"))
    assert {name: tensor.shape for name, tensor in fused.items()} == {n: t.shape for n, t in before.items()}
    for block in range(2):
        for expert in range(len(fused["model.layers.0.mlp.experts.down_proj"])):
            gate, up, down = (split[key(architecture, block, expert, k)] for k in ("gate_proj", "up_proj", "down_proj"))
            assert torch.equal(fused[f"model.layers.{block}.mlp.experts.gate_up_proj"][expert], torch.cat((gate, up)))
            assert torch.equal(fused[f"model.layers.{block}.mlp.experts.down_proj"][expert], down)
    assert report.totals["parameters"] == sum(tensor.numel() for tensor in before.values())
    assert not any("transformers loads it whole" in line for line in report.warnings)
    assert_same_model(*(tmp_path / name for name in ("out", "split")))


def test_names_that_are_not_understood_are_left_to_transformers_with_a_note(
    dense: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "mixed", "mixtral", begins=False)
    file = folder / "model.safetensors"
    # Some names lack the base model's prefix; transformers sorts that out, name by name.
    mixed = {name.removeprefix("model.") if "layers.1." in name else name: t for name, t in load_file(file).items()}
    save_file(mixed, file, metadata={"format": "pt"})
    report = thanos.prune(folder, tmp_path / "out", recipe(text_file, pattern="2:4"))
    thanos.prune(dense["mixtral"], tmp_path / "plain", recipe(text_file, pattern="2:4"))
    assert any("transformers loads it whole" in line for line in report.warnings)
    assert_same_model(*(tmp_path / name for name in ("out", "plain")))


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe"])
def test_16_bit_shards_keep_their_layout(architecture: str, text_file: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense", architecture, dtype=torch.bfloat16, max_shard_size="60KB")
    thanos.prune(folder, tmp_path / "out", recipe(text_file, pattern="2:4"))
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        with safe_open(folder / shard, "pt") as before, safe_open(tmp_path / "out" / shard, "pt") as after:
            assert list(after.keys()) == list(before.keys())
            for name in before.keys():  # noqa: SIM118  it is no dict
                assert after.get_tensor(name).dtype == torch.bfloat16
                if ".experts." in name:
                    assert ((after.get_tensor(name).reshape(-1, 4) != 0).sum(1) <= 2).all(), name
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (folder / index).read_bytes()


# --- few tokens, and none -----------------------------------------------------------------------------------------------


def starve(folder: Path, architecture: str) -> None:
    """Give expert 4 of 5 a router that never chooses it: of two opposite scores one is always above zero."""
    model = tiny_model(architecture, num_experts=5)
    for layer in model.model.layers:
        one, other = layer.mlp.gate.weight.data[:2].clone()
        layer.mlp.gate.weight.data = torch.stack((one, -one, other, -other, torch.zeros_like(one)))
    model.save_pretrained(folder)


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_counted(text_file: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense", "qwen3-moe", num_experts=5)
    starve(folder, "qwen3-moe")
    report = thanos.prune(folder, tmp_path / "out", recipe(text_file, method="thanos", sparsity=0.5))
    starved = [layer for layer in report.layers if ".experts.4." in layer.name]
    assert len(starved) == 6
    written, original = load_file(tmp_path / "out/model.safetensors"), load_file(folder / "model.safetensors")
    for layer in starved:
        assert (layer.method, layer.tokens) == ("magnitude", 0)
        assert layer.error_before_compensation is layer.error_after_compensation is None
        (warning,) = layer.warnings
        assert warning.startswith("calibration saw no input of this layer (no token reached it, ")
        weight, before = written[f"{layer.name}.weight"], original[f"{layer.name}.weight"]
        kept = weight != 0
        assert torch.equal(weight, torch.where(kept, before, 0.0))
        assert before[~kept].abs().max() <= before[kept].abs().min()
        assert int(kept.sum()) == weight.numel() // 2
    assert {layer.method for layer in report.layers if layer not in starved} == {"thanos"}
    assert "2 of 10 experts received no calibration token: pruned by magnitude" in report.warnings
    assert json.loads((tmp_path / "out/pruning.json").read_text())["warnings"] == report.warnings


def test_experts_with_fewer_tokens_than_columns_are_damped_and_counted(
    dense: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    report = thanos.prune(dense["olmoe"], tmp_path / "out", recipe(text_file))
    layers = [layer for layer in report.layers if ".experts." in layer.name]
    assert (
        sum(layer.tokens for layer in layers if layer.name.endswith("up_proj")) == 2 * 2 * SAMPLES * LENGTH
    )  # k = 2, 2 blocks
    few = {layer.name.rpartition(".")[0] for layer in layers if 0 < layer.tokens < layer.shape[1]}
    assert 0 < len(few) < 16
    lines = [line for line in report.warnings if "fewer calibration tokens" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"{len(few)} of 16 experts received")
    for layer in layers:
        warned = any("the Hessian is singular without damping" in line for line in layer.warnings)
        assert warned is (layer.tokens < layer.shape[1])
        assert layer.damping is not None


# --- choosing, memory, inspection -----------------------------------------------------------------------------------------


def test_targets_skip_and_overrides_reach_single_experts(
    dense: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    from thanos.recipe import Override

    how = recipe(
        text_file,
        targets=("experts.*",),
        skip=("experts.3.*", "layers.0.*.down_proj"),
        overrides=(Override(match="experts.2.up_proj", settings={"method": "wanda", "pattern": "2:4"}),),
    )
    report = thanos.prune(dense["mixtral"], tmp_path / "out", how)
    pruned = {layer.name: layer for layer in report.layers}
    assert pruned.keys() == {
        f"model.layers.{block}.mlp.experts.{expert}.{kind}"
        for block in range(2)
        for expert in range(3)
        for kind in ("gate_proj", "up_proj", *(("down_proj",) if block else ()))
    }
    assert {name for name, layer in pruned.items() if layer.method == "wanda"} == {
        f"model.layers.{block}.mlp.experts.2.up_proj" for block in range(2)
    }
    reasons = {record.name: record.reason for record in report.dense}
    assert reasons["model.layers.0.mlp.experts.3.gate_proj.weight"] == "matched by skip"
    assert reasons["model.layers.0.self_attn.q_proj.weight"] == "not matched by targets"


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2-moe"])
def test_many_passes_give_the_bytes_of_one(
    architecture: str, dense: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, many = [], []
    thanos.prune(dense[architecture], tmp_path / "one", recipe(text_file), on_event=one.append)
    monkeypatch.setattr(statistics, "_STATISTICS_BYTES", {"cpu": 20_000})
    thanos.prune(dense[architecture], tmp_path / "many", recipe(text_file), on_event=many.append)

    def passes(events: list[Any]) -> int:
        return sum(event.kind == "phase" and event.phase == "statistics" for event in events)

    assert passes(one) == 2
    assert passes(many) > 4
    files = [tmp_path / name / "model.safetensors" for name in ("one", "many")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("report", [True, False])
@pytest.mark.parametrize("original", [True, False])
def test_inspect_reads_experts(
    architecture: str, report: bool, original: bool, text_file: Path, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "dense", architecture, save_original_format=original)
    out = tmp_path / "out"
    run = thanos.prune(folder, out, recipe(text_file, pattern="2:4", method="magnitude"))
    if not report:
        (out / "pruning.json").unlink()
    found = inspect_checkpoint(out, require="2:4")
    assert found.violations == []
    assert [layer.name for layer in found.layers] == [layer.name for layer in run.layers]
    assert found.totals == {name: run.totals[name] for name in found.totals}
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(out), "--require", "2:4"])
    assert ended.value.code == 0


def test_inspect_names_the_expert_that_breaks_a_pattern(
    dense: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    thanos.prune(dense["mixtral"], out, recipe(text_file, pattern="2:4", method="magnitude"))
    tensors = load_file(out / "model.safetensors")
    tensors[key("mixtral", 1, 2, "up_proj")][3, :4] = 1.0
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    violations = inspect_checkpoint(out, require="2:4").violations
    assert [violation.name for violation in violations] == ["model.layers.1.mlp.experts.2.up_proj"]
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(out), "--require", "2:4"])
    assert ended.value.code == 1


# --- what is refused ------------------------------------------------------------------------------------------------------


def test_a_mixture_of_another_layout_is_refused_with_one_line(text_file: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "num_local_experts": 4}
    config = transformers.GptOssConfig(**sizes, **heads, pad_token_id=0)  # transposed, interleaved, with biases
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")

    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    with pytest.raises(
        thanos.errors.UserError, match=r"layers\.0\.mlp\.experts .*layout that is not supported"
    ) as caught:
        thanos.prune(tmp_path / "moe", tmp_path / "out", recipe(text_file))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_a_convolution_is_no_mixture() -> None:
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.JambaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_experts=1)
    meta_model = build_meta_model(config, torch.float32)
    assert any(parameter.dim() == 3 for parameter in meta_model.parameters())
    assert not any(layer.expert for layer in linear_layers(meta_model))


def test_a_missing_expert_is_named(text_file: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense", "qwen3-moe")
    tensors = load_file(folder / "model.safetensors")
    del tensors[key("qwen3-moe", 1, 2, "up_proj")]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no tensor for model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight"):
        thanos.prune(folder, tmp_path / "out", recipe(text_file))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fused", [True, False])
def test_a_config_that_contradicts_the_experts_is_refused(fused: bool, text_file: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense", "qwen3-moe", save_original_format=not fused)
    config = (folder / "config.json").read_text()
    assert '"moe_intermediate_size": 24' in config
    (folder / "config.json").write_text(config.replace('"moe_intermediate_size": 24', '"moe_intermediate_size": 32'))
    with pytest.raises(ModelError, match=r"mlp\.experts.*config belongs to another checkpoint"):
        thanos.prune(folder, tmp_path / "out", recipe(text_file))
    assert not (tmp_path / "out").exists()


# --- names --------------------------------------------------------------------------------------------------------------


def converters(architecture: str) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(architecture))
    return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightConverter)]


@pytest.mark.parametrize(
    ("architecture", "stored", "name"),
    [
        ("mixtral", "model.layers.3.mlp.experts.12.w1.weight", "model.layers.3.mlp.experts.12.gate_proj.weight"),
        ("mixtral", "model.layers.3.mlp.experts.12.w3.weight", "model.layers.3.mlp.experts.12.up_proj.weight"),
        ("mixtral", "model.layers.3.mlp.experts.12.w2.weight", "model.layers.3.mlp.experts.12.down_proj.weight"),
        ("qwen3-moe", "layers.0.mlp.experts.7.up_proj.weight", "layers.0.mlp.experts.7.up_proj.weight"),
        ("olmoe", "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj"),
        ("mixtral", "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.gate.weight"),
    ],
)
def test_names_of_experts_in_checkpoints_are_translated(architecture: str, stored: str, name: str) -> None:
    assert rename_expert(stored, converters(architecture)) == name


def test_a_conversion_that_changes_numbers_is_not_understood() -> None:
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

    sources = ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"]
    stored = "layers.0.experts.1.up_proj.weight"
    stack = [MergeModulelist(dim=0), Concatenate(dim=1)]
    assert rename_expert(stored, [WeightConverter(sources, "experts.gate_up_proj", list(stack))]) == stored
    for operations in (
        [MergeModulelist(dim=0), Concatenate(dim=2)],
        [*stack, Transpose(1, 2)],
        [MergeModulelist(dim=0)],
    ):
        assert rename_expert(stored, [WeightConverter(sources, "experts.gate_up_proj", operations)]) is None
    assert rename_expert(stored, [WeightConverter(sources, "experts.other", list(stack))]) is None


def test_prose_reaches_every_expert_of_the_other_tests() -> None:
    # The tiny models would prove little if their routers sent all tokens one way.
    for architecture in MIXTURES:
        model = tiny_model(architecture)
        for layer in model.model.layers:
            _, (_, choice) = see_inputs(model, layer, windows(SAMPLES, LENGTH))
            assert len(choice.unique()) == len(layer.mlp.experts.down_proj)
