"""The local files that a source of text names.

A source is a file, a folder (its files with a known ending), a pattern such as ``data/*.jsonl``, or several of these,
separated by commas. ``:NAME`` after a file or pattern names the column.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from thanos.errors import DataError
from thanos.system.suggestions import near

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
"""Endings of text files, in upper or lower case."""

_GLOB = frozenset("*?[")

OTHER_NAMES = {"wikitext2": ("wiki", "wikitext", "Salesforce/wikitext"), "c4": ("allenai/c4", "c4-en")}
"""Other common names of the named data sets, for hints."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a source: the path of a file, a folder or a pattern, and the named column; None if none is named."""

    path: str
    column: str | None = None

    def __str__(self) -> str:
        return self.path if self.column is None else f"{self.path}:{self.column}"


def split_source(source: str) -> list[Part]:
    """Return the parts of a source, from the text alone: the function does not read the disk.

    If not every part looks like files, the source is not split at commas.
    """
    pieces = [piece.strip() for piece in source.split(",")]
    parts = [_part(piece) for piece in pieces]
    return parts if all(_names_files(part.path) for part in parts) else [_part(source)]


def _part(piece: str) -> Part:
    path, _, column = piece.rpartition(":")
    return Part(path, column) if column and _names_files(path) else Part(piece)


def _names_files(path: str) -> bool:
    return path.lower().endswith(SUFFIXES) or path.endswith("/") or bool(_GLOB & set(path))


def parts_of(source: str) -> list[Part]:
    """Return the parts of a source; a file or folder that has the whole text as its name is one part."""
    return [Part(source)] if exists(source) else split_source(source)


def find_files(source: str, allowed: str) -> list[tuple[Path, str | None]]:
    """Return the files of a source, each with its column; the column is None if none is named.

    ``allowed`` are the other valid sources, for the message of the DataError if the source names no files or they do not exist;
    empty if there are none.
    """
    return [(path, part.column) for part in parts_of(source) for path in _files_of(part.path, allowed)]


def text_paths(source: str) -> list[str]:
    """Return the paths of a source, as the user wrote them, and of its files; none if it is no local text."""
    with suppress(DataError):
        return [*(part.path for part in parts_of(source)), *(str(path) for path, _ in find_files(source, ""))]
    return []


def exists(path: str) -> bool:
    """Return whether such a file or folder exists; False for text that cannot be a path."""
    try:
        return bool(path) and Path(path).exists()
    except (OSError, ValueError):
        return False


def matching(pattern: str) -> list[Path]:
    """Return the text files that a pattern matches, sorted by path; ``**`` matches subfolders."""
    if not _GLOB & set(pattern):
        return []
    path = Path(pattern)
    base = Path(path.anchor or ".")
    try:
        found = sorted(base.glob(str(path.relative_to(path.anchor))))
    except ValueError:  # pathlib refuses the pattern, for example a**
        return []
    return [each for each in found if _is_text(each)]


def _is_text(path: Path) -> bool:
    """Return whether a path in a folder is a text file to read: not hidden, and with one of :data:`SUFFIXES`."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".") and path.is_file()


def _files_of(name: str, allowed: str) -> list[Path]:
    path, endings = Path(name), ", ".join(SUFFIXES)
    if name and exists(name) and path.is_dir():
        found = sorted(each for each in path.iterdir() if _is_text(each))
        if not found:
            deeper = f"'{path}/**/*.jsonl'"
            raise DataError(
                f"text folder {name} holds no file ending in {endings}; to read its subfolders give a pattern, {deeper}"
            )
        return found
    if not exists(name) and _GLOB & set(name):
        if found := matching(name):
            return found
        raise DataError(f"text source {name!r} matches no file ending in {endings}; check the pattern")
    if not name.lower().endswith(SUFFIXES):
        raise DataError(
            f"text source {name!r} is unknown; choose {f'{allowed}, or ' if allowed else ''}a file ending in {endings}, a "
            f"folder of such files, or several separated by commas{_meant(name, allowed)}"
        )
    if not exists(name):
        raise DataError(f"text file {name} does not exist{_meant(name)}")
    return [path]


def _meant(name: str, allowed: str = "") -> str:
    """Return a hint for a source that does not exist: a data set, or a text file or folder in the same folder."""
    folder = Path(name).parent
    with suppress(OSError, ValueError):
        siblings = folder.iterdir() if name and folder.is_dir() else ()
        names = [each.name for each in siblings if _is_text(each) or (each.is_dir() and not each.name.startswith("."))]
        sets = allowed.split(", ") if allowed else []
        # Compare the names without their endings: two names with only the ending in common are not alike.
        alike = [each for each in sorted(names) if near(_stem(name), [_stem(each)])]
        return near(name, sets, OTHER_NAMES if sets else None) or near(Path(name).name, alike)
    return ""


def _stem(name: str) -> str:
    """Return the name of a file without its folder and its ending."""
    name = Path(name).name
    ending = next((suffix for suffix in (".jsonl.gz", ".json.gz") if name.lower().endswith(suffix)), Path(name).suffix)
    return name[: len(name) - len(ending)]
