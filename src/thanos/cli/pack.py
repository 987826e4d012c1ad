"""``thanos pack`` and ``thanos unpack``: a pruned model with fewer bytes, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from thanos.cli.options import JsonFile, Quiet, examples, given, option, overwrite_option, with_settings
from thanos.settings import Heading

EXAMPLES = examples(
    ("Pack a model that keeps 16 of 32 weights, or 2 of 4", "thanos pack pruned packed"),
    ("Pack small layers too", "thanos pack pruned packed --least-weights 1"),
)
UNPACK_EXAMPLES = examples(
    ("Restore the dense folder", "thanos unpack packed pruned"),
    ("Replace an earlier copy of it", "thanos unpack packed pruned --overwrite"),
)

Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; appears when it is complete.")]
Overwrite = Annotated[bool, overwrite_option("Replace OUT if it is a model")]


@with_settings("trust_remote_code")
def pack(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The pruned model: a folder of safetensors.", show_default=False)
    ],
    out: Out,
    *,
    least_weights: Annotated[
        int | None, option("Layers with fewer weights stay dense", Heading.PACKING, "N", default="65,536")
    ] = None,
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Write MODEL to OUT with its sparse linear layers packed; show which kinds of layers, and why the others stay dense.

    transformers loads OUT after `import thanos.sparse`.
    """
    from thanos.cli import packed_output, tables
    from thanos.cli import progress as display

    display.hush()
    from thanos.export.pack import pack as write

    tables.check_writable(json_file)
    chosen = {} if least_weights is None else {"least_weights": least_weights}
    with display.watch(quiet=quiet) as watcher:
        report = write(model, out, overwrite=overwrite, on_event=watcher, **chosen, **given(settings))
    packed_output.show_packing(report, out, json_file)


def unpack(
    packed: Annotated[
        str, typer.Argument(metavar="PACKED", help="A folder that thanos pack wrote.", show_default=False)
    ],
    out: Out,
    *,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write the dense folder of PACKED to OUT, equal byte for byte to the folder that was packed."""
    from thanos.cli import packed_output
    from thanos.cli import progress as display

    display.hush()
    from thanos.export.unpack import unpack as write

    with display.watch(quiet=quiet) as watcher:
        dense = write(packed, out, overwrite=overwrite, on_event=watcher)
    packed_output.show_unpacking(out, identical=dense is not None)
