"""``thanos bench layer``: time and error of the solvers on one layer, and a lower bound of the time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from thanos import registry
from thanos.cli.options import JsonFile, Threads, examples, given, option, use_threads, with_settings
from thanos.errors import RecipeError
from thanos.settings import Heading, in_words

_METHODS = registry.blockwise_methods()
_PATTERNS = registry.example_patterns()[:2]  # unstructured, and the most common n:m
_REFERENCES = [f"{name}=DIR" for name in registry.reference_classes()]

EXAMPLES = examples(
    ("Time Thanos and SparseGPT on one layer", "thanos bench layer --shape 4096x14336"),
    (
        "Compare block sizes with 2:4 on the GPU",
        "thanos bench layer --method thanos --pattern 2:4 --block-size 128 --block-size 512 --device cuda",
    ),
    ("Time a reference implementation too", "thanos bench layer --peer sparsegpt=../sparsegpt"),
)

_PLURALS = {"method": "methods", "pattern": "patterns", "block_size": "block_sizes"}


@with_settings(
    "method",
    "pattern",
    "sparsity",
    "block_size",
    "damping",
    "seed",
    "device",
    repeated=_PLURALS,
    changed={
        "method": {"default": in_words(_METHODS)},
        "pattern": {
            "default": in_words(_PATTERNS),
            "choices": lambda: [
                f"{row.matrix_name or row.name} ({row.help})"
                for row in registry.patterns()
                if row.matrix_name is not None
            ],
        },
        "sparsity": {"default": "0.5; some patterns set their own"},
        "seed": {"help": "Seed of the random layer", "heading": Heading.LAYER},
    },
)
def layer(
    *,
    shape: Annotated[
        list[str] | None,
        option("Rows x columns of a weight; may be repeated", Heading.LAYER, "ROWSxCOLUMNS", default="2048x2048"),
    ] = None,
    tokens: Annotated[
        int | None,
        option("Tokens of the layer's inputs, for the Hessian", Heading.LAYER, "N", default="four per column"),
    ] = None,
    repeats: Annotated[int, option("Number of timed runs; the median is shown", Heading.LAYER, "N")] = 5,
    peer: Annotated[
        list[str] | None,
        option(
            f"Also measure a method's reference implementation in the folder DIR: {' or '.join(_REFERENCES)}; may be repeated",
            Heading.LAYER,
            "NAME=DIR",
        ),
    ] = None,
    threads: Threads = None,
    json_file: JsonFile = None,
    **settings: Any,
) -> None:
    """Time the solvers on one layer of random weights and realistic inputs; show the error and a lower bound of the time."""
    shapes = tuple(parse_shape(text) for text in shape or ["2048x2048"])
    peers = dict(parse_peer(text) for text in peer or [])
    from thanos.bench.layer import LayerSettings, report, run
    from thanos.cli import output, tables
    from thanos.system.device import choose_device

    if tokens is not None and tokens < 1:
        raise RecipeError(f"--tokens must be at least 1; got {tokens}")
    use_threads(threads)
    tables.check_writable(json_file)
    chosen = {"method": _METHODS, "pattern": _PATTERNS, **given(settings)}
    device = str(choose_device(chosen.pop("device", "auto")))
    layer_settings = LayerSettings(
        shapes=shapes,
        tokens=tokens,
        repeats=repeats,
        device=device,
        peers=peers,
        **{_PLURALS.get(name, name): value for name, value in chosen.items()},
    )
    results = list(run(layer_settings))
    if json_file is not None:
        tables.write_json(report(layer_settings, results), json_file)
    if not tables.to_stdout(json_file):
        output.show_layer_times(results)


def parse_shape(text: str) -> tuple[int, int]:
    """Return the rows and columns of a text such as ``4096x14336``. Raises RecipeError for another form."""
    rows, _, columns = text.lower().replace("×", "x").partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise RecipeError(f"--shape {text!r} must be rows x columns, such as 4096x14336")
    return int(rows), int(columns)


def parse_peer(text: str) -> tuple[str, Path]:
    """Return the name and the folder of ``NAME=DIR``. Raises RecipeError for another form."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise RecipeError(f"--peer {text!r} must be NAME=DIR, such as {_REFERENCES[0]}")
    return name, Path(folder)
