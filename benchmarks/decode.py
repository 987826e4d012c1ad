"""Time decoding of a model of a known size with random weights in 16:32, dense and packed, in one process.

    python benchmarks/decode.py [--shape llama-3-8b] [--blocks N] [--device cuda] [--context 128] [--compile] [--results FILE]

Layers of one size have the same weights, which repeat at most 1024 random rows, since packing many rows is slow. The script
prints a JSON line for each model, measured as by ``thanos bench decode``. A last line compares the packed model with the dense
one: the ratios of tokens per second and of bytes of the weights, the number of groups of layers that run as one launch, and the
number of equal tokens. It also has the rate at which the device reads memory, in GB/s.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from packed_weights import drawn_rows, make, repeated
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from thanos.bench.decode import read_rate, time_network
from thanos.bench.measure import machine
from thanos.bench.synthetic import SHAPES
from thanos.sparse.formats import PackedWeight
from thanos.sparse.modules import PackedLinear
from thanos.sparse.siblings import find_siblings, join


def random_model(config: LlamaConfig, device: str) -> tuple[Any, dict[str, PackedWeight], list[list[str]]]:
    """Return a dense model in 16:32, its layers packed, and the layers that share an input."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    names = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and "lm_head" not in name]
    groups = find_siblings(model, names)
    rotary = type(model.model.rotary_emb)(config).to(device)
    model.to_empty(device=device).eval()
    model.model.rotary_emb = rotary
    made: dict[tuple[int, int], tuple[torch.Tensor, PackedWeight]] = {}
    packed = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        layer = name.removesuffix(".weight")
        if layer not in names:
            parameter.fill_(1) if parameter.dim() == 1 else parameter.normal_(0, parameter.shape[1] ** -0.5)
            continue
        rows, columns = parameter.shape
        if (rows, columns) not in made:
            drawn = make((drawn_rows(rows), columns), 0.0, torch.float32, device) * (2 / columns) ** 0.5
            made[rows, columns] = repeated(drawn.bfloat16(), rows, device)
        weight, one = made[rows, columns]
        parameter.copy_(weight)
        packed[layer] = PackedWeight(one.spec, one.words.clone(), None)
    return model, packed, groups


def replace(model: Any, packed: dict[str, PackedWeight], groups: list[list[str]]) -> None:
    """Replace the dense layers by the packed ones."""
    layers = {}
    for name, weight in packed.items():
        layers[name] = PackedLinear(weight.spec, bias=False, device="meta")
        layers[name].weight_words = nn.Parameter(weight.words, requires_grad=False)
        model.set_submodule(name, layers[name])
    for group in groups:
        join([layers[name] for name in group if name in layers])


@torch.inference_mode()
def main() -> int:
    """Time both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b", choices=sorted(SHAPES))
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shape = SHAPES[arguments.shape]
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=arguments.blocks or shape.blocks,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
        max_position_embeddings=8192,
    )
    model, packed, groups = random_model(config, arguments.device)
    device = torch.device(arguments.device)
    figures = []
    for name in ("dense", "packed"):
        if name == "packed":
            replace(model, packed, groups)
            torch._dynamo.reset()
        one = time_network(
            model, name, context=arguments.context, new_tokens=arguments.new_tokens, compiled=arguments.compile
        )
        figures.append(one)
        row = {"shape": arguments.shape, "compiled": arguments.compile, **dataclasses.asdict(one)}
        print(json.dumps({**row, "tokens": one.tokens[:8]}), flush=True)
        if arguments.results is not None:
            with arguments.results.open("a") as file:
                file.write(json.dumps({**row, "machine": machine(arguments.device)}) + "\n")
    dense, ours = figures
    summary = {
        "speed": round(ours.tokens_per_second / dense.tokens_per_second, 3),
        "bytes": round(ours.weight_bytes / dense.weight_bytes, 4),
        "joint_groups": len(groups),
        "read_rate": round(read_rate(device) / 1e9, 1),
        "same_tokens": sum(1 for a, b in zip(dense.tokens, ours.tokens, strict=True) if a == b),
    }
    print(json.dumps(summary), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
