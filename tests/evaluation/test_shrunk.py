"""A smaller model beside its dense parent, against counts of the tensors in both files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gguf_models import write_gguf
from helpers import save_tiny
from shrinking import WITH_HEADS, load, some, zero_heads
from thanos.cli import run
from thanos.cli.shrunk_output import show_shrinkage
from thanos.errors import ModelError
from thanos.evaluation.inspect import inspect_checkpoint
from thanos.evaluation.shrunk import BlockChange, Change, Shrinkage
from thanos.run.report import SCHEMA
from thanos.shrink.folder import write_smaller


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("dense") / "model", "qwen3", **WITH_HEADS)


@pytest.fixture(scope="module")
def smaller(dense: Path) -> Path:
    """Without a third of the neurons and two of four groups of heads."""
    kept = {f"model.layers.{number}.mlp.down_proj": some(64, 40, number) for number in range(3)}
    kept |= zero_heads(load(dense), "qwen3", "group", 2)
    write_smaller(dense, dense.parent / "smaller", kept)
    return dense.parent / "smaller"


@pytest.fixture(scope="module")
def shorter(dense: Path) -> Path:
    write_smaller(dense, dense.parent / "shorter", {}, dropped_blocks=[1])
    return dense.parent / "shorter"


def shrinkage(model: Path, dense: Path) -> Shrinkage:
    found = inspect_checkpoint(model, dense=dense).smaller
    assert found is not None
    return found


def count(folder: Path, part: str = "") -> int:
    return sum(one.numel() for name, one in load_file(folder / "model.safetensors").items() if part in name)


def test_counts_are_exact(dense: Path, smaller: Path) -> None:
    found = shrinkage(smaller, dense)
    assert found.sizes == {
        "block_count": Change(before=3, after=3),
        "mlp_width": Change(before=64, after=40),
        "query_heads": Change(before=8, after=4),
        "key_value_heads": Change(before=4, after=2),
    }
    assert found.parameters == Change(before=count(dense), after=count(smaller))
    assert found.block_parameters == Change(before=count(dense, ".layers."), after=count(smaller, ".layers."))
    assert found.tensor_bytes == Change(before=4 * count(dense), after=4 * count(smaller))
    assert found.file_bytes.after == (smaller / "model.safetensors").stat().st_size
    for number, block in enumerate(found.blocks):
        part = f".layers.{number}."
        assert (block.dense_block, block.block, block.removed) == (number, number, {})
        assert block.parameters == Change(before=count(dense, part), after=count(smaller, part))
        # 24 neurons of gate, up and down; q and o lose 4 heads of 8 rows each, k and v lose 2.
        assert block.parameters.before - block.parameters.after == 64 * (24 * 3 + 2 * 32 + 2 * 16)


def test_the_bytes_of_a_gguf_file_are_those_of_all_parts(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m.gguf", "llama", parts=3)
    total = sum(path.stat().st_size for path in tmp_path.glob("*.gguf"))
    assert shrinkage(first, first).file_bytes == Change(before=total, after=total)


def test_which_units_are_gone_comes_from_the_report(dense: Path, smaller: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in smaller.iterdir():
        (folder / path.name).symlink_to(path)
    name = "model.layers.1.mlp.down_proj"
    layer = {"name": name, "shape": [64, 64], "removed_units": [3, 5]}
    report = {"layers": [layer, {"name": "lm_head"}], "dense": [], "schema": SCHEMA}
    (folder / "pruning.json").write_text(json.dumps(report))
    found = shrinkage(folder, dense)
    assert [block.removed for block in found.blocks] == [{}, {name: [3, 5]}, {}]
    # The second of two runs counted neurons that were left: its indices are not the dense model's.
    (folder / "pruning.json").write_text(json.dumps(report | {"layers": [layer | {"shape": [64, 52]}]}))
    assert [block.removed for block in shrinkage(folder, dense).blocks] == [{}, {}, {}]


def test_blocks_that_are_gone(dense: Path, shorter: Path, tmp_path: Path) -> None:
    found = shrinkage(shorter, dense)
    assert found.sizes["block_count"] == Change(before=3, after=2)
    assert [(one.dense_block, one.block, one.parameters) for one in found.blocks] == [(None, 0, None), (None, 1, None)]
    assert found.parameters.before - found.parameters.after == count(dense, ".layers.1.")
    folder = tmp_path / "model"
    folder.mkdir()
    for path in shorter.iterdir():
        (folder / path.name).symlink_to(path)
    report = {"schema": SCHEMA, "layers": [], "dense": [], "cut": {"dropped_blocks": [1]}}
    (folder / "pruning.json").write_text(json.dumps(report))
    known = shrinkage(folder, dense).blocks
    assert [(one.dense_block, one.block) for one in known] == [(0, 0), (1, None), (2, 1)]
    assert known[1].parameters == Change(before=count(dense, ".layers.1."), after=0)


def test_other_models_are_refused(dense: Path, smaller: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"mlp_width 40, fewer than .* \(64\); exchange the two models"):
        inspect_checkpoint(dense, dense=smaller)
    with pytest.raises(ModelError, match=r"has hidden_size 32, but .* has 64; give as --dense the model"):
        inspect_checkpoint(smaller, dense=save_tiny(tmp_path / "narrow", "qwen3"))
    with pytest.raises(ModelError, match="has model_type llama, but"):
        inspect_checkpoint(smaller, dense=save_tiny(tmp_path / "llama", **WITH_HEADS))


def test_the_command_shows_them(
    dense: Path, smaller: Path, shorter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(smaller), "--dense", str(dense), "--quiet"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["neurons", "of", "each", "MLP", "or", "expert", "64", "40", "24", "(37.50", "%)"] in lines
    before, after = count(dense), count(smaller)
    gone = [f"{before - after:,}", f"({100 * (before - after) / before:.2f}", "%)"]
    assert ["parameters", f"{before:,}", f"{after:,}", *gone] in lines
    assert run(["inspect", str(shorter), "--dense", str(dense), "--quiet"]) == 0
    assert "the removed blocks are not known: the model has no pruning.json" in capsys.readouterr().out
    file = tmp_path / "found.json"
    assert run(["inspect", str(smaller), "--dense", str(dense), "--quiet", "--json", str(file)]) == 0
    values = json.loads(file.read_text())["smaller"]
    assert values["parameters"] == {"before": before, "after": after}
    assert len(values["blocks"]) == 3


def test_the_command_counts_blocks_as_a_run_does(capsys: pytest.CaptureFixture[str]) -> None:
    """From 1, and names layers relative to the block, however deep it lies."""
    sizes = {"block_count": Change(before=3, after=2)}
    same = Change(before=100, after=100)
    names = ("model.decoder.layers.0.fc2", "model.language_model.layers.0.mlp.experts.1.down_proj")
    blocks = [
        BlockChange(dense_block=0, block=0, parameters=same, removed={names[0]: [4], names[1]: [0, 2]}),
        BlockChange(dense_block=1, block=None, parameters=Change(before=100, after=0), removed={}),
        BlockChange(dense_block=2, block=1, parameters=same, removed={}),
    ]
    show_shrinkage(
        Shrinkage(
            dense="dense",
            sizes=sizes,
            parameters=same,
            block_parameters=same,
            tensor_bytes=same,
            file_bytes=Change(before=100, after=150),
            blocks=blocks,
        )
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [
        "1",
        "1",
        "100",
        "100",
        "0",
        "(0.00",
        "%)",
        "fc2:",
        "1",
        "unit,",
        "mlp.experts.1.down_proj:",
        "2",
        "units",
    ] in lines
    assert ["2", "removed", "100", "0", "100", "(100.00", "%)", "-"] in lines
    assert ["3", "2", "100", "100", "0", "(0.00", "%)", "-"] in lines
    # Of a quantised dense model the smaller one in bfloat16 may have more bytes.
    assert ["bytes", "of", "the", "weight", "files", "100", "150", "more", "by", "50", "(50.00", "%)"] in lines
