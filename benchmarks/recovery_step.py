"""Time a step of a recovery's training, with and without the compiler.

    python benchmarks/recovery_step.py MODEL [--sequences 4] [--length 2048] [--steps 10] [--device cuda]

MODEL is a folder with a config.json; its weights are not read. Both models have random weights: the dense one in bfloat16, the
pruned one in float32 with a random half of the linear weights of its blocks set to zero. A step is that of `thanos recover`
without its guard and its reports: the loss, the gradients, the mask, the clipped norm and AdamW. The script prints one JSON
line for each of the two ways: tokens a second, seconds of a step, seconds of the first steps (which compile), peak memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from thanos.bench.measure import machine, synchronize
from thanos.model.layers import linear_layers
from thanos.recovery.compiling import compiled
from thanos.recovery.distance import Distillation
from thanos.recovery.trainer import BETAS, CLIP

_FIRST = 3
"""Number of steps before the timed ones."""


def main() -> int:
    """Print a line without and a line with the compiler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sequences", type=int, default=4, help="sequences in a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    module, masks = random_pair(arguments.model, device)
    for compile_them in (False, True):
        said: list[str] = []
        with compiled(module, said.append) if compile_them else nullcontext():
            row = timed(module, masks, arguments, device)
        about = {"compiled": compile_them, "sequences": arguments.sequences, "length": arguments.length}
        print(json.dumps(about | row | {"notes": said, "machine": machine(str(device))}), flush=True)
    return 0


def random_pair(folder: str, device: torch.device) -> tuple[Distillation, dict[str, Tensor]]:
    """Return two models with random weights and their loss, and the masks by parameter name of the pruned one."""
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    dense: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).requires_grad_(False)
    pruned: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).requires_grad_(False)
    masks = {}
    with torch.no_grad():
        for layer in linear_layers(pruned):
            if layer.block is not None:
                weight = pruned.get_parameter(layer.weight_name).requires_grad_(True)
                masks[layer.weight_name] = torch.rand_like(weight) < 0.5
                weight.mul_(masks[layer.weight_name])
    return Distillation(pruned, dense.eval()), masks


def timed(
    module: Distillation, masks: dict[str, Tensor], arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Run the steps; return their figures."""
    cuda = device.type == "cuda"
    weights = [module.student.get_parameter(name) for name in masks]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, betas=BETAS, weight_decay=0.0, fused=cuda)
    vocabulary = module.student.config.vocab_size
    ids = torch.randint(vocabulary, (arguments.sequences, arguments.length), device=device)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)

    def steps(count: int) -> float:
        synchronize(str(device))
        began = time.perf_counter()
        for _ in range(count):
            module(ids).backward()
            for weight, mask in zip(weights, masks.values(), strict=True):
                weight.grad.mul_(mask)
            torch.nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            optimizer.zero_grad()
        synchronize(str(device))
        return time.perf_counter() - began

    first, seconds = steps(_FIRST), steps(arguments.steps) / arguments.steps
    return {
        "tokens_per_second": ids.numel() / seconds,
        "step_seconds": seconds,
        "first_seconds": first,
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
    }


if __name__ == "__main__":
    sys.exit(main())
