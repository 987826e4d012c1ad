"""Bad input of a recovery: one line that says what to change, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import thanos
from helpers import save_tiny, small_gguf, tiny_tokenizer
from recovering import prune, settings
from thanos.cli import run
from thanos.errors import DataError, ModelError, NumericsError, RecipeError, ResourceError, UserError
from thanos.recovery import setup as entry
from thanos.run.lock import locked

pytest.importorskip("accelerate", reason="the extra recover is not installed")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def refused(
    model: Path, dense: Any, text: Path, tmp_path: Path, match: str, kind: type[UserError] = ModelError
) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(kind, match=match) as caught:
        thanos.recover(model, tmp_path / "out2", dense=dense, recipe=settings(text))
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_other_shapes(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", intermediate_size=56)
    refused(
        pruned,
        dense,
        text_file,
        tmp_path,
        r"mlp\.\w+_proj\.weight has shape \[.*\] in OUT and \[.*\] in the dense model",
    )


def test_other_names(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", "qwen3", num_key_value_heads=4)
    refused(
        pruned,
        dense,
        text_file,
        tmp_path,
        r"not pruned from it: OUT has no model\.layers\.0\.self_attn\.q_norm\.weight",
    )


def test_fewer_blocks(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", num_hidden_layers=2)
    refused(
        pruned, dense, text_file, tmp_path, r"the dense model has no model\.layers\.2\.\S+ and 8 more; give the model"
    )


@pytest.mark.parametrize("what", ["vocabulary", "beginning"])
def test_another_tokenizer(what: str, pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    dense = copy(tiny_llama, tmp_path / "dense")
    if what == "beginning":
        tiny_tokenizer(begins=False).save_pretrained(dense)
    else:
        path = dense / "tokenizer.json"
        path.write_text(path.read_text().replace('"ban"', '"bax"').replace('"bat"', '"ban"'))
    refused(pruned, dense, text_file, tmp_path, "their tokenizers differ")


def test_unrelated_weights(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", seed=5)
    refused(
        pruned,
        dense,
        text_file,
        tmp_path,
        r"do not resemble the dense model's \(cosine -?0\.0\d\)",
    )


def test_a_dense_model_that_is_pruned_itself(pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    refused(
        pruned,
        copy(pruned, tmp_path / "dense"),
        text_file,
        tmp_path,
        "it has the same zeros itself, so it is not dense",
    )
    refused(pruned, pruned, text_file, tmp_path, "is OUT itself; give the model that OUT was pruned from")
    other = prune(tiny_llama, tmp_path / "other", text_file, pattern="2:4")
    refused(pruned, other, text_file, tmp_path, "non-zero weights of OUT are zero in the dense model")


def test_a_folder_without_zeros(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    other = copy(tiny_llama, tmp_path / "other")
    refused(
        tiny_llama, other, text_file, tmp_path, r"has no zeros to keep fixed \(0 of [\d,]+ weights .*as large as the"
    )
    # Strays do not make a pruned model.
    stray = edit(copy(tiny_llama, tmp_path / "stray"), lambda t: t["model.layers.0.mlp.up_proj.weight"][0, :3].zero_())
    refused(stray, other, text_file, tmp_path, "has no zeros to keep fixed")


def test_quantised_and_packed_folders(pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    folder = copy(pruned, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refused(folder, tiny_llama, text_file, tmp_path, r"is quantised \(gptq\)")
    refused(pruned, folder, text_file, tmp_path, r"is quantised \(gptq\)")
    half = edit(copy(pruned, tmp_path / "half"), lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    thanos.pack(half, tmp_path / "packed", least_weights=1)
    refused(
        tmp_path / "packed", tiny_llama, text_file, tmp_path, "packed is packed; give the unpacked one: thanos unpack"
    )
    refused(pruned, tmp_path / "packed", text_file, tmp_path, "packed is packed; give the unpacked one: thanos unpack")
    pytest.importorskip("gguf")
    refused(
        small_gguf(tmp_path / "m.gguf"), tiny_llama, text_file, tmp_path, "is a GGUF file, whose weights are quantised"
    )
    eight = edit(
        copy(pruned, tmp_path / "eight"), lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items()})
    )
    refused(eight, tiny_llama, text_file, tmp_path, "not a 16- to 64-bit floating-point tensor")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"samples": 1}, "1 sequence is too few: 1 to hold out and a batch of 4 need 5; raise --samples"),
        ({"samples": 4}, "4 sequences are too few: 1 to hold out and a batch of 4 need 5; raise --samples"),
        ({"held_out": 7}, "10 sequences are too few: 7 to hold out and a batch of 4 need 11"),
        ({"held_out": 0}, "held_out must be a whole number, at least 1; got 0"),
        ({"epochs": 0}, "epochs must be a whole number, at least 1; got 0"),
        ({"rate": 0}, "rate must be auto or a number above 0 and below 1"),
        ({"rate": float("nan")}, "rate must be auto or a number above 0 and below 1"),
        ({"rate": "best"}, "rate must be auto or a number above 0 and below 1, such as 2e-4; got 'best'"),
        ({"rate": True}, "rate must be auto or a number above 0 and below 1"),
        ({"train": "block"}, r"train must be auto, all, blocks or linear; got 'block' \(did you mean blocks\?\)"),
        ({"train": 3}, "train must be auto, all, blocks or linear; got 3"),
        ({"vary": 1}, "vary must be true or false; got 1"),
        ({"batch": 6, "micro_batch": 4}, "micro_batch 4 does not divide batch 6"),
        ({"sequence_length": 1}, "sequence_length must be a whole number, at least 2"),
        ({"device": ""}, "device must be a name"),
    ],
    ids=str,
)
def test_settings(changes: dict[str, Any], match: str, text_file: Path) -> None:
    with pytest.raises(RecipeError, match=match):
        settings(text_file, **changes)


def test_too_little_text(pruned: Path, tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("ban bat")
    refused(pruned, tiny_llama, text, tmp_path, "is shorter than one sequence", UserError)


def test_the_output_folder(pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    out = copy(pruned, tmp_path / "out2")
    refused(pruned, tiny_llama, text_file, tmp_path, "exists and is not empty", UserError)
    for name in (pruned, tiny_llama):
        with pytest.raises(UserError, match="is the model's own folder"):
            thanos.recover(pruned, name, dense=tiny_llama, recipe=settings(text_file), overwrite=True)
    thanos.recover(pruned, out, dense=tiny_llama, recipe=settings(text_file, epochs=1), overwrite=True)
    assert (out / "recovery.json").is_file()


def test_no_accelerate(pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(entry, "is_installed", lambda module: False)
    refused(
        pruned,
        tiny_llama,
        text_file,
        tmp_path,
        r"^recovery needs the package accelerate: pip install 'accel",
    )


@pytest.mark.parametrize("how", [{}, {"generate": 4}, {"calibration": "self"}], ids=str)
@pytest.mark.parametrize("which", ["pruned", "dense"])
def test_nan_in_a_weight(
    which: str, how: dict[str, Any], pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    folders = {"pruned": copy(pruned, tmp_path / "p"), "dense": copy(tiny_llama, tmp_path / "d")}
    edit(folders[which], lambda t: t["model.norm.weight"][:1].fill_(torch.nan))
    recipe, name = settings(text_file, **how), {"pruned": "OUT", "dense": "the dense model"}[which]
    said = rf"^{name} {re.escape(str(folders[which]))}: model\.norm\.weight holds NaN or infinity"
    with pytest.raises(NumericsError, match=said):
        thanos.recover(folders["pruned"], tmp_path / "out2", dense=folders["dense"], recipe=recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "p"]


def test_the_command_exits_with_2_and_one_line(
    pruned: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recover", str(pruned), str(tmp_path / "out2"), "--calibration", str(text_file), "--device", "cpu"]
    assert run([*words]) == 2
    assert "--dense" in capsys.readouterr().err
    assert run([*words, "--dense", str(tmp_path / "absent")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert run([*words, "--dense", str(pruned), "--samples", "3"]) == 2
    assert "too few" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_messages_name_the_folder_to_write_as_the_command_does(
    pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """OUT is the pruned model here, so a message about the other folder must not call it OUT."""

    def message(out: Any) -> str:
        with pytest.raises((UserError, ResourceError)) as caught:
            thanos.recover(pruned, out, dense=tiny_llama, recipe=settings(text_file))
        return str(caught.value)

    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    for path in (full / "text", file):
        path.touch()
    assert message(full).startswith(f"OUT2 {full} exists and is not empty")
    assert message(file).startswith(f"OUT2 {file} is a file")
    assert message(file / "out").startswith(f"cannot write next to OUT2 {file / 'out'}")
    assert message(pruned).startswith(f"OUT2 {pruned} is the model's own folder")
    assert message(pruned / "out").startswith(f"OUT2 {pruned / 'out'} is the model's own folder, or inside it")
    assert message(pruned.parent).startswith(f"OUT2 {pruned.parent} holds the model")
    assert message("").startswith("OUT2 must be the path of a folder")
    with locked(tmp_path / "busy"):
        assert message(tmp_path / "busy").startswith(f"OUT2 {tmp_path / 'busy'} is being written")


def test_an_adapter_among_the_weights_is_named(pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """transformers does not read it, so neither model is the one that its owner may expect."""
    folders = {}
    for what, folder in (("OUT", pruned), ("the dense model", tiny_llama)):
        added = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}
        folders[what] = edit(copy(folder, tmp_path / what), lambda tensors, added=added: tensors.update(added))
    report = thanos.recover(
        folders["OUT"], tmp_path / "out2", dense=folders["the dense model"], recipe=settings(text_file)
    )
    for what in folders:
        assert any(line.startswith(f"{what}: the weights of {what} contain an adapter") for line in report.warnings)


def test_a_source_of_text_as_windows(pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    given: Any = str(text_file)
    line = r"calibration must be windows .*; got str '.*; a source of text belongs into the recipe"
    with pytest.raises(DataError, match=line):
        thanos.recover(pruned, tmp_path / "o", dense=tiny_llama, recipe=settings(text_file), calibration=given)
    with pytest.raises(DataError, match=line):
        thanos.prune(tiny_llama, tmp_path / "o", calibration=given)
    with pytest.raises(DataError, match=line):
        thanos.plan(tiny_llama, tmp_path / "o", calibration=given)
    assert not (tmp_path / "o").exists()
