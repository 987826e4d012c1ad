"""``thanos bench layer``: how fast one layer is solved, how exactly, how far from the floor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thanos import registry
from thanos.cli.options import Threads, option, use_threads
from thanos.errors import RecipeError
from thanos.system.documents import json_text

_METHODS = registry.compensating_methods()
_PATTERNS = registry.example_patterns()[:2]  # any entry, and the commonest n:m
_REFERENCES = [f"{name}=DIR" for name in registry.reference_classes()]


def layer(
    shape: Annotated[
        list[str] | None, option("Rows x columns of a weight; may be repeated (default: 2048x2048).", "CxB")
    ] = None,
    method: Annotated[
        list[str] | None, option(f"A method; may be repeated (default: {' and '.join(_METHODS)}).", "NAME")
    ] = None,
    pattern: Annotated[
        list[str] | None,
        option(f"A pattern; may be repeated (default: {' and '.join(_PATTERNS)}).", "PATTERN", "--pattern"),
    ] = None,
    block_size: Annotated[
        list[int] | None,
        option("Columns handled together; may be repeated (default: the method's own).", "COLUMNS"),
    ] = None,
    sparsity: Annotated[
        float, option("Share of weights to remove where the pattern does not say (default 0.5).", "SHARE")
    ] = 0.5,
    damping: Annotated[
        float, option("Added to the Hessian's diagonal, as a share of its mean (default 0.01).", "SHARE")
    ] = 0.01,
    tokens: Annotated[
        int | None, option("Tokens that the Hessian is made from (default: four per column).", "N")
    ] = None,
    repeats: Annotated[int, option("Timed runs, of which the median counts (default 5).", "N")] = 5,
    seed: Annotated[int, option("Seed of the layer (default 0).", "N")] = 0,
    device: Annotated[
        str, option("auto, cpu, cuda or cuda:N (default auto: CUDA where there is any).", "DEVICE", "--device")
    ] = "auto",
    peer: Annotated[
        list[str] | None,
        option(
            f"Measure a method's reference implementation too, {' or '.join(_REFERENCES)}, DIR its repository; may be "
            "repeated (default: none).",
            "NAME=DIR",
        ),
    ] = None,
    threads: Threads = None,
    json_file: Annotated[
        Path | None, option("Write the result as JSON, - for the standard output (default: none).", "FILE", "--json")
    ] = None,
) -> None:
    """Time the solvers on one layer of random weights and realistic inputs, and show error and floor beside."""
    shapes = tuple(parse_shape(text) for text in shape or ["2048x2048"])
    peers = dict(parse_peer(text) for text in peer or [])
    from thanos.bench.layer import LayerSettings, report, run
    from thanos.cli import output as tables
    from thanos.system.device import choose_device

    if tokens is not None and tokens < 1:
        raise RecipeError(f"--tokens must be at least 1; got {tokens}")
    use_threads(threads)
    tables.check_writable(json_file)
    settings = LayerSettings(
        shapes=shapes,
        methods=tuple(method or _METHODS),
        patterns=tuple(pattern or _PATTERNS),
        block_sizes=tuple(block_size or (None,)),
        tokens=tokens,
        sparsity=sparsity,
        damping=damping,
        repeats=repeats,
        device=str(choose_device(device)),
        peers=peers,
        seed=seed,
    )
    results = list(run(settings))
    if json_file is not None:
        text = json_text(report(settings, results))
        if str(json_file) == "-":
            typer.echo(text, nl=False)
            return
        json_file.write_text(text, encoding="utf-8")
    tables.show_layer_times(results)


def parse_shape(text: str) -> tuple[int, int]:
    """Read ``4096x14336`` as rows and columns.

    Raises:
        RecipeError: it is anything else.
    """
    rows, _, columns = text.lower().replace("×", "x").partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise RecipeError(f"--shape {text!r} must be rows x columns, such as 4096x14336")
    return int(rows), int(columns)


def parse_peer(text: str) -> tuple[str, Path]:
    """Read ``NAME=DIR``.

    Raises:
        RecipeError: it is anything else.
    """
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise RecipeError(f"--peer {text!r} must be NAME=DIR, such as {_REFERENCES[0]}")
    return name, Path(folder)
