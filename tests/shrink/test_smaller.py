"""A smaller folder computes what the full-size model computes with the same units zeroed or the same blocks skipped.

The oracle (``shrinking``) zeroes columns of transformers' own modules, by names that are written down there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers import ARCHITECTURES, MIXTURES, save_tiny, windows
from shrinking import HEADS, WITH_HEADS, blocks_of, load, others, skip, some, zero_columns, zero_heads, zero_neurons
from thanos.checkpoint.reader import SafetensorsCheckpoint
from thanos.errors import UserError
from thanos.model.layers import find_blocks
from thanos.model.opening import open_model
from thanos.model.source import resolve_model
from thanos.shrink.folder import write_smaller
from thanos.shrink.units import NEURONS, units_of
from thanos.shrink.writer import Cut, SmallerFolder, cuts_of

WIDTH = {
    "gpt-2": "n_inner",
    "qwen2-moe": "moe_intermediate_size",
    "qwen3-moe": "moe_intermediate_size",
} | dict.fromkeys(("opt-125m", "opt-350m", "opt-6.7b"), "ffn_dim")


def assert_equal_logits(smaller: Path, zeroed: Any) -> None:
    ids = windows(2, 40, seed=5)
    with torch.inference_mode():
        found, expected = (model(input_ids=ids).logits for model in (load(smaller), zeroed))
    assert expected.abs().max() > 0.05
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def shrink(model: Any, folder: Path, kept: dict[str, Tensor], **how: Any) -> SmallerFolder:
    """Save the zeroed model with the folder's other files, and write the smaller one beside it."""
    model.save_pretrained(folder)
    found = write_smaller(folder, folder.parent / "smaller", kept, **how)
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted({folder.name, "smaller"})
    tensors = load_file(folder.parent / "smaller/model.safetensors")
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert found.nbytes == (folder.parent / "smaller/model.safetensors").stat().st_size
    assert found.dense_parameters == sum(one.numel() for one in load_file(folder / "model.safetensors").values())
    return found


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES])
def test_without_neurons(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "full", architecture)
    model = load(folder)
    stay = 16 if architecture in MIXTURES else 17
    kept = zero_neurons(model, architecture, stay)
    found = shrink(model, folder, kept)
    assert_equal_logits(tmp_path / "smaller", model)
    smaller = load(tmp_path / "smaller")
    field = WIDTH.get(architecture, "intermediate_size")
    assert getattr(smaller.config, field) == stay
    lost = sum(parameter.numel() for parameter in model.parameters()) - sum(
        parameter.numel() for parameter in smaller.parameters()
    )
    assert lost == found.dense_parameters - found.parameters
    assert json.loads((tmp_path / "smaller/config.json").read_text())[field] == stay
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "smaller" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("unit", ["group", "query"])
def test_without_heads(architecture: str, unit: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "full", architecture, **WITH_HEADS)
    model = load(folder)
    shrink(model, folder, zero_heads(model, architecture, unit, 1 if unit == "query" else 2), head_unit=unit)
    assert_equal_logits(tmp_path / "smaller", model)
    config = load(tmp_path / "smaller").config
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert sizes == ((4, 4, 8) if unit == "query" else (4, 2, 8))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES])
def test_without_blocks(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "full", architecture)
    model = load(folder)
    shrink(model, folder, {}, dropped_blocks=[1])
    _, blocks = blocks_of(model, architecture)
    smaller = load(tmp_path / "smaller")
    assert len(blocks_of(smaller, architecture)[1]) == len(blocks) - 1
    skip(blocks[1])
    assert_equal_logits(tmp_path / "smaller", model)


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
    "gemma": ("GemmaConfig", {}),
    "granite": ("GraniteConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "qwen2 with windows": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "gemma 3 with images": ("Gemma3Config", {}),
    "gpt-2 with n_inner": ("GPT2Config", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 40}),
}
TEXT = {
    "vocab_size": 320,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "initializer_range": 0.15,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    **WITH_HEADS,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}


def save_other(folder: Path, case: str) -> Path:
    """A model of an architecture that the project promises only because it is like another."""
    name, changes = OTHERS[case]
    text = {key: value for key, value in TEXT.items() if name != "GPT2Config" or not key.startswith(("num", "inter"))}
    values = {**text, **changes}
    if name == "Gemma3Config":
        values = {"text_config": values, "vision_config": VISION, "mm_tokens_per_image": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**values))
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def text_blocks(model: Any) -> str:
    return next(name for name, module in model.named_modules() if name.endswith((".h", "layers")) and "vis" not in name)


@pytest.mark.parametrize("case", OTHERS)
def test_other_families(case: str, tmp_path: Path) -> None:
    """Neurons, groups of heads and a block at once, as far as the architecture lets."""
    folder = save_other(tmp_path / "full", case)
    model = load(folder)
    prefix = text_blocks(model)
    kept: dict[str, Tensor] = {}
    for number, block in enumerate(model.get_submodule(prefix)):
        for name, module in block.named_modules():
            if name in ("mlp.down_proj", "mlp.c_proj"):
                width = 40 if name == "mlp.c_proj" else 48
                kept[f"{prefix}.{number}.{name}"] = units = some(width, 19, number)
                zero_columns(module, others(width, units))
            elif name == "self_attn.o_proj" and case != "olmo2":
                kept[f"{prefix}.{number}.{name}"] = units = some(4, 2, number)
                columns = torch.arange(64).view(4, 16)
                zero_columns(module, columns[others(4, units)].flatten())
    for key in [key for key in kept if key.startswith(f"{prefix}.1.")]:
        del kept[key]
    shrink(model, folder, kept, dropped_blocks=[1])
    skip(model.get_submodule(f"{prefix}.1"))
    assert_equal_logits(tmp_path / "smaller", model)
    config = load(tmp_path / "smaller").config.get_text_config()
    assert config.num_hidden_layers == 2
    if case == "qwen2 with windows":
        assert (config.layer_types, config.max_window_layers) == (["full_attention", "sliding_attention"], 1)
    if case == "smollm3":
        assert config.no_rope_layers == [1, 1]


@pytest.mark.parametrize("architecture", ["qwen2-moe", "qwen3-moe"])
def test_a_mixture_with_dense_blocks(architecture: str, tmp_path: Path) -> None:
    """Blocks 1 and 3 hold experts; 0, 2 and 4 a plain MLP, whose width is another field of the config and stays."""
    folder = save_tiny(tmp_path / "full", architecture, num_hidden_layers=5, decoder_sparse_step=2)
    model = load(folder)
    experts = {1: model.model.layers[1], 3: model.model.layers[3]}
    kept = {}
    for number, block in experts.items():
        down = block.mlp.experts.down_proj
        for expert in range(4):
            kept[f"model.layers.{number}.mlp.experts.{expert}.down_proj"] = units = some(24, 8, 10 * number + expert)
            with torch.no_grad():
                down[expert][:, others(24, units)] = 0
    shrink(model, folder, kept, dropped_blocks=[2])
    skip(model.model.layers[2])
    assert_equal_logits(tmp_path / "smaller", model)
    config = load(tmp_path / "smaller").config
    assert (config.mlp_only_layers, config.decoder_sparse_step, config.moe_intermediate_size) == ([0, 3], 1, 8)
    assert config.intermediate_size == 64


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_that_are_fused_on_disk_stay_so(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "full", architecture)
    model = load(folder)
    kept = zero_neurons(model, architecture, 16)
    model.save_pretrained(folder, save_original_format=False)
    before = load_file(folder / "model.safetensors")
    assert sum(tensor.dim() == 3 for tensor in before.values()) == 4
    write_smaller(folder, tmp_path / "smaller", kept)
    after = load_file(tmp_path / "smaller/model.safetensors")
    assert list(after) == list(before)
    for name, tensor in after.items():
        if tensor.dim() == 3:
            assert 16 in tensor.shape or 32 in tensor.shape, name
        else:
            assert torch.equal(tensor, before[name]), name
    assert_equal_logits(tmp_path / "smaller", model)


def tensor_bytes(file: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(file).values())


def test_every_entry_that_stays_keeps_its_bits_and_shards_stay_small(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "full", "qwen2", dtype=torch.bfloat16, max_shard_size="30KB")
    kept = {f"model.layers.{number}.mlp.down_proj": some(64, 33, number) for number in range(3)}
    write_smaller(folder, tmp_path / "smaller", kept, dropped_blocks=[0])
    index = json.loads((tmp_path / "smaller/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "smaller").glob("*.safetensors"))
    assert 1 < len(files) < len(list(folder.glob("*.safetensors")))
    assert max(map(tensor_bytes, files)) <= max(map(tensor_bytes, folder.glob("*.safetensors")))
    assert {path.name for path in files} == set(index["weight_map"].values())
    before, after = (
        {k: v for path in sorted(one.glob("*.safetensors")) for k, v in load_file(path).items()}
        for one in (folder, tmp_path / "smaller")
    )
    assert set(after) == set(index["weight_map"])
    assert set(after) == {name for name in before if ".layers.2." not in name}
    for name, tensor in after.items():
        number = int(name.split(".")[2]) + 1 if ".layers." in name else 0
        old = before[name.replace(f".layers.{number - 1}.", f".layers.{number}.")]
        units = kept.get(f"model.layers.{number}.mlp.down_proj")
        if ".down_proj." in name:
            old = old[:, units]
        elif ".gate_proj." in name or ".up_proj." in name:
            old = old[units]
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.view(torch.int16), old.contiguous().view(torch.int16)), name


def test_only_tensors_that_are_cut_become_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "full")
    read: list[str] = []
    original = SafetensorsCheckpoint.read
    monkeypatch.setattr(SafetensorsCheckpoint, "read", lambda self, name: read.append(name) or original(self, name))
    kept = {f"model.layers.{number}.mlp.down_proj": some(64, 32, number) for number in range(3)}
    write_smaller(folder, tmp_path / "smaller", kept)
    assert sorted(read) == sorted(
        f"model.layers.{number}.mlp.{name}_proj.weight" for number in range(3) for name in ("gate", "up", "down")
    )


def test_cuts_are_computed_while_the_block_runs(tmp_path: Path) -> None:
    """The writer's thread computes them, and a block that runs holds plain tensors instead of its parameters."""
    opened = open_model(resolve_model(save_tiny(tmp_path / "full")))
    prefix, blocks = find_blocks(opened.meta_model)
    (units,) = units_of(opened.meta_model, blocks, NEURONS)[0]
    found: dict[str, Cut] = {}

    def inside(*_: Any) -> None:
        with pytest.raises(AttributeError):
            blocks[0].get_parameter("mlp.down_proj.weight")
        found.update(cuts_of(opened, f"{prefix}.0.mlp.down_proj", units, torch.arange(0, 64, 2)))

    mlp = blocks[0].get_submodule("mlp")
    mlp.register_forward_pre_hook(inside)
    weights = {name: torch.zeros(weight.shape) for name, weight in mlp.named_parameters()}
    torch.func.functional_call(mlp, weights, (torch.zeros(1, 3, 32),))
    assert {name.rpartition("mlp.")[2]: cut.axis for name, cut in found.items()} == {
        "down_proj.weight": 1,
        "gate_proj.weight": 0,
        "up_proj.weight": 0,
    }
    assert all(torch.equal(cut.stay, torch.arange(0, 64, 2)) for cut in found.values())


def test_an_error_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "full")
    kept = {f"model.layers.{number}.mlp.down_proj": some(64, 32, number) for number in range(3)}

    def fail(*_: Any) -> None:
        assert not (tmp_path / "smaller").exists()
        raise OSError("no more room")

    with monkeypatch.context() as patch:
        patch.setattr("thanos.shrink.folder.copy_others", fail)
        with pytest.raises(OSError, match="no more room"):
            write_smaller(folder, tmp_path / "smaller", kept)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    write_smaller(folder, tmp_path / "smaller", kept)
    with pytest.raises(UserError, match="smaller exists"):
        write_smaller(folder, tmp_path / "smaller", kept)


def test_units_that_do_not_fit_together(tmp_path: Path) -> None:
    folder, out = save_tiny(tmp_path / "full"), tmp_path / "smaller"
    name = "model.layers.{}.mlp.down_proj".format
    kept = {name(number): some(64, 32, number) for number in range(3)}
    with pytest.raises(ValueError, match=r"kept lacks model\.layers\.2\.mlp\.down_proj"):
        write_smaller(folder, out, {key: value for key, value in kept.items() if key != name(2)})
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj loses 31 units, others 32"):
        write_smaller(folder, out, kept | {name(2): some(64, 33, 0)})
    with pytest.raises(ValueError, match="lm_head is not the writer"):
        write_smaller(folder, out, kept | {"lm_head": some(64, 33, 0)})
    assert not out.exists()


def test_names_as_old_checkpoints_have_them(tmp_path: Path) -> None:
    """GPT-2 on the hub lacks the prefix of the base model and holds masks, which no parameter has."""
    folder = save_tiny(tmp_path / "full", "gpt-2", n_layer=4)
    model = load(folder)
    kept = zero_neurons(model, "gpt-2", 50)
    model.save_pretrained(folder)
    old = {name.removeprefix("transformer."): one for name, one in load_file(folder / "model.safetensors").items()}
    old |= {f"h.{number}.attn.bias": torch.full((1, 1), float(number)) for number in range(4)}
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    write_smaller(folder, tmp_path / "smaller", kept, dropped_blocks=[0, 2])
    skip(model.transformer.h[0])
    skip(model.transformer.h[2])
    assert_equal_logits(tmp_path / "smaller", model)
    new = load_file(tmp_path / "smaller/model.safetensors")
    assert {name for name in new if name.endswith(".attn.bias")} == {"h.0.attn.bias", "h.1.attn.bias"}
    assert [new[f"h.{number}.attn.bias"].item() for number in range(2)] == [1.0, 3.0]
