"""Warnings of the library, each given once in a process. The commands print them as one line."""

from __future__ import annotations

import warnings

_SAID: set[str] = set()


class ThanosWarning(UserWarning):
    """Something works, but not as one might expect."""


def warn_once(message: str) -> None:
    """Warn with a message, unless this process has given the same one."""
    if message not in _SAID:
        _SAID.add(message)
        warnings.warn(message, ThanosWarning, stacklevel=2)


def print_in_one_line() -> None:
    """Make Python print these warnings as ``warning: …``, without the place in the code."""
    warnings.formatwarning = _formatted


_usual = warnings.formatwarning


def _formatted(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    own = issubclass(category, ThanosWarning)
    return f"warning: {message}\n" if own else _usual(message, category, filename, lineno, line)
