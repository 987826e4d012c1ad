"""The models of a comparison, and the quantised versions of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import normpath, realpath

from thanos.comparison.quantised import KINDS
from thanos.errors import DataError
from thanos.run.names import public_name
from thanos.settings import either
from thanos.system.suggestions import near


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of a comparison.

    Attributes:
        model: the model, as the user named it.
        quantised: one of :data:`~thanos.comparison.quantised.KINDS`; empty for the model as it is.
    """

    model: str
    quantised: str = ""


def entries_of(models: Sequence[str], quantised: str = "") -> list[Entry]:
    """Return the entries in order: each model, followed by its quantised versions.

    Args:
        models: the models; the others are compared with the first.
        quantised: kinds separated by commas. ``int8`` quantises the first model, ``MODEL=int8`` another one of ``models``.

    Raises:
        DataError: a model is named twice, or a kind or a model of ``quantised`` is unknown.
    """
    if not models:
        raise DataError("a comparison needs at least one model")
    by_place = dict[str, str]()  # the completion of a shell appends a slash; a link may lead to the same folder
    for name in models:
        place = realpath(name)
        if place in by_place:
            first = by_place[place]
            what = "is named twice" if normpath(first) == normpath(name) else f"is the same model as {first}"
            raise DataError(f"{name} {what}; name each model once")
        by_place[place] = name
    wanted: dict[str, list[str]] = {name: [] for name in models}
    for word in filter(None, (part.strip() for part in quantised.split(","))):
        name, _, kind = word.rpartition("=")
        name = by_place.get(realpath(name), name) if name else models[0]
        if kind not in KINDS:
            raise DataError(
                f"--quantised {word}: there is no kind {kind!r}{near(kind, KINDS)}; choose {either(KINDS)}, for another model "
                "than the first as MODEL=KIND"
            )
        if name not in wanted:
            raise DataError(
                f"--quantised {word}: {name} is not among the models{near(name, wanted)}; add it to the models"
            )
        if kind not in wanted[name]:
            wanted[name].append(kind)
    return [Entry(name, kind) for name in models for kind in ("", *wanted[name])]


def labels_of(entries: Sequence[Entry]) -> list[str]:
    """Return a label for each entry: the model's name without its folder, or with it if two labels would be the same."""
    short = [f"{public_name(entry.model)} {entry.quantised}".strip() for entry in entries]
    counts = Counter(short)
    whole = [f"{entry.model} {entry.quantised}".strip() for entry in entries]
    return [name if counts[name] == 1 else full for name, full in zip(short, whole, strict=True)]
