"""Random checkpoints of a given config: what they hold, and that they are the same every time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import thanos
from helpers import ROOT


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from make_checkpoint import write_initial

    yield write_initial
    sys.modules.pop("make_checkpoint", None)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    values = json.loads((ROOT / "studies" / "opt-125m.json").read_text())
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_attention_heads": 2, "vocab_size": 320}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**values, **sizes, "num_hidden_layers": 2, "max_position_embeddings": 64}))
    return path


def test_a_config_and_a_tokenizer_make_a_model_that_can_be_pruned(
    write: Callable[..., int], config: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    assert write(tmp_path / "a", config, tiny_llama, seed=3) > 0
    write(tmp_path / "b", config, tiny_llama, seed=3)
    write(tmp_path / "c", config, tiny_llama, seed=4)
    a, b, c = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    q, k = (f"model.decoder.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    assert not torch.equal(a[q], c[q])
    assert not torch.equal(a[q], a[k])
    assert a[q].dtype == torch.bfloat16
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "a").vocab_size == AutoTokenizer.from_pretrained(tiny_llama).vocab_size
    )
    # A block size beyond the width is the whole width.
    recipe = thanos.Recipe(block_size=2048, calibration=str(text_file), samples=2, sequence_length=16, device="cpu")
    report = thanos.prune(tmp_path / "a", tmp_path / "out", recipe)
    assert report.totals["sparsity_targeted"] == pytest.approx(0.5, abs=0.01)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(
    write: Callable[..., int], config: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 4}))
    with pytest.raises(SystemExit, match="vocabulary of 4"):
        write(tmp_path / "m", config, tiny_llama)


def test_the_studys_shape_is_that_of_opt_125m() -> None:
    from transformers import AutoConfig

    from thanos.model.meta_model import build_meta_model

    config = AutoConfig.for_model(**json.loads((ROOT / "studies" / "opt-125m.json").read_text()))
    parameters = sum(p.numel() for p in build_meta_model(config, torch.bfloat16).parameters())
    assert parameters == 125_239_296
