"""Fill the table of docs/scale-out.md: seconds of large models, computed from rates that were measured on one H200.

    python benchmarks/projection.py docs/scale-out.md [--check]

The script measures nothing. The rates are those in ``docs/results/speed/h200`` and ``docs/results/repair``; the page has the
formulas. ``--check`` writes nothing, and fails if the page differs.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from repair_page import chosen, fill_page, read

from thanos.bench.device_rates import Rates
from thanos.bench.model import floor_seconds
from thanos.bench.synthetic import SHAPES, Shape
from thanos.engine.stages.tune_cost import tuning_passes
from thanos.recipe import Recipe

TABLE = re.compile(r"(<!-- projection -->\n).*?(<!-- end -->)", re.DOTALL)

SMOLLM2 = Shape(hidden=576, intermediate=1536, heads=9, kv_heads=3, blocks=30, vocabulary=49152)
SHAPES_TO_PROJECT = {
    "8B": SHAPES["llama-3-8b"],
    "70B": Shape(hidden=8192, intermediate=28672, heads=64, kv_heads=8, blocks=80, vocabulary=128256),
    "405B": Shape(hidden=16384, intermediate=53248, heads=128, kv_heads=8, blocks=126, vocabulary=128256),
}
COLUMNS = (("8B", 1), ("70B", 1), ("70B", 8), ("405B", 1), ("405B", 32))
"""Model and number of GPUs. A host has 8 GPUs."""

SAMPLES, LENGTH, HELD_OUT, EPOCHS = 128, 2048, 8, 10

# Assumed or measured elsewhere; the page lists them.
WITHIN, BETWEEN = 355e9, 200e9  # bytes per second between GPUs of one host, and between hosts
SMALL_SUM = 30e-6  # seconds of a sum of a few numbers over all GPUs
SUMS_A_BLOCK_OF_COLUMNS = 8
TRAINING_BYTES, ROOM = 18, 0.8  # bytes per parameter in a recovery; fraction of the GPU's memory for them


@dataclass(frozen=True, slots=True)
class Measured:
    """Rates from the result files.

    Attributes:
        rates: rates of the device, measured in the run of the whole model.
        excess: seconds of statistics and propagation, relative to their lower bound by the rates.
        factor: seconds of a factor of H⁻¹, divided by b³.
        solve: seconds of the rest of a solve, divided by c b².
        repair: seconds of statistics, dense stream and propagation with the parts of ``high``, relative to those of ``fast``.
        tune, train: operations per second of tuning and of recovery.
        memory: bytes of the device's memory.
    """

    rates: Rates
    excess: float
    factor: float
    solve: float
    repair: float
    tune: float
    train: float
    memory: int

    @classmethod
    def of(cls, results: Path) -> Measured:
        """Read the rates from files in ``results``, the folder ``docs/results``."""
        model = json.loads((results / "speed/h200/model-thanos.json").read_text(encoding="utf-8"))
        layers = json.loads((results / "speed/h200/layer.json").read_text(encoding="utf-8"))["results"]
        lines = read(results / "repair/smollm2-135m.jsonl")
        passes = ("statistics", "propagate")
        own = [
            one
            for one in layers
            if (one["implementation"], one["method"], one["pattern"]) == ("thanos", "thanos", "unstructured")
        ]
        large = sorted(own, key=lambda one: one["rows"] * one["columns"])[-2:]
        widest = max(own, key=lambda one: one["columns"])
        (fast,), (high,), (tuned,), (recovered,) = (
            chosen(lines, [name]) for name in ("fast-thanos", "50-seed1", "only-tune", "50-auto-recovered-1")
        )
        return cls(
            rates=Rates(**model["rates"]),
            excess=sum(model["phases"][name]["seconds"] for name in passes)
            / sum(model["floor_seconds"][name] for name in passes),
            factor=widest["floor_seconds"] / widest["columns"] ** 3,
            solve=max((one["seconds"] - one["floor_seconds"]) / (one["rows"] * one["columns"] ** 2) for one in large),
            repair=sum(high["phases"][name] for name in (*passes, "dense"))
            / sum(fast["phases"][name] for name in passes),
            tune=SMOLLM2.blocks * tuning(SMOLLM2) / tuned["phases"]["tune"],
            train=training(SMOLLM2, passes=3) / recovered["phases"]["train"],
            memory=model["machine"]["memory_bytes"],
        )


def weights(shape: Shape) -> int:
    """Return the number of weights of the linear layers of a block."""
    return sum(rows * columns for rows, columns in shape.layers.values())


def forward(shape: Shape) -> float:
    """Return the operations of a block for one sequence: products, and causal attention."""
    return 2.0 * LENGTH * weights(shape) + 2.0 * LENGTH**2 * shape.hidden


def tuning(shape: Shape) -> float:
    """Return the operations of the tuning of a block."""
    return tuning_passes(EPOCHS, SAMPLES, HELD_OUT) * forward(shape)


def training(shape: Shape, passes: int) -> float:
    """Return the operations of a recovery. ``passes``: 3 of the student, and 1 of the dense model if it runs in each epoch."""
    whole = shape.blocks * forward(shape) + 2.0 * LENGTH * shape.hidden * shape.vocabulary
    return passes * EPOCHS * (SAMPLES - HELD_OUT) * whole


def block(shape: Shape, gpus: int, known: Measured) -> dict[str, float]:
    """Return the seconds of a block by part, at ``--effort fast``."""
    floor = floor_seconds(shape, Recipe(samples=SAMPLES, sequence_length=LENGTH), known.rates)
    inputs = (shape.hidden, shape.hidden, shape.hidden, shape.intermediate)
    reduced, ring = 4 * sum(width**2 for width in inputs), (gpus - 1) / gpus
    wire = WITHIN if gpus <= 8 else BETWEEN
    blocks_of_columns = sum(columns for _, columns in shape.layers.values()) / 128
    return {
        "statistics": known.excess * floor["statistics"] / shape.blocks / gpus,
        "propagate": known.excess * floor["propagate"] / (shape.blocks - 1) / gpus,
        "all-reduce": 2 * ring * reduced / wire,
        "factors": known.factor * sum(width**3 for width in inputs),
        "solve": known.solve * sum(rows * columns**2 for rows, columns in shape.layers.values()) / gpus,
        "small sums": SUMS_A_BLOCK_OF_COLUMNS * SMALL_SUM * blocks_of_columns * (gpus > 1),
        "gather": 3 * weights(shape) * ring / wire,
    }


def table(known: Measured) -> str:
    """Return the table of all columns as Markdown."""
    heads = [f"{name}, {gpus} GPU{'s' * (gpus > 1)}" for name, gpus in COLUMNS]
    shapes = [(SHAPES_TO_PROJECT[name], gpus) for name, gpus in COLUMNS]
    parts = [block(shape, gpus, known) for shape, gpus in shapes]
    sums = [sum(part.values()) for part in parts]
    lines = ["| projected | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for part in parts[0]:
        lines.append(_line(part, [f"{one[part]:.2f} s" if one[part] else "–" for one in parts]))
    lines.append(_line("**sum, a block**", [f"{seconds:.2f} s" for seconds in sums]))
    lines.append(
        _line("**all blocks, `fast`**", [_time(s * shape.blocks) for s, (shape, _) in zip(sums, shapes, strict=True)])
    )
    lines.append(_line("speed-up, efficiency", [_gain(name, gpus, sums) for name, gpus in COLUMNS]))
    more = [
        (known.repair - 1) * (part["statistics"] + part["propagate"]) * shape.blocks
        for part, (shape, _) in zip(parts, shapes, strict=True)
    ]
    lines.append(_line("further passes of `high`", [_time(seconds) for seconds in more]))
    lines.append(
        _line("tuning of `max`", [_time(shape.blocks * tuning(shape) / known.tune / gpus) for shape, gpus in shapes])
    )
    lines.append(_line("recovery", [_recovery(shape, gpus, known) for shape, gpus in shapes]))
    return "\n".join(lines) + "\n"


def _gain(name: str, gpus: int, sums: list[float]) -> str:
    if gpus == 1:
        return ""
    gain = sums[COLUMNS.index((name, 1))] / sums[COLUMNS.index((name, gpus))]
    return f"{gain:.1f}, {100 * gain / gpus:.0f} %"


def _recovery(shape: Shape, gpus: int, known: Measured) -> str:
    parameters = shape.blocks * weights(shape) + 2 * shape.vocabulary * shape.hidden
    needed = max(gpus, math.ceil(TRAINING_BYTES * parameters / (ROOM * known.memory)))
    seconds = _time(training(shape, passes=4) / known.train / needed)
    return seconds if needed == gpus else f"{seconds} on {needed}"


def _line(title: str, cells: list[str]) -> str:
    return f"| {title} | " + " | ".join(cells) + " |"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def filled(page: str, results: Path) -> str:
    """Return the page with its table filled."""
    return TABLE.sub(lambda match: f"{match[1]}{table(Measured.of(results))}{match[2]}", page)


def main() -> int:
    """Write the page, or compare it."""
    return fill_page(__doc__, lambda page, folder: filled(page, folder / "results"))


if __name__ == "__main__":
    sys.exit(main())
