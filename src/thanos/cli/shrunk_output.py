"""The output of ``inspect --dense``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thanos.cli.tables import inside_block, print_table

if TYPE_CHECKING:
    from thanos.evaluation.shrunk import Change, Shrinkage

_SIZES = {
    "block_count": "decoder blocks",
    "mlp_width": "neurons of each MLP or expert",
    "query_heads": "query heads of each block",
    "key_value_heads": "key-value heads of each block",
}

_UNKNOWN = "the removed blocks are not known: the model has no pruning.json that names as many"


def show_shrinkage(found: Shrinkage) -> None:
    """Print the parts of its dense parent that a smaller model lacks: by block, and in total.

    Blocks are counted from 1, as in the display of a run and in the model card.
    """
    rows = []
    for one in found.blocks:
        if one.parameters is None:
            continue
        removed = [f"{inside_block(name)}: {_units(len(units))}" for name, units in one.removed.items()]
        rows.append(
            (
                *("removed" if index is None else str(index + 1) for index in (one.dense_block, one.block)),
                *_cells(one.parameters),
                ", ".join(removed[:2]) + (f" and {len(removed) - 2} more" if len(removed) > 2 else "") or "-",
            )
        )
    head = ("dense block", "block", "parameters before", "after", "removed", "pruning.json says")
    print_table(head, rows) if rows else print(_UNKNOWN)
    sizes = [(_SIZES[name], *_cells(change)) for name, change in found.sizes.items()]
    totals = [
        ("parameters", *_cells(found.parameters)),
        ("parameters of the blocks", *_cells(found.block_parameters)),
        ("bytes of all tensors", *_cells(found.tensor_bytes)),
        ("bytes of the weight files", *_cells(found.file_bytes)),
    ]
    print_table((f"against {found.dense}", "before", "after", "removed"), [*sizes, *totals])


def _units(number: int) -> str:
    return f"{number} unit{'' if number == 1 else 's'}"


def _cells(change: Change) -> tuple[str, str, str]:
    gone = change.before - change.after
    more = "more by " if gone < 0 else ""  # bytes against a quantised dense model
    return f"{change.before:,}", f"{change.after:,}", f"{more}{abs(gone):,} ({100 * abs(gone) / change.before:.2f} %)"
