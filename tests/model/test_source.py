"""What is a model and what is refused: every refusal is one line that says what to do, before anything is loaded."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, LlamaConfig, T5Config

from helpers import POSITIONS, VOCABULARY, save_tiny, small_gguf, tiny_config, tiny_model, tiny_tokenizer
from thanos.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME
from thanos.errors import CudaUnavailableError, DataError, ModelError, ResourceError, UserError
from thanos.model.loading import check_token_ids, context_length, end_of_text_id, load_model
from thanos.model.source import find_local, resolve_model
from thanos.system.device import choose_device


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """A tiny model that the test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def refused(model: str | Path, match: str, **arguments: Any) -> str:
    with pytest.raises(ModelError, match=match) as caught:
        resolve_model(model, **arguments)
    text = str(caught.value)
    assert "\n" not in text, "one line"
    return text


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- what is found ----------------------------------------------------------------------------------------------------


def test_a_folder(tiny_llama: Path) -> None:
    for name in (tiny_llama, str(tiny_llama), f"{tiny_llama}/"):
        source = resolve_model(name)
        assert source.name == str(name)
        assert source.folder == tiny_llama
        assert source.gguf is None
        assert not source.trust_remote_code
        assert source.config().model_type == "llama"


def test_a_relative_folder(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_llama.parent)
    source = resolve_model(tiny_llama.name)
    assert torch.equal(load_model(source).lm_head.weight, tiny_model().lm_head.weight)


def test_config_is_a_copy_of_its_own(tiny_llama: Path) -> None:
    source = resolve_model(tiny_llama)
    source.config().vocab_size = 7
    assert source.config().vocab_size == VOCABULARY


def test_tokenizer_and_generation_config(tiny_llama: Path, copy: Path) -> None:
    source = resolve_model(tiny_llama)
    assert source.tokenizer()("ban", add_special_tokens=False)["input_ids"] == [4]
    generation = source.generation_config()
    assert generation is not None
    assert generation.eos_token_id == 2
    (copy / "generation_config.json").unlink()
    assert resolve_model(copy).generation_config() is None


def test_missing_tokenizer(copy: Path) -> None:
    for path in copy.glob("tokenizer*"):
        path.unlink()
    source = resolve_model(copy)
    with pytest.raises(ModelError, match=f"{re.escape(str(copy))} has no tokenizer.*put the tokenizer's files next to"):
        source.tokenizer()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"type": "nonsense"}}'])
def test_broken_tokenizer(copy: Path, text: str) -> None:
    (copy / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=rf"the tokenizer of {re.escape(str(copy))} cannot be read: ."):
        resolve_model(copy).tokenizer()


@pytest.mark.parametrize(
    ("content", "packages"),
    [(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "sentencepiece protobuf"), (b"IQ== 0\nIg== 1\n", "tiktoken")],
    ids=["sentencepiece", "tiktoken"],
)
def test_a_tokenizer_whose_packages_are_missing(
    copy: Path, content: bytes, packages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in copy.glob("tokenizer*"):
        path.unlink()
    (copy / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr("thanos.model.source.is_installed", lambda module: False)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", _no_tokenizer)
    says = f"tokenizer.model alone, without a tokenizer.json, needs packages that are missing: pip install {packages}$"
    with pytest.raises(ModelError, match=says):
        resolve_model(copy).tokenizer()
    monkeypatch.setattr("thanos.model.source.is_installed", lambda module: True)
    with pytest.raises(ModelError, match=r"cannot be read: it cannot$"):
        resolve_model(copy).tokenizer()


def _no_tokenizer(*_: Any, **__: Any) -> Any:
    raise ValueError("it cannot")


# --- what is refused: folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pickle", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth", "x.ckpt"]
)
def test_pickles_only(copy: Path, pickle: str) -> None:
    (copy / SINGLE_NAME).rename(copy / pickle)
    refused(copy, f"{re.escape(str(copy))} .*pickle.*run any code.*convert.*save_pretrained")


def test_pickles_beside_safetensors_are_ignored(copy: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"not even a pickle")
    model = load_model(resolve_model(copy))
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)


def test_pickles_are_never_opened(copy: Path) -> None:
    """A pickle that writes a file when it is read, under every name that transformers would look for."""
    trap = copy / "sprung"
    code = f"cos\nsystem\n(S'touch {trap}'\ntR.".encode()
    (copy / SINGLE_NAME).unlink()
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (copy / name).write_bytes(code)
    refused(copy, "pickle")
    assert not trap.exists()


def test_no_weights(copy: Path) -> None:
    (copy / SINGLE_NAME).unlink()
    refused(copy, f"{re.escape(str(copy))} has no weights: neither {SINGLE_NAME} nor {INDEX_NAME}")


def test_no_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    refused(copy, f"{re.escape(str(copy))} has no config.json.*not a Hugging Face model folder")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, "has no config.json")


def test_a_folder_of_ggufs_names_one(tmp_path: Path) -> None:
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    refused(tmp_path, f"no config.json; name the file itself, for example {re.escape(str(tmp_path / 'a.gguf'))}")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "\xff"])
def test_config_not_json(copy: Path, text: str) -> None:
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    refused(copy, r"config\.json is not valid JSON")


@pytest.mark.parametrize("values", [{}, {"model_type": "nonesuch"}, {"model_type": 3}])
def test_config_of_no_known_model(copy: Path, values: dict[str, Any]) -> None:
    (copy / "config.json").write_text(json.dumps(values))
    refused(copy, re.escape(str(copy)))


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"rope_parameters": 5}])
def test_config_with_nonsense(copy: Path, changes: dict[str, Any]) -> None:
    """Refused at the latest when the model is loaded, and never with another error."""
    edit_config(copy, **changes)
    with pytest.raises(ModelError, match=re.escape(str(copy))):
        load_model(resolve_model(copy))


@pytest.mark.parametrize(
    ("quantisation", "says"),
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"load_in_4bit": True}, "unknown"), ({}, "unknown")],
)
def test_quantised(copy: Path, quantisation: dict[str, Any], says: str) -> None:
    edit_config(copy, quantization_config=quantisation)
    refused(copy, f"is quantised .*{says}.*before quantisation")


@pytest.mark.parametrize("quantisation", ["gptq", ["gptq"], 4, {"quant_method": "a\nb"}])
def test_quantised_in_a_strange_way(copy: Path, quantisation: Any) -> None:
    edit_config(copy, quantization_config=quantisation)
    refused(copy, "is quantised")


def test_no_quantisation_is_a_plain_model(copy: Path) -> None:
    edit_config(copy, quantization_config=None)
    assert resolve_model(copy).folder == copy


def test_remote_code_needs_the_flag(copy: Path) -> None:
    trap = copy / "sprung"
    (copy / "modeling_x.py").write_text(f"open({str(trap)!r}, 'w')\n")
    edit_config(copy, auto_map={"AutoModelForCausalLM": "modeling_x.X"}, model_type="nonesuch")
    refused(copy, "Python code.*--trust-remote-code")
    assert not trap.exists(), "no code of the checkpoint ran"
    edit_config(copy, model_type="llama")
    assert resolve_model(copy, trust_remote_code=True).trust_remote_code


def test_encoder_decoder(tmp_path: Path) -> None:
    T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=32).save_pretrained(tmp_path)
    (tmp_path / SINGLE_NAME).write_bytes(b"never read")
    refused(tmp_path, r"encoder-decoder model \(t5\).*causal")


def test_not_a_causal_model(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig

    CLIPVisionConfig().save_pretrained(tmp_path)
    (tmp_path / SINGLE_NAME).write_bytes(b"never read")
    refused(tmp_path, "not a causal language model")


def test_bert_that_is_no_decoder(tmp_path: Path) -> None:
    """A BERT config maps to a causal class, but an encoder sees the whole text: pruning it as a causal LM is wrong."""
    BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8).save_pretrained(tmp_path)
    (tmp_path / SINGLE_NAME).write_bytes(b"never read")
    refused(tmp_path, "causal")


# --- what is refused: files and names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "../nowhere", "~/nowhere", "nowhere.gguf", "a/b/c"])
def test_missing_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(name, f"{re.escape(name)} does not exist; MODEL is a hub name, a local folder or a .gguf file")


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "config.json", "gguf"])
def test_a_file_that_is_no_gguf(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF in content only")
    refused(tmp_path / name, "not a .gguf file; MODEL is")
    with pytest.raises(ModelError, match=r"not a \.gguf file; the dense model is a hub name"):
        find_local(tmp_path / name, what="the dense model")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04", b"\x80\x04pickle"])
def test_a_gguf_by_name_only(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf", "not a GGUF file, or is truncated; download it again")


@pytest.mark.parametrize("size", [4, 8, 24, 25, 100, 5000])
def test_a_truncated_gguf(tmp_path: Path, size: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small_gguf(tmp_path / "whole.gguf").read_bytes()[:size])
    refused(path, f"the GGUF file of {re.escape(str(path))} .*truncated or corrupt.*download it again")


def test_a_gguf_whose_tensors_are_cut(tmp_path: Path) -> None:
    whole = small_gguf(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=r"truncated|corrupt|cannot be loaded|cannot be used"):
        load_model(resolve_model(path))


def test_a_small_gguf_loads(tmp_path: Path) -> None:
    """The file that the truncation tests cut is a good one."""
    import gguf

    path = small_gguf(tmp_path / "m.gguf")
    source = resolve_model(path)
    assert (source.gguf, source.folder) == (path, tmp_path)
    model: Any = load_model(source)
    assert type(model.config) is LlamaConfig
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(str(path)).tensors}
    found = model.model.layers[0].mlp.gate_proj.weight
    assert torch.equal(found, torch.tensor(stored["blk.0.ffn_gate.weight"]).view(64, 32))


@pytest.mark.parametrize("name", ["-", "a b", "näme/x", "a//b", "x..y/..", "name!", "a" * 200])
def test_junk_hub_names(name: str) -> None:
    refused(name, "not a hub name, and no such folder|does not exist")


def test_a_hub_name_without_network_says_what_to_give() -> None:
    refused("some-org/some-model", r"some-org/some-model is not a local .*give the local folder or a \.gguf file")
    refused("some-model", r"some-model is not a local .*give the local folder or a \.gguf file")


def test_every_refusal_is_a_users_mistake() -> None:
    assert issubclass(ModelError, UserError)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_load_model(tiny_llama: Path) -> None:
    model = load_model(resolve_model(tiny_llama))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32
    reference = tiny_model()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
    ],
)
def test_load_model_dtype(tmp_path: Path, stored: torch.dtype, asked: Any, expected: torch.dtype) -> None:
    save_tiny(tmp_path, dtype=stored)
    assert load_model(resolve_model(tmp_path), dtype=asked).dtype == expected


def test_load_truncated_weights(copy: Path) -> None:
    with (copy / SINGLE_NAME).open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated"):
        load_model(resolve_model(copy))


def test_load_weights_that_do_not_fit_the_config(copy: Path) -> None:
    edit_config(copy, intermediate_size=96)
    with pytest.raises(ModelError, match=f"{re.escape(str(copy))}"):
        load_model(resolve_model(copy))


def test_load_weights_that_lack_a_tensor(copy: Path) -> None:
    """Transformers would fill the hole with random numbers and only log it."""
    from safetensors.torch import load_file, save_file

    state = load_file(copy / SINGLE_NAME)
    del state["model.layers.1.mlp.down_proj.weight"]
    save_file(state, copy / SINGLE_NAME, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        load_model(resolve_model(copy))


def test_a_lacking_tensor_is_never_made_up(copy: Path) -> None:
    """The whole way: a pruned model with a random layer in it would look finished."""
    from safetensors.torch import load_file, save_file

    import thanos

    state = load_file(copy / SINGLE_NAME)
    del state["model.layers.1.mlp.down_proj.weight"]
    save_file(state, copy / SINGLE_NAME, metadata={"format": "pt"})
    out = copy.parent / "out"
    recipe = thanos.Recipe(method="magnitude", calibration="pydoc", samples=1, sequence_length=16)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        thanos.prune(copy, out, recipe)
    assert not out.exists()


def test_missing_package_for_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(path, r"GGUF files need the package gguf: pip install 'gguf>=0\.17' 'accelerate>=1\.1'$")


@pytest.mark.slow
def test_the_demo_model_is_a_plain_llama(demo_gguf: Path, tmp_path: Path) -> None:
    source = resolve_model(demo_gguf)
    model: Any = load_model(source)
    assert type(model.config) is LlamaConfig
    assert not hasattr(model.config, "quantization_config")
    assert "quantization_config" not in model.config.to_dict()
    assert model.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size) == (576, 30, 49152)
    assert context_length(source.config()) == 8192
    assert source.generation_config() is not None
    tokenizer = source.tokenizer()
    assert tokenizer.decode(tokenizer("Hello world")["input_ids"], skip_special_tokens=True) == "Hello world"
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.inference_mode():
        best = model(input_ids=ids).logits[0, -1].argmax()
    assert tokenizer.decode([int(best)]).strip() == "Paris"
    # And the folder that it is saved as needs no GGUF package.
    model.config.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "gpu",
        "CUDA",
        "Cpu",
        "cuda:",
        "cpu:",
        "cuda:x",
        "cuda:-1",
        "cuda:1.0",
        "cuda:0:0",
        "cpu:0",
        "mps",
        "meta",
        ":",
        " cpu",
    ],
)
def test_unknown_devices(name: str, two_cuda: None) -> None:
    with pytest.raises(
        ResourceError, match=f"device {re.escape(repr(name))} is unknown; choose auto, cpu, cuda or cuda:N"
    ):
        choose_device(name)


@pytest.mark.parametrize("name", ["cuda:²", "cuda:٣"])
def test_digits_that_are_no_numbers(name: str, two_cuda: None) -> None:
    """Unicode has digits that int() or torch do not read."""
    with pytest.raises(ResourceError, match="device"):
        choose_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_asked_for_and_absent(name: str, no_cuda: None) -> None:
    with pytest.raises(CudaUnavailableError, match=f"device {name} needs CUDA.*no CUDA.*--device cpu"):
        choose_device(name)


def test_devices_without_cuda(no_cuda: None) -> None:
    assert choose_device("auto") == torch.device("cpu")
    assert choose_device("cpu") == torch.device("cpu")


def test_devices_with_cuda(two_cuda: None) -> None:
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("cuda") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ResourceError, match="cuda:2 does not exist; there are cuda:0 to cuda:1"):
        choose_device("cuda:2")


# --- small facts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenizer", "config", "expected"),
    [(5, 6, 5), (None, 6, 6), (None, [7, 8], 7), (0, 6, 0), (None, 0, 0)],
)
def test_end_of_text(tokenizer: Any, config: Any, expected: int) -> None:
    names: Any = SimpleNamespace(eos_token_id=tokenizer), SimpleNamespace(eos_token_id=config)
    assert end_of_text_id(*names) == expected


@pytest.mark.parametrize("config", [None, []])
def test_end_of_text_nowhere(config: Any) -> None:
    names: Any = SimpleNamespace(eos_token_id=None), SimpleNamespace(eos_token_id=config)
    with pytest.raises(DataError, match="neither the tokenizer nor the config names an end-of-text token"):
        end_of_text_id(*names)
    with pytest.raises(DataError, match="end-of-text"):
        end_of_text_id(SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]


def test_end_of_text_of_the_tiny_model() -> None:
    assert end_of_text_id(tiny_tokenizer(), tiny_config()) == 2


@pytest.mark.parametrize("architecture", ["llama", "opt-125m", "gpt-2", "gpt-neox", "gemma-3", "phi-3"])
def test_context_length(architecture: str) -> None:
    assert context_length(tiny_config(architecture)) == POSITIONS


def test_context_length_of_nested_and_silent_configs() -> None:
    from transformers import BloomConfig, PreTrainedConfig

    assert context_length(BloomConfig()) is None  # ALiBi: no table of positions
    assert context_length(PreTrainedConfig()) is None
    nested = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=99))
    assert context_length(nested) == 99  # type: ignore[arg-type]


def test_check_token_ids() -> None:
    model = tiny_model()
    check_token_ids(torch.tensor([[0, VOCABULARY - 1]]), model)
    with pytest.raises(DataError, match=f"token id {VOCABULARY}, but the model embeds only {VOCABULARY}"):
        check_token_ids(torch.tensor([[0, VOCABULARY]]), model)


def test_importing_pretrained_does_not_import_transformers() -> None:
    """``--help`` and ``--version`` stay fast."""
    code = "import sys, thanos.model.source; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
