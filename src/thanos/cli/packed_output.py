"""The output of the commands about packed models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thanos.cli.tables import inside_block, print_table, show_rows, to_stdout, write_json

if TYPE_CHECKING:
    from thanos.bench.decode import DecodeReport
    from thanos.export.record import LayerPacking, Packing


def show_packing(report: Packing, out: Path, json_file: Path | None) -> None:
    """Print the packed layers by kind, and why others stay dense; write the result as JSON if a file is given.

    Each layer's own values are in the JSON, and in OUT/packing.json.
    """
    if not to_stdout(json_file):
        head = ("kind of layer", "layers", "shape", "format", "bytes", "stays dense because")
        print_table(head, _packing_rows(report.layers))
    packed = [layer for layer in report.layers if layer.format]
    rows = [
        ("packed layers", f"{len(packed)} of {len(report.layers)}"),
        ("bytes of the packed layers", _share_of_bytes(packed)),
        ("bytes of all tensors", f"{report.nbytes:,} of {report.dense_bytes:,}"),
        ("written to", str(out)),
    ]
    values = report.to_dict()
    del values["dense"]  # the files' headers, which only unpack reads
    show_rows(rows, values, json_file)


def _packing_rows(layers: Sequence[LayerPacking]) -> list[tuple[str, ...]]:
    """Return a row for each kind of layer: those of the same name in all blocks, or in all experts, with the same outcome."""
    kinds: dict[tuple[str, ...], list[LayerPacking]] = {}
    for layer in layers:
        name = re.sub(r"\.\d+\.", ".#.", inside_block(layer.name))
        form = f"{layer.format} {layer.n}:32" if layer.n else layer.format or "dense"
        outcome = layer.reason.partition(":")[0]  # reasons of one kind may differ in their numbers
        kinds.setdefault((name, f"{layer.rows} × {layer.columns}", form, outcome), []).append(layer)
    rows = []
    for (name, shape, form, _), found in kinds.items():
        size, dense = sum(layer.nbytes for layer in found), sum(layer.dense_bytes for layer in found)
        share = f"{100 * size / dense:.1f} %" if found[0].format else "-"
        one_of_several = " (the first of them)" if len({layer.reason for layer in found}) > 1 else ""
        rows.append((name, str(len(found)), shape, form, share, found[0].reason + one_of_several or "-"))
    return rows


def _share_of_bytes(layers: Sequence[LayerPacking]) -> str:
    size, dense = sum(layer.nbytes for layer in layers), sum(layer.dense_bytes for layer in layers)
    return f"{100 * size / dense:.2f} %  ({size:,} of {dense:,})"


def show_unpacking(out: Path, *, identical: bool) -> None:
    """Print where the dense folder is, and whether it is the one that was packed."""
    what = "the folder that was packed, byte for byte" if identical else "the same tensors, in new files"
    print_table(("", ""), [("unpacked", what), ("written to", str(out))])


def show_decoding(report: DecodeReport, json_file: Path | None) -> None:
    """Print the decoding speed and the bytes of one model or two, and write them as JSON if a file is given."""
    write_json(report.to_dict(), json_file)
    if to_stdout(json_file):
        return
    base = report.models[-1]
    rows = [
        (
            Path(one.model).name,
            str(one.packed_layers),
            f"{one.tokens_per_second:.1f}",
            f"{one.tokens_per_second / base.tokens_per_second:.2f} ×",
            f"{one.weight_bytes / 1e9:.3f} GB",
            f"{100 * one.weight_bytes / base.weight_bytes:.1f} %",
            f"{one.bytes_per_second / 1e9:.1f} GB/s",
            f"{100 * one.bytes_per_second / report.read_rate:.0f} %",
        )
        for one in report.models
    ]
    head = ("model", "packed layers", "tokens/s", "speed", "weights", "bytes", "weights read", "of memory bandwidth")
    print_table(head, rows, title=f"{report.machine['device']}, batch 1, {report.context} tokens of context")
    if report.same_tokens is not None:
        print(f"the first {report.same_tokens} of {report.new_tokens} new tokens are the same in both models")
