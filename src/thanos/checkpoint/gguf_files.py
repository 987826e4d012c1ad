"""GGUF files: check that a file is complete, and that the packages which read it are installed."""

from __future__ import annotations

import re
from pathlib import Path

from thanos.errors import ModelError
from thanos.system.extras import install_command


def check_gguf(path: Path) -> None:
    """Refuse a file that is not a complete GGUF file, judged by its name and its first bytes.

    Raises:
        ModelError: the file is not GGUF, it is one of several parts, or a package is missing.
    """
    if path.suffix != ".gguf":
        raise ModelError(f"{path} is a file, but not a .gguf file; MODEL is a hub name, a local folder or a .gguf file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file, or is truncated; download it again")
    part = re.search(r"-(\d+)-of-(\d+)\.gguf$", path.name)
    if part is not None and int(part.group(2)) > 1:
        raise ModelError(say_merge(path, int(part.group(2))))
    require_packages()


def say_merge(path: Path, parts: int) -> str:
    """Say how to merge the parts of a GGUF file."""
    return (
        f"{path} is one of {parts} parts of a GGUF file, which transformers does not put together; merge them by "
        "llama.cpp's tool: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
    )


def count_parts(path: Path) -> int:
    """Return into how many parts a GGUF file was split, as this part's header states; 1 if it cannot be read."""
    import gguf

    try:
        field = gguf.GGUFReader(path).fields.get("split.count")
        return 1 if field is None else int(field.parts[-1][0])
    except Exception:  # a truncated file makes the reader fail in many ways; the caller's error says more
        return 1


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
