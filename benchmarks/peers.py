"""Remove neurons or heads by the scores of FLAP or LLM-Pruner, without compensation, to measure only which units they select.

    python benchmarks/peers.py MODEL OUT --score flap --kind neurons --share 0.2 --calibration c4
    thanos eval OUT --text wikitext2

FLAP (arXiv 2312.11983): a unit's score is the variance of the writer's input times the squared norm of its column, summed over
the unit's columns. LLM-Pruner (arXiv 2305.11627), first order: a unit's score is the sum of |weight · gradient of the loss|
over all parameters of the unit. The same fraction of every block is removed, as everywhere in this project. FLAP's bias and
LLM-Pruner's fine-tuning are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thanos import Recipe
from thanos.calibration.making import make_calibration
from thanos.model.layers import find_blocks
from thanos.model.loading import load_model
from thanos.model.source import ModelSource, resolve_model
from thanos.run.unit_counts import remaining_units
from thanos.shrink.folder import write_smaller
from thanos.shrink.units import GROUP, HEADS, NEURONS, QUERY, Units, units_of


def flap_scores(model: Any, units: dict[str, Units], ids: Tensor) -> dict[str, Tensor]:
    """Return the score of each unit of each writer, (units,) float64.

    Args:
        model: the model, on the device of ``ids``.
        units: name of the writer → its units.
        ids: calibration tokens, (samples, length) int64.
    """
    sums = {name: [0, torch.zeros(()), torch.zeros(())] for name in units}

    def hook(name: str) -> Any:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2).double()
            count, total, squares = sums[name]
            sums[name] = [count + len(x), total.to(x) + x.sum(0), squares.to(x) + x.square().sum(0)]

        return see

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in units]
    with torch.inference_mode():
        for row in ids:
            model(input_ids=row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    scores = {}
    for name, (count, total, squares) in sums.items():
        variance = (squares - total.square() / count) / (count - 1)
        layer = model.get_submodule(name)
        axis = 0 if isinstance(layer, nn.Linear) else 1
        scores[name] = (variance * layer.weight.detach().double().square().sum(axis))[units[name].columns].sum(1)
    return scores


def taylor_scores(model: Any, units: dict[str, Units], ids: Tensor) -> dict[str, Tensor]:
    """Like :func:`flap_scores`, with LLM-Pruner's first-order score. The gradient is that of the mean loss."""
    named = dict(model.named_parameters())
    cut = {f"{writer.removesuffix(one.writer)}{part.name}" for writer, one in units.items() for part in one.slices}
    for name in cut:
        named[name].requires_grad_(True)
    for row in ids:
        (model(input_ids=row[None], labels=row[None], use_cache=False).loss / len(ids)).backward()
    scores = {}
    for writer, one in units.items():
        score = torch.zeros(len(one), dtype=torch.float64, device=ids.device)
        for part in one.slices:
            weight = named[f"{writer.removesuffix(one.writer)}{part.name}"]
            salience = (weight.detach() * weight.grad).double().abs()
            score += salience.movedim(part.axis, 0).flatten(1).sum(1)[part.index].sum(1)
        scores[writer] = score
    for name in cut:
        named[name].requires_grad_(False)
        named[name].grad = None
    return scores


SCORES = {"flap": flap_scores, "llm-pruner": taylor_scores}


@contextmanager
def folder_of(source: ModelSource, model: Any, beside: Path) -> Iterator[Path]:
    """Yield a folder of safetensors of the model; for a GGUF file, a temporary one next to ``beside``."""
    if source.gguf is None:
        yield source.folder
        return
    with tempfile.TemporaryDirectory(dir=beside.parent) as folder:
        model.save_pretrained(folder)
        source.tokenizer().save_pretrained(folder)
        yield Path(folder)


def main() -> int:
    """Score the units, and write the model without those of the smallest scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--score", choices=SCORES, required=True)
    parser.add_argument("--kind", choices=(NEURONS, HEADS), default=NEURONS)
    parser.add_argument("--head-unit", choices=(GROUP, QUERY), default=GROUP)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--multiple-of", type=int, help="default: 64 neurons, or 1 unit of heads")
    parser.add_argument("--calibration", default=Recipe().calibration)
    parser.add_argument("--samples", type=int, default=Recipe().samples)
    parser.add_argument("--sequence-length", type=int, default=Recipe().sequence_length)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    recipe = Recipe(
        calibration=arguments.calibration,
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
        device=arguments.device,
    )
    if arguments.out.exists():
        parser.error(f"OUT {arguments.out} exists; give a folder that does not")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    source, device = resolve_model(arguments.model), torch.device(arguments.device)
    ids = make_calibration(source, recipe, device, lambda event: None).ids.to(device)
    model: Any = load_model(source, dtype="float32", device=device)
    prefix, blocks = find_blocks(model)
    units = {
        f"{prefix}.{number}.{one.writer}": one
        for number, found in enumerate(units_of(model, blocks, arguments.kind, arguments.head_unit))
        for one in found
    }
    if not units:
        parser.error(f"{type(model).__name__} is a mixture of experts, whose neurons are not scored here")
    multiple = arguments.multiple_of or (64 if arguments.kind == NEURONS else 1)
    count = len(next(iter(units.values())))
    stay = remaining_units(count, arguments.share, multiple, arguments.kind)
    scores = SCORES[arguments.score](model, units, ids)
    kept = {name: score.topk(stay).indices.sort().values.cpu() for name, score in scores.items()}
    with folder_of(source, model, arguments.out) as folder:
        made = write_smaller(folder, arguments.out, kept, head_unit=arguments.head_unit)
    print(json.dumps({"score": arguments.score, "kind": arguments.kind, "units_that_stay": stay} | vars_of(made)))
    return 0


def vars_of(made: Any) -> dict[str, int]:
    """Return the counts of parameters and bytes."""
    return {name: getattr(made, name) for name in ("parameters", "nbytes", "dense_parameters", "dense_nbytes")}


if __name__ == "__main__":
    sys.exit(main())
