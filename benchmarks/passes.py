"""Measure how often a run sends each token through a block's layers, by phase, and the processor time of the phases.

    python benchmarks/passes.py MODEL --blocks 5 6 --json passes.json

The engine of a run works on a few blocks. Each block after the first gets the outputs of the one before. Calls are counted, so
the counts do not depend on the machine. "linear" counts the tokens through the linear layers of the blocks, weighted by the
layers' sizes, and "attention" those through torch's attention function. 1 is one pass of all tokens. Other programs disturb
processor time less than elapsed time, but they share the caches. "hash" is the hash of all written tensors, in order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thanos.bench.measure import machine
from thanos.calibration.making import calibrate
from thanos.checkpoint.in_memory import raw_bytes
from thanos.model.layers import find_blocks
from thanos.model.source import resolve_model
from thanos.planning.scratch import Scratch, TrialMeter
from thanos.recipe import Recipe
from thanos.run.engine_setup import build_engine
from thanos.run.setup import prepare

CPU = torch.device("cpu")


class Watch(TrialMeter):
    """A meter that also counts the tokens that pass through linear layers and attention, by phase."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.work: dict[str, Counter[str]] = {}

    def count(self, name: str, tokens: int) -> None:
        """Add tokens to the phase that is measured now."""
        phase = self._entered[-1] if self._entered else "between phases"
        self.work.setdefault(phase, Counter())[name] += tokens

    def follow(self, block: nn.Module) -> None:
        """Count the calls of a block's linear layers."""
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(
                    lambda _, args, out, name=name: self.count(name, args[0].shape[:-1].numel())
                )


class Hashing(Scratch):
    """The scratch output of a trial that also computes a hash of the written tensors."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.digest = hashlib.blake2b(digest_size=16)

    def write(self, name: str, tensor: Tensor) -> None:
        """See :class:`Scratch`."""
        self.digest.update(raw_bytes(tensor.cpu()))
        super().write(name, tensor)


def main() -> None:
    """Run the engine, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", required=True, help="indices of the blocks")
    parser.add_argument("--effort", default="high")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("effort", "calibration", "samples", "sequence_length")
    }
    recipe, before, watch = Recipe(**settings, device="cpu"), os.getloadavg()[0], Watch()
    prepared = prepare(resolve_model(arguments.model, trust_remote_code=False), recipe, lambda event: None, look=False)
    _, blocks = find_blocks(prepared.opened.meta_model)
    ids = calibrate(prepared.opened, recipe, CPU, lambda event: None, None).ids
    for index in arguments.blocks:
        watch.follow(blocks[index])
    attend = F.scaled_dot_product_attention

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        watch.count("attention", query.shape[0] * query.shape[2])
        return attend(query, *args, **kwargs)

    F.scaled_dot_product_attention = attention
    with tempfile.TemporaryDirectory() as folder, closing(Hashing(Path(folder))) as output:
        output.meter = watch
        outputs: dict[str, Any] = {"writer": output, "journal": output, "meter": watch}
        for _ in build_engine(prepared, recipe, ids, CPU, Path(folder), activations="auto", **outputs).run(
            arguments.blocks
        ):
            pass
    sizes = {
        name: module for name, module in blocks[arguments.blocks[0]].named_modules() if isinstance(module, nn.Linear)
    }
    weights = {name: module.in_features * module.out_features for name, module in sizes.items()}
    tokens = len(arguments.blocks) * arguments.samples * arguments.sequence_length
    passes = {
        phase: {
            "linear": sum(weights.get(name, 0) * n for name, n in work.items()) / sum(weights.values()) / tokens,
            "attention": work["attention"] / tokens,
        }
        for phase, work in watch.work.items()
    }
    total = {kind: sum(one[kind] for one in passes.values()) for kind in ("linear", "attention")}
    report = {
        "schema": 1,
        "benchmark": "passes",
        "machine": machine("cpu") | {"load_average": [before, os.getloadavg()[0]]},
        "settings": settings
        | {"model": arguments.model.name, "blocks": arguments.blocks, "threads": arguments.threads},
        "passes": passes | {"total": total},
        "processor_seconds": watch.busy | {"total": sum(watch.busy.values())},
        "hash": output.digest.hexdigest(),
    }
    arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
