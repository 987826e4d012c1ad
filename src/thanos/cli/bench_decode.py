"""``thanos bench decode``: tokens a second and bytes of a packed model, compared with a dense one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from thanos.cli.options import JsonFile, Quiet, Threads, examples, given, option, use_threads, with_settings
from thanos.settings import Heading

EXAMPLES = examples(
    ("Compare a packed model with the dense one", "thanos bench decode packed --dense pruned"),
    ("Time it on two threads of the CPU", "thanos bench decode packed --dense pruned --device cpu --threads 2"),
)


@with_settings("device", "trust_remote_code")
def decode(
    packed: Annotated[
        str,
        typer.Argument(
            metavar="PACKED", help="A model that thanos pack wrote; other models are timed too.", show_default=False
        ),
    ],
    *,
    dense: Annotated[
        str | None, option("Model to compare with, in the same run", Heading.DECODING, "MODEL", default="none")
    ] = None,
    context: Annotated[int, option("Tokens before the first new token", Heading.DECODING, "N")] = 128,
    new_tokens: Annotated[int, option("New tokens to time", Heading.DECODING, "N")] = 64,
    compiled: Annotated[
        bool, option("Run the steps through torch.compile", Heading.DECODING, None, "--compile")
    ] = False,
    threads: Threads = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Time greedy decoding of PACKED, one token at a time; show the bytes of its weights and the memory bandwidth used.

    On CUDA each step runs as a CUDA graph, with and without --compile.
    """
    from thanos.cli import packed_output, tables
    from thanos.cli import progress as display

    display.hush()
    from thanos.bench.decode import time_decoding
    from thanos.system.device import choose_device

    use_threads(threads)
    tables.check_writable(json_file)
    chosen = given(settings)
    device = choose_device(chosen.pop("device", "auto"))
    with display.watch(quiet=quiet) as watcher:
        report = time_decoding(
            packed,
            dense=dense,
            device=device,
            context=context,
            new_tokens=new_tokens,
            compiled=compiled,
            on_event=watcher,
            **chosen,
        )
    packed_output.show_decoding(report, json_file)
