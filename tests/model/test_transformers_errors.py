"""What transformers and a checkpoint's own code raise becomes one line that says what to do."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import thanos
from helpers import save_tiny, small_gguf, tiny_model
from thanos.cli import run
from thanos.errors import ModelError
from thanos.model.loading import load_model
from thanos.model.opening import open_model
from thanos.model.source import ModelSource, resolve_model
from thanos.model.transformers_errors import describe_import_error

ABSENT = "absent_package_of_this_test"
PIP = "absent-package-of-this-test"


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def said(error: BaseException) -> str:
    text = describe_import_error("org/model", error)
    assert text is not None
    assert "\n" not in text
    return text


# --- which package ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("flash_attn_absent", "flash-attn-absent"),
        ("mamba_ssm_absent.ops.triton", "mamba-ssm-absent"),
        ("einops_absent", "einops-absent"),
    ],
)
def test_a_module_is_named_by_its_package(module: str, package: str) -> None:
    text = said(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert text == f"org/model needs {package}, which is not installed: pip install {package}"


def test_packages_whose_modules_are_called_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, package in {"PIL": "pillow", "cv2": "opencv-python", "sklearn": "scikit-learn"}.items():
        monkeypatch.setattr("thanos.model.transformers_errors._is_there", lambda module: False)
        assert said(ModuleNotFoundError("", name=module)).endswith(f"pip install {package}")


def test_what_transformers_itself_raises() -> None:
    from transformers.utils import import_utils

    with pytest.raises(ImportError) as caught:
        import_utils.requires_backends(type("Tower", (), {}), _absent_backend())
    assert f"pip install {_absent_backend()}".replace("_", "-") in said(caught.value).replace("_", "-")
    text = (
        "This modeling file requires the following packages that were not found in your environment: PIL, flash_attn. "
        "Run `pip install PIL flash_attn`"
    )
    assert said(ImportError(text)).endswith(
        "needs pillow and flash-attn, which are not installed: pip install pillow flash-attn"
    )


def _absent_backend() -> str:
    return next(
        name
        for name in ("timm", "jieba", "g2p_en", "essentia")
        if not getattr(transformers.utils, f"is_{name}_available", lambda: True)()
    )


def test_a_cause_further_up_counts_and_what_merely_came_before_does_not() -> None:
    outer = RuntimeError("Failed to import")
    outer.__cause__ = ModuleNotFoundError("", name=ABSENT)
    assert PIP in said(outer)
    other = RuntimeError("something else")
    other.__context__ = ModuleNotFoundError("", name=ABSENT)
    assert describe_import_error("org/model", other) is None


def test_a_name_that_a_package_no_longer_has_is_not_installed_by_pip() -> None:
    """Old code of a checkpoint with a newer transformers: the package is there."""
    with pytest.raises(ImportError) as caught:
        from transformers.utils import is_flash_attn_available_of_old  # noqa: F401
    text = said(caught.value)
    assert "pip install" not in text
    assert f"transformers {transformers.__version__}" in text
    with pytest.raises(ImportError) as caught:
        importlib.import_module("transformers.nonesuch")
    assert "pip install" not in said(caught.value)


# --- at every place where transformers is called --------------------------------------------------------------------------


def fail(*_: Any, **__: Any) -> Any:
    raise ModuleNotFoundError(f"No module named '{ABSENT}'", name=ABSENT)


NEEDS = rf"needs {PIP}, which is not installed: pip install {PIP}$"


def test_config(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelError, match=NEEDS):
        resolve_model(copy)


def test_tokenizer(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve_model(copy)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ModelError, match=NEEDS):
        source.tokenizer()


def test_model(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve_model(copy)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match=NEEDS):
        load_model(source)


def test_meta_model(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve_model(copy)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", fail)
    with pytest.raises(ModelError, match=NEEDS):
        open_model(source)


def test_the_code_of_a_checkpoint(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really run, and it asks for what is not there: when it is read, and only when it runs."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    edit_config(copy, auto_map={"AutoConfig": "mine.Mine"}, model_type="mine")
    config = "from transformers import PretrainedConfig\nclass Mine(PretrainedConfig):\n    model_type = 'mine'\n"
    (copy / "mine.py").write_text(f"import {ABSENT}\n{config}")
    with pytest.raises(ModelError, match=NEEDS):
        resolve_model(copy, trust_remote_code=True)
    late = f"    def __init__(self, **values):\n        __import__('{ABSENT}')\n"
    (copy / "mine.py").write_text(config + late)
    with pytest.raises(ModelError, match=NEEDS):
        resolve_model(copy, trust_remote_code=True)


MODELING = """
from transformers import PretrainedConfig, PreTrainedModel


class Mine(PretrainedConfig):
    model_type = "mine"


class Model(PreTrainedModel):
    config_class = Mine

    def __init__(self, config):
        super().__init__(config)
        {fault}
"""

FAULTS = {
    "TypeError": "None + 1",
    "AttributeError: 'Mine' object has no attribute 'rope'": "config.rope",
    "KeyError: 'default'": "{}['default']",
    "AssertionError": "assert False",
    "ZeroDivisionError": "1 / 0",
    "NotImplementedError: no": "raise NotImplementedError('no\\nmore')",
    "SystemExit: 3": "raise SystemExit(3)",
    "NameError": "absent",
}


@pytest.mark.parametrize("says", FAULTS)
def test_code_of_a_checkpoint_that_fails_with_anything_while_the_model_is_built(
    says: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    edit_config(copy, auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}, model_type="mine")
    (copy / "mine.py").write_text(MODELING.replace("{fault}", FAULTS[says]))
    (tmp_path / "a.txt").write_text("ban bar")
    settings = ["--sequence-length", "8", "--device", "cpu", "--trust-remote-code"]
    for words in (
        ["prune", str(copy), str(tmp_path / "out"), "--calibration", str(tmp_path / "a.txt"), *settings],
        ["prune", str(copy), str(tmp_path / "out"), "--calibration", "self", *settings, "--plan"],
        ["eval", str(copy), "--text", str(tmp_path / "a.txt"), *settings],
    ):
        assert run(words) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"error: the Python code of {copy} fails with transformers")
        assert f"({says}" in line
    assert not (tmp_path / "out").exists()


def test_a_config_with_which_transformers_cannot_build_the_model(copy: Path) -> None:
    edit_config(copy, hidden_act="no-such-activation")
    source = resolve_model(copy)
    for call in (open_model, load_model):
        with pytest.raises(ModelError, match=r"cannot build .*copy from its config \(KeyError: 'no-such-activation'\)"):
            call(source)


def test_what_transformers_says_in_two_lines_or_above_its_error(copy: Path) -> None:
    edit_config(copy, hidden_size="x")
    with pytest.raises(ModelError, match=r"config of .*'hidden_size': .*expected int, got str"):
        resolve_model(copy)
    edit_config(copy, hidden_size=32, vocab_size=100)
    source = resolve_model(copy)
    for call in (open_model, load_model):
        with pytest.raises(ModelError, match=r"shape.*config.json requires.*the config belongs to another checkpoint$"):
            call(source)


@pytest.mark.skipif(transformers.utils.is_flash_attn_2_available(), reason="flash-attn is installed")
def test_a_config_that_asks_for_flash_attention(copy: Path) -> None:
    edit_config(copy, _attn_implementation="flash_attention_2")
    source = resolve_model(copy)
    for call in (open_model, load_model):
        with pytest.raises(ModelError, match=r"needs flash-attn, which is not installed: pip install flash-attn$"):
            call(source)


def test_the_command_line_ends_with_exit_code_2(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from thanos.cli import main

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", fail)
    monkeypatch.setattr(sys, "argv", ["thanos", "inspect", str(copy)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert PIP in capsys.readouterr().err


# --- damage is said of damage alone ---------------------------------------------------------------------------------------


def test_a_type_that_this_transformers_does_not_know(copy: Path) -> None:
    edit_config(copy, model_type="llama_of_tomorrow")
    with pytest.raises(ModelError) as caught:
        resolve_model(copy)
    text = str(caught.value)
    assert "llama_of_tomorrow" in text
    assert "upgrade transformers" in text
    assert "--trust-remote-code" not in text, "this checkpoint has no code that could be allowed"
    assert "corrupt" not in text
    assert "download" not in text


FAILS = r"^the Python code of .* fails with transformers .* \({}\); use a newer"


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({}, r"^.* lacks configuration_own\.py, the Python code that its config\.json names; download that file too$"),
        ({"configuration_own.py": "def x(:\n"}, FAILS.format("SyntaxError: .*")),
        ({"configuration_own.py": "raise RuntimeError('boom')\n"}, FAILS.format("RuntimeError: boom")),
        ({"configuration_own.py": "class Other: pass\n"}, FAILS.format("AttributeError: .*Own.*")),
    ],
    ids=["absent", "broken", "raising", "another class"],
)
def test_own_code_of_an_unknown_type_that_fails_although_it_is_allowed(
    copy: Path, files: dict[str, str], what: str
) -> None:
    edit_config(copy, model_type="llama_of_tomorrow", auto_map={"AutoConfig": "configuration_own.Own"})
    for name, text in files.items():
        (copy / name).write_text(text)
    with pytest.raises(ModelError, match=what) as caught:
        resolve_model(copy, trust_remote_code=True)
    assert "trust-remote-code" not in str(caught.value), "it was given"


def test_a_gguf_architecture_that_transformers_cannot_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "nonesuch")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"nonesuch.*upgrade transformers") as caught:
        resolve_model(tmp_path / "m.gguf")
    assert "corrupt" not in str(caught.value)


def test_one_part_of_a_gguf_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by what the file says."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, number in {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 64,
    }.items():
        writer.add_uint32(f"llama.{key}", number)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(40)
    writer.add_uint16("split.no", 0)
    writer.add_uint16("split.count", 3)
    import numpy as np

    writer.add_tensor("token_embd.weight", np.zeros((40, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = resolve_model(path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("reads a part alone"))
    with pytest.raises(ModelError, match=r"one of 3 parts.*llama-gguf-split --merge") as caught:
        load_model(source)
    assert "damaged" not in str(caught.value)


def test_a_gguf_in_one_part_is_none_of_several(tmp_path: Path) -> None:
    load_model(resolve_model(small_gguf(tmp_path / "m-00001-of-00001.gguf")))


# --- a model that transformers has itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [True, False])
def test_a_native_model_whose_config_names_code(tmp_path: Path, text_file: Path, code: bool) -> None:
    """Phi-3 on the hub: pruned by transformers' own code, and what comes out loads by it too, with the same bits."""
    folder = save_tiny(tmp_path / "phi", "phi-3")
    named = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    edit_config(folder, auto_map=named)
    if code:
        for name in ("configuration_phi3", "modeling_phi3"):
            (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    out = tmp_path / "out"
    recipe = thanos.Recipe(method="magnitude", calibration=str(text_file), samples=1, sequence_length=16)
    thanos.prune(folder, out, recipe)
    assert not (tmp_path / "sprung").exists(), "no code of the checkpoint ran"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__module__.startswith("transformers.")
    assert resolve_model(out).config().model_type == "phi3"
    dense, pruned = tiny_model("phi-3").state_dict(), model.state_dict()
    assert torch.equal(pruned["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    weight = pruned["model.layers.0.mlp.down_proj.weight"]
    kept = weight != 0
    assert int(kept.sum()) == weight.numel() // 2
    assert torch.equal(weight[kept], dense["model.layers.0.mlp.down_proj.weight"][kept])
    # A reference to code that is not there would fail wherever somebody trusts it.
    assert ("auto_map" in json.loads((out / "config.json").read_text())) is code


def test_code_of_a_type_that_transformers_has_without_a_causal_model(tmp_path: Path, copy: Path) -> None:
    edit_config(copy, model_type="clip_vision_model", auto_map={"AutoModelForCausalLM": "mine.Mine"})
    with pytest.raises(ModelError, match="--trust-remote-code"):
        resolve_model(ModelSource(str(copy), copy).folder)
