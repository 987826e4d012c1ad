"""Titles of the groups of a comparison's page."""

from __future__ import annotations

from collections.abc import Sequence

from thanos.comparison.document import Comparison, merged

_TOLD = {
    "device": "",
    "dtype": "",
    "text": "text",
    "sequence_length": "sequence length",
    "windows": "windows",
    "bos": "BOS",
    "context": "context",
    "new_tokens": "new tokens",
    "compiled": "compiled",
    "tasks": "tasks",
    "limit": "limit",
}
"""Setting → its words in the title of a group."""


def titles_of(groups: Sequence[Sequence[Comparison]]) -> list[str]:
    """Return a title for each group: its first model, and the settings that differ from groups of the same first model."""
    rows = [merged(group) for group in groups]
    names = [f"{first.label} and others" if others else first.label for first, *others in rows]
    facts = [{"device": group[-1].machine["device"], **group[-1].settings} for group in groups]
    titles: list[str] = []
    for name, own in zip(names, facts, strict=True):
        same = [other for other, title in zip(facts, names, strict=True) if title == name]
        differing = [key for key in own if key in _TOLD and any(other.get(key) != own[key] for other in same)]
        said = ", ".join(f"{_TOLD[key]} {_words(own[key])}".strip() for key in differing)
        title = f"{name}: {said}" if said else name
        count = sum(earlier == title or earlier.startswith(f"{title} (") for earlier in titles)
        titles.append(f"{title} ({count + 1})" if count else title)  # an anchor of the page must be unique
    return titles


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str("none" if value is None else value)
