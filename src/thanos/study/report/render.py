"""The templates of a report, filled in by jinja2. Only the HTML templates escape their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


def environment(**filters: Callable[..., Any]) -> Environment:
    """Return jinja2's environment for the templates of this folder, with additional filters."""
    found = Environment(
        loader=PackageLoader("thanos.study.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    found.filters |= filters
    return found
