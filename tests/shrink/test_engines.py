"""Smaller folders in software that knows nothing of this package: transformers alone, and CTranslate2 with its converter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from helpers import ARCHITECTURES, MIXTURES, VOCABULARY, save_tiny, windows
from shrinking import HEADS, WITH_HEADS, load, zero_heads, zero_neurons
from thanos.shrink.folder import write_smaller

STEPS = 20


def smaller(folder: Path, architecture: str, kind: str, **changes: Any) -> Path:
    """A smaller folder without some random neurons, groups of heads, query heads, or the second block."""
    heads = WITH_HEADS if kind in ("group", "query") else {}
    save_tiny(folder / "full", architecture, **heads, **changes)
    model = load(folder / "full")
    unit, kept = "group", {}
    if kind == "neurons":
        kept = zero_neurons(model, architecture, 16)
    elif kind in ("group", "query"):
        unit, kept = kind, zero_heads(model, architecture, kind, 2 if kind == "group" else 1)
    model.save_pretrained(folder / "full")
    dropped = [1] if kind == "blocks" else []
    write_smaller(folder / "full", folder / "smaller", kept, head_unit=unit, dropped_blocks=dropped)
    return folder / "smaller"


def greedy(folder: Path, ids: list[int]) -> list[int]:
    with torch.inference_mode():
        found = load(folder).generate(torch.tensor([ids]), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    return found[0, len(ids) :].tolist()


ALONE = [
    *((one, "neurons") for one in (*ARCHITECTURES, *MIXTURES)),
    *((one, unit) for one in HEADS for unit in ("group", "query")),
    *((one, "blocks") for one in (*ARCHITECTURES, *MIXTURES)),
]


@pytest.mark.parametrize("kind", ["neurons", "group", "query", "blocks"])
def test_transformers_alone_loads_them_and_generates(kind: str, tmp_path: Path) -> None:
    names = [one for one, what in ALONE if what == kind]
    folders = [str(smaller(tmp_path / name, name, kind)) for name in names]
    ids = windows(1, 10)[0].tolist()
    code = f"""
import sys, torch
sys.modules["thanos"] = None  # whoever imports it fails
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in {folders}:
    model, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    AutoTokenizer.from_pretrained(folder)
    out = model.eval().generate(torch.tensor([{ids}]), max_new_tokens={STEPS}, min_new_tokens={STEPS}, do_sample=False)
    print(out[0, {len(ids)}:].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(greedy(Path(folder), ids)) for folder in folders]


IN_CTRANSLATE2 = [
    *((one, "neurons") for one in ("llama", "tinyllama", "mistral", "qwen2", "qwen3", "opt-125m", "opt-350m", "gpt-2")),
    *((one, unit) for one in ("mistral", "qwen3") for unit in ("group", "query")),
    *((one, "blocks") for one in ("llama", "qwen2", "gpt-2")),
]
"""Architecture and what is removed.

Its converter takes the width of a head from the config for Mistral and Qwen3 only, and does not run with transformers 5
for Phi-3 and GPT-NeoX; tiny Gemmas give other tokens there even at full size.
"""


@pytest.mark.parametrize(("architecture", "kind"), IN_CTRANSLATE2)
def test_ctranslate2_gives_the_same_greedy_tokens(architecture: str, kind: str, tmp_path: Path) -> None:
    engine: Any = pytest.importorskip("ctranslate2", reason="needs ctranslate2, which the extra dev installs")
    from ctranslate2.converters import TransformersConverter

    size = {"gpt-2": 284, "opt-125m": 288, "opt-350m": 288}.get(architecture, VOCABULARY)  # that of the tokenizer there
    folder = smaller(tmp_path, architecture, kind, vocab_size=size)
    TransformersConverter(str(folder)).convert(str(tmp_path / "converted"), quantization="float32")
    generator = engine.Generator(str(tmp_path / "converted"), compute_type="float32", intra_threads=1)
    ids = windows(1, 10)[0].tolist()
    found = generator.generate_batch(
        [AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(ids)],
        max_length=STEPS,
        min_length=STEPS,
        include_prompt_in_result=False,
        end_token=[],
    )
    assert found[0].sequences_ids[0] == greedy(folder, ids)
