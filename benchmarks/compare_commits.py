r"""Prove that two commits write the same pruned models, byte for byte, on this machine.

    python benchmarks/compare_commits.py OLD NEW --demo .demo/model.gguf

The source of each commit is unpacked, and its code prunes the same models: a tiny random Llama, GPT-2 and Mixtral, with the
methods of ``METHODS``, unstructured, 2:4, in columns and with outlier rows. One run is interrupted and resumed, and one runs on
two processes. With ``--demo`` it also prunes a real model at 50 % with 4 × 256 tokens. Tensors must be equal byte for byte.
``pruning.json`` must be equal except for times, memory, the schema number and new keys. Otherwise the exit code is 1, with one
line for each difference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METHODS = ("magnitude", "wanda", "sparsegpt", "thanos")
PATTERNS: dict[str, dict[str, Any]] = {
    "unstructured": {"sparsity": 0.5},
    "2:4": {"pattern": "2:4"},
    "columns": {"pattern": "columns", "sparsity": 0.25},
    "outlier-rows": {"sparsity": 0.5, "outlier_rows": 0.1},
}
SETTINGS = {"samples": 8, "sequence_length": 64, "device": "cpu"}

VOLATILE = {"schema", "seconds", "host_peak_bytes", "device_peak_bytes", "phases"}
"""Keys of ``pruning.json``, at any depth, that hold times, memory or the version of the format."""

_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
_LLAMA: dict[str, Any] = {
    **_SIZES,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "gpt2": ("GPT2Config", {**_SIZES, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


def make_models(folder: Path) -> None:
    """Write the tiny models, each with a tokenizer that has one token per number, and the calibration text."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(
        models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **{str(i): i for i in range(3, 320)}}, "<pad>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", bos_token="<s>")
    for name, (config, sizes) in MODELS.items():
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes))
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(0)
    (folder / "numbers.txt").write_text(" ".join(str(draw.randrange(3, 320)) for _ in range(20_000)), encoding="utf-8")


def write_all(models: Path, out: Path, demo: Path | None) -> None:
    """Prune everything with the ``thanos`` that Python imports; write the results to folders in ``out``."""
    import thanos

    text = str(models / "numbers.txt")
    for model, method, pattern in itertools.product(MODELS, METHODS, PATTERNS):
        recipe = thanos.Recipe(method=method, calibration=text, **SETTINGS, **PATTERNS[pattern])
        thanos.prune(models / model, out / f"{model}-{method}-{pattern}", recipe)
    recipe = thanos.Recipe(calibration=text, **SETTINGS)
    resumed = out / "resumed"
    try:
        thanos.prune(models / "llama", resumed, recipe, on_event=_interrupt)
    except KeyboardInterrupt:
        thanos.prune(models / "llama", resumed, recipe, resume=True)
    else:
        raise SystemExit("the run that was to be interrupted ended by itself")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "thanos",
        "prune",
    ]
    command += [str(models / "mixtral"), str(out / "two-processes"), "--calibration", text, "--device", "cpu"]
    command += ["--samples", str(SETTINGS["samples"]), "--sequence-length", str(SETTINGS["sequence_length"])]
    subprocess.run(command, check=True, capture_output=True)
    if demo is not None:
        small = {"calibration": "pydoc", "samples": 4, "sequence_length": 256, "device": "cpu"}
        thanos.prune(demo, out / "demo", thanos.Recipe(**small))


def _interrupt(event: Any) -> None:
    if event.kind == "block" and event.block == 1:
        raise KeyboardInterrupt


def differences(old: Path, new: Path) -> Iterator[str]:
    """Yield a line for each file that only one commit wrote, and for each difference in a file of tensors or JSON."""
    files = sorted({path.relative_to(root) for root in (old, new) for path in root.rglob("*") if path.is_file()})
    for file in files:
        if not (old / file).is_file() or not (new / file).is_file():
            yield f"{file}: only one commit writes it"
        elif file.name == "pruning.json":
            before, after = (steady(json.loads((root / file).read_bytes())) for root in (old, new))
            yield from (f"{file}: {line}" for line in unequal(before, after))
        elif file.suffix in (".safetensors", ".json") and (old / file).read_bytes() != (new / file).read_bytes():
            yield f"{file}: differs"


def steady(value: Any) -> Any:
    """Return a report's values without those that differ from run to run."""
    if isinstance(value, dict):
        return {key: steady(item) for key, item in value.items() if key not in VOLATILE}
    return [steady(item) for item in value] if isinstance(value, list) else value


def unequal(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """Yield one line for each difference between two nested values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old):  # keys that only the new commit has are ignored
            yield from unequal(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from unequal(one, other, f"{at}[{number}]")
    elif old != new:
        yield f"{at}: {str(old)[:80]} became {str(new)[:80]}"


def run_commit(commit: str, work: Path, arguments: list[str]) -> Path:
    """Unpack a commit's source and let it prune everything; return the folder of results."""
    root = Path(__file__).resolve().parents[1]
    source, out = work / f"source-{commit}", work / f"out-{commit}"
    source.mkdir()
    archive = subprocess.run(["git", "archive", commit, "src"], cwd=root, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", source], input=archive, check=True)
    # One thread, so that the order of sums does not depend on the machine's load.
    environment = {**os.environ, "PYTHONPATH": str(source / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, "--write", str(out), *arguments], env=environment, check=True)
    return out


def main() -> None:
    """Compare two commits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", help="the two commits")
    parser.add_argument("--demo", type=Path, help="a real model, pruned as well")
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_all(options.models, options.write, options.demo)
        return
    if len(options.commits) != 2:
        parser.error("name two commits")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_models(work / "models")
        demo = ["--demo", str(options.demo.resolve())] if options.demo else []
        arguments = ["--models", str(work / "models"), *demo]
        old, new = (run_commit(commit, work, arguments) for commit in options.commits)
        lines = list(differences(old, new))
        runs = sum(1 for _ in old.iterdir())
        tensors = sum(1 for _ in old.rglob("*.safetensors"))
    for line in lines:
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"{runs} runs, {tensors} files of tensors: {len(lines)} differences\n")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
