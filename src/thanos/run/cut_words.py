"""What was cut out of a model, in words: for the model card and for the command line."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from thanos import registry
from thanos.patterns.units import BLOCKS, HEADS
from thanos.recipe import LayerRecipe
from thanos.recipe.units import HEAD_UNITS

_TOGETHER = dict(
    zip(HEAD_UNITS, ("groups of heads with one key-value head", "query heads of every group"), strict=True)
)


def cut_words(cut: Mapping[str, Any]) -> str:
    """Return what stays, from ``cut`` of a report: ``1,216 of 1,536 neurons left in each block``."""
    sizes = " and ".join(
        f"{size['after']:,} of {size['before']:,} {kind_words(kind, cut)}" for kind, size in cut["units"].items()
    )
    return f"{sizes} left" if BLOCKS in cut["units"] else f"{sizes} left in each block"


def kind_words(kind: str, cut: Mapping[str, Any]) -> str:
    """Return the plural of a kind of units."""
    return _TOGETHER[cut["head_unit"]] if kind == HEADS else kind


def uncompensated(layers: Collection[LayerRecipe]) -> str:
    """Return a sentence if nothing makes up for what goes from some of the layers, from their settings; else nothing.

    There are no layers only if blocks go, and none of them has a layer that can be fitted to what they gave.
    """
    if not layers:
        return "nothing makes up for the blocks that go: in this model no matrix can be fitted to what they gave"
    methods = set[str]()
    for layer in layers:
        if layer.parsed_pattern.keeps_all:
            if not layer.repair.needs_dense_stream:
                return (
                    "nothing makes up for the blocks that go; effort high fits the block before them to what they gave"
                )
        elif not (registry.method(layer.method).compensates or layer.repair.refit or layer.repair.needs_dense_stream):
            methods.add(layer.method)
    if not methods:
        return ""
    names = " and ".join(sorted(methods))
    return (
        f"nothing compensates for the units that go: method {names} leaves the other weights as they are; effort high, refit "
        "or a method that compensates gives them better values"
    )


def cut_rows(cut: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return rows of a table about what was cut; none if ``cut`` is empty."""
    if not cut:
        return []
    gone = cut.get("dropped_blocks", [])
    return [
        ("cut", f"{cut_words(cut)} (asked: {100 * cut['asked']:g} % less)"),
        *([("removed blocks", ", ".join(str(index + 1) for index in gone))] if gone else []),
        ("parameters", _fewer(cut["parameters_before"], cut["parameters_after"])),
        ("bytes of the weights as written", _fewer(cut["bytes_before"], cut["bytes_after"])),
        ("removed from the blocks", f"{100 * cut['share_of_block_parameters']:.2f} % of their parameters"),
    ]


def _fewer(before: int, after: int) -> str:
    return f"{after:,} of {before:,} ({100 * (1 - after / before):.2f} % less)"
