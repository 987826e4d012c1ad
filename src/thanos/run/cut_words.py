"""The description of a cut (removed units or blocks) in words, for the model card and the command line."""

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
    """Return the numbers of remaining units, from ``cut`` of a report: ``1,216 of 1,536 neurons left in each block``."""
    sizes = " and ".join(
        f"{size['after']:,} of {size['before']:,} {kind_words(kind, cut)}" for kind, size in cut["units"].items()
    )
    return f"{sizes} left" if BLOCKS in cut["units"] else f"{sizes} left in each block"


def share_words(cut: Mapping[str, Any]) -> str:
    """Return the requested and the removed fraction, from ``cut`` of a report: ``requested 20 % of …, removed 20.83 %``."""
    asked, units = cut["asked"], cut["units"]
    mixed, (kind, size) = len(units) > 1, next(iter(units.items()))
    text = f"requested {100 * asked:g} % of the {'parameters of the blocks' if mixed else kind_words(kind, cut)}"
    if "came" not in cut:  # a report of an earlier version
        return text
    removed, multiple = cut["came"], cut["multiple_of"]
    text += f", removed {100 * removed:.2f} %"
    if abs(removed - asked) < 5e-5:
        return text
    if multiple == 1:
        return f"{text}: no number of whole units is nearer"
    nearer = not mixed and abs(removed - asked) * size["before"] > 0.5
    hint = "; a smaller multiple_of may give a nearer number" if nearer else ""  # experts need a multiple of their own
    return f"{text}: a multiple of {multiple} remains{hint}"


def kind_words(kind: str, cut: Mapping[str, Any]) -> str:
    """Return the plural of a kind of units."""
    return _TOGETHER[cut["head_unit"]] if kind == HEADS else kind


def uncompensated(layers: Collection[LayerRecipe]) -> str:
    """Return a warning if the settings of some layers do not compensate for removed units or blocks; else an empty text."""
    methods = set[str]()
    for layer in layers:
        if layer.parsed_pattern.keeps_all:
            if not layer.repair.needs_dense_stream:
                return "nothing compensates for the removed blocks; effort high fits the block before them to their outputs"
        elif not (registry.method(layer.method).compensates or layer.repair.refit or layer.repair.needs_dense_stream):
            methods.add(layer.method)
    if not methods:
        return ""
    names = " and ".join(sorted(methods))
    return (
        f"nothing compensates for the removed units: method {names} does not change the other weights; effort high, refit "
        "or a method that compensates gives them better values"
    )


def cut_rows(cut: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return rows of a table about a cut; none if ``cut`` is empty."""
    if not cut:
        return []
    gone = cut.get("dropped_blocks", [])
    return [
        ("cut", cut_words(cut)),
        ("share", share_words(cut)),
        *([("removed blocks", ", ".join(str(index + 1) for index in gone))] if gone else []),
        *_size_rows(cut),
    ]


def plan_rows(cut: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return rows of a table about a predicted cut, from ``cut`` of a plan; none if ``cut`` is empty."""
    if not cut:
        return []
    if "splits" in cut:
        rows = [("cut", f"the run chooses one of {len(cut['splits'])} splits by their predicted error")]
        for split in cut["splits"]:
            gone = ", ".join(f"{number:,} {kind}" for kind, number in split["removed"].items())
            removed = 100 * split["share_of_block_parameters"]
            size = _fewer(split["bytes_before"], split["bytes_after"])
            rows.append((f"without {gone}", f"{removed:.2f} % of the blocks' parameters; bytes {size}"))
        return rows
    which = "; the run chooses which" if BLOCKS in cut["units"] else ""
    return [
        ("cut", f"{cut_words(cut)}{which}"),
        ("share", share_words(cut)),
        *((name, f"{size['before']:,} → {size['after']:,}") for name, size in cut["config"].items()),
        *_size_rows(cut),
    ]


def _size_rows(cut: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("parameters", _fewer(cut["parameters_before"], cut["parameters_after"])),
        ("bytes of the weights as written", _fewer(cut["bytes_before"], cut["bytes_after"])),
        ("removed from the blocks", f"{100 * cut['share_of_block_parameters']:.2f} % of their parameters"),
    ]


def _fewer(before: int, after: int) -> str:
    return f"{after:,} of {before:,} ({100 * (1 - after / before):.2f} % less)"
