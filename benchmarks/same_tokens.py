"""Compare the greedy tokens of a packed model with those of the unpacked one, and both with float32.

    python benchmarks/same_tokens.py DENSE PACKED [--new-tokens 64] [--prompts 3] [--results FILE]

The script prints a JSON line for each prompt: the number of tokens before the first difference, and the root mean square
difference of both models' logits from those of the same weights in float32, on the dense model's tokens. At the first different
token it shows the token of each model and the gap between the two largest logits in float32. If the gap is smaller than the
differences, rounding decides. A last line is a summary. DENSE is the folder that ``thanos unpack`` makes of PACKED. Models run
on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from thanos.bench.measure import machine
from thanos.sparse import packed_modules

PROMPTS = (
    "The capital of France is",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "Once upon a time there was a",
    "Water boils at a temperature of",
    "import os\n\ndef list_files(folder):\n",
    "A list is a sequence of values that",
)


def steps(model: Any, prompt: Tensor, count: int, tokens: list[int] | None = None) -> tuple[list[int], Tensor]:
    """Return tokens and their logits, (count, vocabulary) float32, one token per step: greedy ones, or those in ``tokens``."""
    cache, ids, chosen, logits = None, prompt, [], []
    for index in range(count):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[0, -1].float())
        chosen.append(int(logits[-1].argmax()) if tokens is None else tokens[index])
        ids = torch.tensor([chosen[-1:]])
    return chosen, torch.stack(logits)


def compare(dense: Any, packed: Any, wide: Any, prompt: Tensor, count: int) -> dict[str, Any]:
    """Return the figures of one prompt; ``wide`` is the dense model in float32."""
    theirs, logits = steps(dense, prompt, count)
    ours, _ = steps(packed, prompt, count)
    _, exact = steps(wide, prompt, count, theirs)
    _, along = steps(packed, prompt, count, theirs)
    same = next((index for index in range(count) if theirs[index] != ours[index]), count)
    figures: dict[str, Any] = {
        "same": same,
        "distance_dense": round((logits - exact).pow(2).mean().sqrt().item(), 4),
        "distance_packed": round((along - exact).pow(2).mean().sqrt().item(), 4),
        "agree_dense": int((logits.argmax(-1) == exact.argmax(-1)).sum()),
        "agree_packed": int((along.argmax(-1) == exact.argmax(-1)).sum()),
    }
    if same < count:
        first, second = exact[same].topk(2).values.tolist()
        chosen = {"float32": int(exact[same].argmax()), "dense": theirs[same], "packed": ours[same]}
        figures |= {"gap": round(first - second, 4), "chosen": chosen}
    return figures


@torch.inference_mode()
def main() -> int:
    """Compare both models on each prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("packed")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=3, choices=range(1, len(PROMPTS) + 1))
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    dense: Any = AutoModelForCausalLM.from_pretrained(arguments.dense).eval()
    packed: Any = AutoModelForCausalLM.from_pretrained(arguments.packed).eval()
    wide: Any = AutoModelForCausalLM.from_pretrained(arguments.dense, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.dense)
    rows = []
    for prompt in PROMPTS[: arguments.prompts]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        rows.append(compare(dense, packed, wide, ids, arguments.new_tokens))
        print(json.dumps({"prompt": prompt, **rows[-1]}), flush=True)
    summary = {
        "packed_layers": len(packed_modules(packed)),
        "dtype": str(dense.dtype).removeprefix("torch."),
        "prompts": len(rows),
        "identical": sum(row["same"] == arguments.new_tokens for row in rows),
        "tokens": arguments.new_tokens * len(rows),
        **{key: sum(row[key] for row in rows) for key in ("same", "agree_dense", "agree_packed")},
        "machine": machine("cpu"),
    }
    print(json.dumps(summary), flush=True)
    if arguments.results is not None:
        arguments.results.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, summary]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
