"""The optional packages, and the command that installs them."""

from __future__ import annotations

from importlib.util import find_spec

EXTRAS = {
    "gguf": ("gguf>=0.17", "accelerate>=1.1"),
    "recover": ("accelerate>=1.6",),
    "data": ("datasets>=4",),
    "eval": ("lm_eval==0.4.13",),
    "quantised": ("torchao>=0.18,<0.19",),
    "report": ("matplotlib>=3.10", "jinja2>=3.1"),
}
"""Extra → its packages, with the ranges of pyproject.toml."""


def install_command(extra: str) -> str:
    """Return the shell command that installs the packages of an extra."""
    return " ".join(["pip install", *(f"'{package}'" for package in EXTRAS[extra])])


def is_installed(module: str) -> bool:
    """Return whether a module is installed, without importing it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # the parent package is missing, or is a plain module
        return False
