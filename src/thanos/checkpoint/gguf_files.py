"""GGUF files: their parts, and checks that the parts exist and that the packages to read them are installed."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thanos.checkpoint.weight_files import pointer_fault
from thanos.errors import ModelError
from thanos.system.extras import install_command

_PART = re.compile(r"(.*)-(\d+)(-of-(\d+)\.gguf)", re.IGNORECASE)


def is_gguf(path: str | Path) -> bool:
    """Return whether a path has the ending of a GGUF file, in upper or lower case."""
    return Path(path).suffix.lower() == ".gguf"


def check_gguf(path: Path, what: str = "MODEL") -> Path:
    """Refuse a file that is not a complete GGUF file, judged by its name and its first bytes.

    Args:
        path: the file, or any part of a file in several parts.
        what: name of the argument in messages.

    Returns:
        The file, or its first part.

    Raises:
        ModelError: the file is not GGUF, a part of it is missing, or a package is missing.
    """
    if not is_gguf(path):
        raise ModelError(
            f"{path} is a file, but not a .gguf file; {what} is a hub name, a local folder or a .gguf file"
        )
    parts = gguf_parts(path)
    for part in parts:
        if not part.is_file():
            raise ModelError(
                f"{path} is one of {len(parts)} parts of a GGUF file, but {part.name} is missing; download it too"
            )
        with part.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(
                    pointer_fault(part) or f"{part} is not a GGUF file, or is truncated; download it again"
                )
    require_packages()
    return parts[0]


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """Return all parts of a GGUF file by their names, such as ``m-00001-of-00003.gguf``; the file itself if it has one part."""
    named = _PART.fullmatch(path.name)
    if named is None or int(named.group(4)) < 2:
        return (path,)
    stem, digits, count = named.group(1), len(named.group(2)), int(named.group(4))
    return tuple(path.with_name(f"{stem}-{number:0{digits}d}{named.group(3)}") for number in range(1, count + 1))


_PATCHING = threading.Lock()


@contextmanager
def quick_reader(*, used: bool = True) -> Iterator[None]:
    """While open, the gguf package's reader, which transformers uses, holds the file as a plain array.

    The reader slices its memory map once for each word of the vocabulary, and a slice of numpy's ``memmap`` costs several
    times that of an array. The bytes are the same.

    Args:
        used: false to change nothing, for a model that is no GGUF file.
    """
    if not used:
        yield
        return
    import gguf
    import numpy as np

    original = gguf.GGUFReader

    class PlainReader(original):  # type: ignore[misc, valid-type]
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)  # which keeps the map open

    with _PATCHING:
        gguf.GGUFReader = PlainReader  # type: ignore[misc]
        try:
            yield
        finally:
            gguf.GGUFReader = original


def describe_split_file(path: Path, parts: int) -> str:
    """Return the error line for a part of a GGUF file that was renamed, or whose architecture only transformers reads."""
    return (
        f"{path} is one of {parts} parts of a GGUF file, which are read together only under their own names "
        f"(…-00001-of-{parts:05d}.gguf), and only for some architectures; merge them with llama.cpp's tool: "
        "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
    )


def require_packages() -> None:
    """Check that the packages which read GGUF files are installed.

    Raises:
        ModelError: a package is missing.
    """
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError(f"GGUF files need the package {error.name}: {install_command('gguf')}") from error
