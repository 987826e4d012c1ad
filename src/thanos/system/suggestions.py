"""Hints at the end of an error message: the allowed value that a user may have meant."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_DTYPES = {
    "float32": ("fp32", "f32", "float", "single", "full"),
    "float16": ("fp16", "f16", "half"),
    "bfloat16": ("bf16",),
}
_DEVICES = {"cuda": ("gpu", "cuda:x", "cuda:n", "nvidia", "cuda:"), "cpu": ("cpu:0", "host")}
_TIERS = {"device": ("gpu", "cuda", "vram"), "host": ("cpu", "ram", "memory"), "disk": ("ssd", "file")}


def near(given: Any, allowed: Iterable[str], others: Mapping[str, Iterable[str]] | None = None) -> str:
    """Return `` (did you mean …?)`` if a value resembles an allowed name, else an empty string.

    Args:
        given: the value that is not allowed.
        allowed: the allowed names.
        others: allowed name → its synonyms.
    """
    if not isinstance(given, str):
        return ""
    names = {_plain(name): name for name in allowed}
    known = {_plain(other): name for name, found in (others or {}).items() for other in found}
    text = _plain(given)
    found = names.get(text) or known.get(text)
    if found is None:
        close = difflib.get_close_matches(text, names, n=1, cutoff=0.7)
        found = names[close[0]] if close else None
    return "" if found is None else _did_you_mean(found)


def near_dtype(given: Any, allowed: Iterable[str]) -> str:
    """Return the hint for a dtype. Names that torch and other libraries use are recognised too."""
    return near(str(given).removeprefix("torch."), allowed, _DTYPES)


def near_device(given: str) -> str:
    """Return the hint for a device."""
    text = given.strip().lower()
    numbered = re.fullmatch(r"(?:cuda|gpu)[:\s_-]*([0-9]+)", text)
    if numbered:
        return _did_you_mean(f"cuda:{int(numbered[1])}")
    if text == "mps":
        return " (thanos does not run on Apple's GPU; did you mean cpu?)"
    return near(text, ("auto", "cpu", "cuda"), _DEVICES)


def near_tier(given: str, allowed: Iterable[str]) -> str:
    """Return the hint for the storage tier of the hidden states."""
    return near(given, allowed, _TIERS)


def near_pattern(given: Any, plain: str, others: Mapping[str, Iterable[str]]) -> str:
    """Return the hint for a sparsity pattern.

    Args:
        given: the value that is not allowed.
        plain: the pattern to suggest, with a sparsity, if the value is a fraction or a percentage.
        others: pattern → its synonyms.
    """
    if not isinstance(given, str):
        return ""
    text = given.strip().lower()
    parts = re.fullmatch(r"([0-9]{1,6})\s*(?:[-/_x:;.]|of|to)\s*([0-9]{1,6})", text)
    if parts and 0 < int(parts[1]) < int(parts[2]):
        return _did_you_mean(f"{int(parts[1])}:{int(parts[2])}")
    fraction = meant_fraction(text)
    if fraction is not None:
        return f" (did you mean {plain} with sparsity {fraction:g}?)"
    return near(text, (name for name in others if ":" not in name), others)


def near_number(given: Any, *, fraction: bool, allows: Callable[[float], bool] = math.isfinite) -> str:
    """Return the hint for a percentage, a decimal comma or a number in quotes; with ``fraction``, for a fraction in [0, 1).

    ``allows`` tells which numbers are allowed: no other is suggested.
    """
    number = meant_fraction(given) if fraction else _number(given)
    return "" if number is None or number == given or not allows(number) else _did_you_mean(f"{number:g}")


def near_whole(given: Any, allows: Callable[[float], bool] = math.isfinite) -> str:
    """Return the hint for a whole number in another form: ``1e3``, ``128.0``, ``1,000`` or ``"128"``.

    ``allows`` tells which numbers are allowed: no other is suggested.
    """
    text = re.sub(r"(?<=[0-9])[,_ ](?=[0-9]{3}\b)", "", given.strip()) if isinstance(given, str) else given
    number = _number(text)
    if number is None or isinstance(given, int) or number != int(number) or number < 1 or not allows(number):
        return ""
    return _did_you_mean(str(int(number)))


def meant_fraction(given: Any) -> float | None:
    """Return the fraction in [0, 1) that a value means: 0.5 for ``50``, ``"50%"`` or ``"0,5"``. None if it means none."""
    number = _number(given)
    if number is None:
        return None
    percent = isinstance(given, str) and given.strip().endswith("%")
    if not percent and 10 <= number < 100:  # 2 or 5 may be anything: tenths, a percentage, a typing error
        # 12 digits remove the rounding error of the division.
        number = float(f"{number / 100:.12g}")
    return number if 0 <= number < 1 else None


def _number(given: Any) -> float | None:
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        return None
    text = str(given).strip()
    percent = text.endswith("%")
    try:
        number = float(text.rstrip("% ").replace(",", "."))
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return float(f"{number / 100:.12g}") if percent else number


def _plain(text: str) -> str:
    return re.sub(r"[\s_-]+", "", text.lower())


def _did_you_mean(name: str) -> str:
    return f" (did you mean {name}?)"
