"""``thanos bench model``: a whole model of random weights, by phase, beside the floor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from thanos import registry
from thanos.cli.options import METHOD_HELP, PATTERN_HELP, Threads, option, use_threads
from thanos.errors import RecipeError
from thanos.recipe import Recipe
from thanos.system.suggestions import near


def model(
    shape: Annotated[
        str,
        option("A known model's sizes, such as llama-3-8b; the next options change them (default llama-3-8b).", "NAME"),
    ] = "llama-3-8b",
    hidden: Annotated[int | None, option("Width of the hidden states.", "N")] = None,
    intermediate: Annotated[int | None, option("Width inside the MLP.", "N")] = None,
    heads: Annotated[int | None, option("Attention heads.", "N")] = None,
    kv_heads: Annotated[int | None, option("Heads of keys and values.", "N")] = None,
    vocabulary: Annotated[int | None, option("Tokens of the vocabulary.", "N")] = None,
    whole: Annotated[int | None, option("Blocks of the whole model.", "N", "--model-blocks")] = None,
    blocks: Annotated[
        int | None, option("Measure only the first N blocks, the rest is reckoned (default: all).", "N")
    ] = None,
    method: Annotated[str, option(METHOD_HELP, "NAME")] = registry.DEFAULT_METHOD,
    pattern: Annotated[str, option(PATTERN_HELP, "PATTERN", "--pattern")] = registry.DEFAULT_PATTERN,
    sparsity: Annotated[float | None, option("Share of weights to remove (default 0.5; from N:M).", "SHARE")] = None,
    block_size: Annotated[int | None, option("Columns handled together (default: the method's).", "COLUMNS")] = None,
    samples: Annotated[int, option("Number of calibration sequences (default 128).", "N")] = 128,
    sequence_length: Annotated[int, option("Tokens per sequence (default 2048).", "TOKENS")] = 2048,
    device: Annotated[
        str, option("auto, cpu, cuda or cuda:N (default auto: CUDA where there is any).", "DEVICE", "--device")
    ] = "auto",
    activations: Annotated[
        str, option("Where hidden states are kept: auto, device, host or disk (default auto).", "PLACE")
    ] = "auto",
    out: Annotated[
        Path | None,
        option("Write the result in this folder, and remove it (default: it ends in host memory).", "DIR"),
    ] = None,
    threads: Threads = None,
    json_file: Annotated[
        Path | None, option("Write the result as JSON, - for the standard output (default: none).", "FILE", "--json")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress (default: show it).")] = False,
) -> None:
    """Time pruning a whole model of random weights, by phase, beside the least that this device needs."""
    from thanos.cli import output as tables
    from thanos.cli import progress as display

    display.hush()
    from thanos.bench.model import time_model
    from thanos.bench.synthetic import SHAPES
    from thanos.engine.activations import check_place
    from thanos.system.device import choose_device

    if shape not in SHAPES:
        raise RecipeError(f"--shape must be one of {', '.join(SHAPES)}; got {shape!r}{near(shape, SHAPES)}")
    given = {
        "hidden": hidden,
        "intermediate": intermediate,
        "heads": heads,
        "kv_heads": kv_heads,
        "vocabulary": vocabulary,
        "blocks": whole,
    }
    sizes = replace(SHAPES[shape], **{name: value for name, value in given.items() if value is not None})
    recipe = Recipe(
        method=method,
        pattern=pattern,
        sparsity=sparsity,
        block_size=block_size,
        samples=samples,
        sequence_length=sequence_length,
    )
    if blocks is not None and blocks < 1:
        raise RecipeError(f"--blocks must be at least 1; got {blocks}")
    check_place(activations)
    use_threads(threads)
    tables.check_writable(json_file)
    if out is not None and not out.is_dir():
        raise RecipeError(f"--out {out} is not a folder")
    with display.watch(quiet=quiet) as watcher:
        result = time_model(
            sizes,
            recipe,
            choose_device(device),
            blocks=blocks,
            out=out,
            activations=activations,
            on_event=watcher,
        )
    if json_file is not None:
        text = result.to_json()
        if str(json_file) == "-":
            typer.echo(text, nl=False)
            return
        json_file.write_text(text, encoding="utf-8")
    tables.show_model_time(result)
