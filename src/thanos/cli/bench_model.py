"""``thanos bench model``: time of pruning a model with random weights, by phase, and a lower bound of the time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from thanos.cli.options import (
    Activations,
    JsonFile,
    Quiet,
    Threads,
    examples,
    given,
    option,
    use_threads,
    with_settings,
)
from thanos.errors import RecipeError
from thanos.recipe import Recipe
from thanos.settings import Heading
from thanos.system.suggestions import near

EXAMPLES = examples(
    ("Time four blocks of Llama 3 8B and estimate the rest", "thanos bench model --blocks 4"),
    (
        "Time a smaller model with 2:4",
        "thanos bench model --hidden 2048 --intermediate 8192 --model-blocks 16 --pattern 2:4",
    ),
)

_SHAPES = "as in the shape"


@with_settings(
    *("method", "pattern", "sparsity", "block_size", "scope", "effort", "dense_target", "sequential", "refit", "tune"),
    *("samples", "sequence_length", "device"),
)
def model(
    *,
    shape: Annotated[
        str, option("Sizes of a known model, such as llama-3-8b; the next options change them", Heading.SIZES, "NAME")
    ] = "llama-3-8b",
    hidden: Annotated[int | None, option("Width of the hidden states", Heading.SIZES, "N", default=_SHAPES)] = None,
    intermediate: Annotated[int | None, option("Width inside the MLP", Heading.SIZES, "N", default=_SHAPES)] = None,
    heads: Annotated[int | None, option("Number of attention heads", Heading.SIZES, "N", default=_SHAPES)] = None,
    kv_heads: Annotated[
        int | None, option("Number of heads of keys and values", Heading.SIZES, "N", default=_SHAPES)
    ] = None,
    vocabulary: Annotated[
        int | None, option("Number of tokens in the vocabulary", Heading.SIZES, "N", default=_SHAPES)
    ] = None,
    whole: Annotated[
        int | None, option("Blocks of the whole model", Heading.SIZES, "N", "--model-blocks", default=_SHAPES)
    ] = None,
    blocks: Annotated[
        int | None, option("Measure only the first N blocks, and estimate the rest", Heading.RUN, "N", default="all")
    ] = None,
    activations: Activations = "auto",
    threads: Threads = None,
    out: Annotated[
        Path | None,
        option(
            "Write the result to this folder, then delete it", Heading.OUTPUT, "DIR", default="keep it in host memory"
        ),
    ] = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Time the pruning of a model with random weights, by phase, and compare with a lower bound for this device."""
    from thanos.cli import output, tables
    from thanos.cli import progress as display

    display.hush()
    from thanos.bench.model import time_model
    from thanos.bench.synthetic import SHAPES
    from thanos.engine.activations import check_tier
    from thanos.system.device import choose_device

    if shape not in SHAPES:
        raise RecipeError(f"--shape must be one of {', '.join(SHAPES)}; got {shape!r}{near(shape, SHAPES)}")
    changed = {
        "hidden": hidden,
        "intermediate": intermediate,
        "heads": heads,
        "kv_heads": kv_heads,
        "vocabulary": vocabulary,
        "blocks": whole,
    }
    sizes = replace(SHAPES[shape], **{name: value for name, value in changed.items() if value is not None})
    chosen = given(settings)
    device = chosen.pop("device", "auto")
    recipe = Recipe(**chosen)
    if blocks is not None and blocks < 1:
        raise RecipeError(f"--blocks must be at least 1; got {blocks}")
    check_tier(activations)
    use_threads(threads)
    tables.check_writable(json_file)
    if out is not None and not out.is_dir():
        raise RecipeError(f"--out {out} is not a folder that exists; create it first, or leave out --out")
    with display.watch(quiet=quiet) as watcher:
        result = time_model(
            sizes, recipe, choose_device(device), blocks=blocks, out=out, activations=activations, on_event=watcher
        )
    tables.write_json(result.to_dict(), json_file)
    if not tables.to_stdout(json_file):
        output.show_model_time(result)
