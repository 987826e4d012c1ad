"""Every architecture pruned end to end, against a slow reference run that uses hooks on the whole model.

The reference never runs a block alone and shares no statistics: for each block it runs the whole, partly pruned model on
all windows, sums XᵀX of each layer in float64 and prunes the layer with ``prune_weight``, which has its own oracles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import thanos
from helpers import ARCHITECTURES, prose, save_tiny, windows
from whole_models import LENGTH, SAMPLES, calibration_ids, compare, prune_modules, recipe

_BLOCKS = {"gpt-2": "transformer.h", "gpt-neox": "gpt_neox.layers", "rwkv": "rwkv.blocks"} | dict.fromkeys(
    ("opt-125m", "opt-350m", "opt-6.7b"), "model.decoder.layers"
)


def blocks_of(model: Any, architecture: str) -> tuple[str, nn.ModuleList]:
    name = _BLOCKS.get(architecture, "model.layers")
    return name, model.get_submodule(name)


def save_dense(folder: Path, architecture: str, **arguments: Any) -> Path:
    """As ``save_tiny``; but transformers reads every Qwen2 tokenizer as byte-level BPE, so give it one."""
    save_tiny(folder, architecture, begins=False, **arguments)
    if architecture == "qwen2":
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator([prose(2000)], vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"])
        fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
        fast.save_pretrained(folder)
    return folder


def reference_run(
    folder: Path,
    architecture: str,
    ids: Tensor,
    *,
    tail: tuple[str, ...] = (),
    follow: dict[str, Tensor] | None = None,
    **how: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """Prune the folder's model slowly; return it and its pruned weights by name, in the stored dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stored = {name: tensor.detach().clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    prefix, blocks = blocks_of(model, architecture)
    done: dict[str, Tensor] = {}
    groups = [
        {
            f"{prefix}.{index}.{name}": module
            for name, module in block.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D")
        }
        for index, block in enumerate(blocks)
    ]
    for modules in [*groups, *({name: model.get_submodule(name)} for name in tail)]:
        prune_modules(model, modules, ids, stored, follow, **how)
        done |= {f"{name}.weight": stored[f"{name}.weight"] for name in modules}
    return model, done


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("dense")
    return {architecture: save_dense(base / architecture, architecture) for architecture in ARCHITECTURES}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "how",
    [
        {"method": "thanos", "pattern": "unstructured", "sparsity": 0.5, "block_size": 16},
        {"method": "thanos", "pattern": "columns", "sparsity": 0.3, "outlier_rows": 0.1},
        {"method": "sparsegpt", "pattern": "2:4"},
    ],
    ids=["thanos", "columns", "sparsegpt-2:4"],
)
def test_pruning_equals_a_slow_run_of_the_whole_model(
    architecture: str, how: dict[str, Any], dense: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    folder = dense[architecture]
    report = thanos.prune(folder, tmp_path / "out", recipe(text_file, **how))
    model, expected = reference_run(folder, architecture, calibration_ids(folder, text_file), **how)
    written, original = load_file(tmp_path / "out/model.safetensors"), load_file(folder / "model.safetensors")
    assert {f"{layer.name}.weight" for layer in report.layers} == expected.keys()
    compare(written, expected)
    assert written.keys() == original.keys()
    for name in written.keys() - expected.keys():
        assert torch.equal(written[name].view(torch.uint8), original[name].view(torch.uint8)), name

    ids = windows(2, 40, seed=5)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        logits = reloaded(input_ids=ids).logits
        torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
        # Bit-identical to the same weights set by hand in a model that never saw our folder.
        by_hand = AutoModelForCausalLM.from_pretrained(folder).eval()
        named = {"lm_head.weight" if name == "embed_out.weight" else name: value for name, value in written.items()}
        _, unexpected = by_hand.load_state_dict(named, strict=False)
        assert not unexpected
        assert torch.equal(logits, by_hand(input_ids=ids).logits)


def test_rwkv_is_pruned_as_it_was_trained(text_file: Path, tmp_path: Path) -> None:
    """It runs with hidden states halved every few blocks, and with weights to match: another way to the same logits."""
    halving, plain = (save_dense(tmp_path / f"{every}", "rwkv", rescale_every=every) for every in (2, 0))
    ids = windows(2, 40, seed=5)
    with torch.inference_mode():
        one, other = (
            AutoModelForCausalLM.from_pretrained(path).eval()(input_ids=ids).logits for path in (halving, plain)
        )
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    thanos.prune(halving, tmp_path / "out", recipe(text_file, sparsity=0.5))
    model, expected = reference_run(plain, "rwkv", calibration_ids(plain, text_file), method="thanos", sparsity=0.5)
    compare(load_file(tmp_path / "out/model.safetensors"), expected)
    assert (tmp_path / "out/config.json").read_bytes() == (halving / "config.json").read_bytes()
    with torch.inference_mode():
        pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=ids).logits
        torch.testing.assert_close(pruned, model(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_tokenizer_and_tied_weights_survive(
    architecture: str, dense: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    folder, out = dense[architecture], tmp_path / "out"
    thanos.prune(folder, out, recipe(text_file, method="magnitude"))
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, out))

    def tied(model: Any) -> bool:
        return model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()

    assert tied(after) is tied(before) is before.config.tie_word_embeddings
    assert after.dtype == before.dtype


@pytest.mark.parametrize("architecture", ["llama-3", "gpt-2", "gemma-3", "opt-350m"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_checkpoint_calibrated_in_float32_equals_the_slow_run(
    architecture: str, dtype: torch.dtype, text_file: Path, tmp_path: Path
) -> None:
    # What a layer's successors see is the weight as it is stored, rounded to 16 bits; a sum that lies half way between
    # two 16-bit numbers may be rounded either way, so each layer is compared after the same predecessors.
    folder = save_dense(tmp_path / "dense", architecture, dtype=dtype)
    how = {"method": "thanos", "pattern": "unstructured", "sparsity": 0.5}
    thanos.prune(folder, tmp_path / "out", recipe(text_file, dtype="float32", **how))
    written = load_file(tmp_path / "out/model.safetensors")
    ids = calibration_ids(folder, text_file)
    _, expected = reference_run(folder, architecture, ids, follow=written, **how)
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    compare(written, expected, tolerance=1e-3, ties=2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_in_16_bit_out(architecture: str, dtype: torch.dtype, text_file: Path, tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "dense", architecture, dtype=dtype)
    report = thanos.prune(folder, tmp_path / "out", recipe(text_file, method="thanos", pattern="2:4"))
    written, original = load_file(tmp_path / "out/model.safetensors"), load_file(folder / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == {n: t.dtype for n, t in original.items()}
    assert {layer.dtype for layer in report.layers} == {str(dtype).removeprefix("torch.")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype
    assert torch.isfinite(model(input_ids=windows(1, 8)).logits).all()
    for layer in report.layers:
        weight = written[f"{layer.name}.weight"]
        rows = weight.T if architecture == "gpt-2" else weight
        assert ((rows.reshape(-1, 4) != 0).sum(1) <= 2).all()
        assert layer.sparsity == (rows == 0).double().mean().item()


@pytest.mark.parametrize(
    ("architecture", "tail"), [("llama", ("lm_head",)), ("opt-350m", ("model.decoder.project_out",))]
)
def test_a_layer_after_the_blocks_is_pruned_on_what_it_then_sees(
    architecture: str, tail: tuple[str, ...], dense: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    how = {"method": "sparsegpt", "pattern": "unstructured", "sparsity": 0.4}
    folder = dense[architecture]
    report = thanos.prune(folder, tmp_path / "out", recipe(text_file, targets=("layers.*", *tail), **how))
    _, expected = reference_run(folder, architecture, calibration_ids(folder, text_file), tail=tail, **how)
    compare(load_file(tmp_path / "out/model.safetensors"), expected)
    assert report.layers[-1].name == tail[0]
    assert report.layers[-1].block is None
    assert report.layers[-1].tokens == SAMPLES * LENGTH


def test_a_layer_before_the_blocks_cannot_be_pruned(dense: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(thanos.errors.UserError, match=r"project_in comes before the decoder blocks"):
        thanos.prune(dense["opt-350m"], tmp_path / "out", recipe(text_file, targets=("project_in",)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", ["opt-125m", "tinyllama"])
def test_a_tied_head_is_not_pruned(architecture: str, dense: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(thanos.errors.UserError, match=r"lm_head shares its weight with the input embedding"):
        thanos.prune(dense[architecture], tmp_path / "out", recipe(text_file, targets=("lm_head",)))
    assert not list(tmp_path.iterdir())


# --- checkpoints whose tensor names differ from the parameters' ----------------------------------------------------------


def rename(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def test_gpt2_without_the_base_prefix_is_streamed_and_keeps_its_names(
    dense: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    # GPT-2 on the hub: h.0.attn.c_attn.weight, not transformer.h.0.attn.c_attn.weight.
    folder = save_dense(tmp_path / "hub", "gpt-2")  # with the tokenizer of the model that it is compared with
    rename(folder, lambda name: name.removeprefix("transformer."))
    report = thanos.prune(folder, tmp_path / "out", recipe(text_file))
    thanos.prune(dense["gpt-2"], tmp_path / "plain", recipe(text_file))
    bare, full = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert {f"transformer.{name}": 0 for name in bare} == dict.fromkeys(full, 0)
    assert all(torch.equal(tensor, full[f"transformer.{name}"]) for name, tensor in bare.items())
    assert report.warnings == []
    assert report.layers[0].name.startswith("transformer.h.0.")
    ids = windows(1, 16)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(input_ids=ids) for name in ("out", "plain"))
    assert torch.equal(one.logits, other.logits)


def test_gpt_neox_keeps_the_names_of_its_checkpoint(text_file: Path, tmp_path: Path) -> None:
    # Files of GPT-NeoX, on the hub and as transformers saves them, call the head embed_out; engines look for that name.
    folder = save_dense(tmp_path / "dense", "gpt-neox")
    report = thanos.prune(folder, tmp_path / "out", recipe(text_file))
    names = load_file(folder / "model.safetensors").keys()
    assert "embed_out.weight" in names
    assert load_file(tmp_path / "out/model.safetensors").keys() == names
    assert report.warnings == []  # only a name differs, so the checkpoint can be streamed


def test_names_that_are_not_one_to_one_are_left_to_transformers_with_a_note(
    dense: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    # Some names have the base model's prefix and some lack it; transformers sorts that out, name by name.
    folder, events = save_dense(tmp_path / "mixed", "llama"), []
    rename(folder, lambda name: name.removeprefix("model.") if "layers.1." in name else name)
    report = thanos.prune(folder, tmp_path / "out", recipe(text_file), on_event=events.append)
    thanos.prune(dense["llama"], tmp_path / "plain", recipe(text_file))
    assert any(
        "do not match the model's parameters one to one" in line and "transformers loads it" in line
        for line in report.warnings
    )
    assert [e.message for e in events if e.kind == "note"] == report.warnings
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("config_layers", [3, 4])
def test_a_checkpoint_that_lacks_a_weight_is_refused(config_layers: int, text_file: Path, tmp_path: Path) -> None:
    # transformers would fill it with random numbers and go on.
    folder = save_tiny(tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    if config_layers == 3:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    missing = "model.layers.1.mlp.up_proj.weight" if config_layers == 3 else "model.layers.3."
    with pytest.raises(thanos.errors.ModelError) as caught:
        thanos.prune(folder, tmp_path / "out", recipe(text_file))
    assert missing in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ['"intermediate_size": 64', '"vocab_size": 320', '"head_dim": 8'])
def test_a_config_that_contradicts_the_tensors_is_refused(change: str, text_file: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense")
    config = (folder / "config.json").read_text()
    name, value = change.split(": ")
    assert change in config
    (folder / "config.json").write_text(config.replace(change, f"{name}: {int(value) * 2}"))
    with pytest.raises(thanos.errors.ModelError, match=r"(embed_tokens|lm_head|proj)\.weight"):
        thanos.prune(folder, tmp_path / "out", recipe(text_file))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_integer_weights_is_refused(text_file: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(64, 32, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(thanos.errors.ModelError, match=r"model\.layers\.1\.mlp\.up_proj.*int8"):
        thanos.prune(folder, tmp_path / "out", recipe(text_file))
    assert not (tmp_path / "out").exists()
