"""Sparsity patterns: which sets of weights may be removed.

Here ``n:m`` means **at most n non-zeros in every m consecutive weights of a row**, the industry's reading; 1:4 keeps a
quarter of the weights. Some of the literature counts the zeros instead; for 2:4 and 4:8 both agree.
"""

from __future__ import annotations

import re

from thanos.errors import RecipeError
from thanos.patterns.columns import Columns
from thanos.patterns.nm import NM
from thanos.patterns.unstructured import Unstructured
from thanos.system.suggestions import near_pattern

Pattern = Unstructured | Columns | NM


def parse_pattern(text: str | Pattern) -> Pattern:
    """Read ``unstructured``, ``columns`` or ``N:M``.

    Raises:
        RecipeError: the text is none of them.
    """
    if isinstance(text, Unstructured | Columns | NM):
        return text
    if text == "unstructured":
        return Unstructured()
    if text == "columns":
        return Columns()
    match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", text) if isinstance(text, str) else None
    if match is None:
        raise RecipeError(
            f"pattern {text!r} is unknown; choose unstructured, columns, or N:M such as 2:4 (at most N of M weights stay)"
            f"{near_pattern(text)}"
        )
    return NM(int(match[1]), int(match[2]))
