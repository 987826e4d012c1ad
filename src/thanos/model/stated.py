"""Facts that a model states about itself, for a model card: licence, languages, and the model that it was made from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from thanos.model.source import ModelSource

_HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")
_ADDRESS = re.compile(r"https?://(?:www\.)?huggingface\.co/([\w.\-]+/[\w.\-]+)/?")


def stated_facts(source: ModelSource) -> dict[str, Any]:
    """Return the values of the following keys of a model card that a model states.

    ``license``, ``license_name``, ``license_link``: strings. ``language``, ``base_model``: lists of strings; only names of the
    hub count as base models, so no local path gets into a card. The facts are in the front matter of a folder's README.md, or
    in the metadata of a GGUF file.
    """
    facts = _from_readme(source) if source.gguf is None else _from_gguf(source.gguf_header.metadata)
    found: dict[str, Any] = {}
    for key in ("license", "license_name", "license_link"):
        if isinstance(facts.get(key), str) and facts[key].strip():
            found[key] = facts[key].strip()
    for key in ("language", "base_model"):
        value = facts.get(key)
        listed = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        names = [one for one in listed if isinstance(one, str) and one and (key == "language" or _is_hub_name(one))]
        if names:
            found[key] = list(dict.fromkeys(names))
    return found


def _is_hub_name(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None and not name.startswith(".")


def _from_readme(source: ModelSource) -> Mapping[str, Any]:
    """Return the front matter of the folder's README.md; empty if there is none that can be read."""
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(source.folder / "README.md") or {}
    except Exception:  # no file, or malformed text: a card must not stop a run
        return {}


def _from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of GGUF metadata under the keys of a model card."""
    count = metadata.get("general.base_model.count", 0)
    bases = []
    for number in range(min(count, len(metadata)) if type(count) is int else 0):  # a file may state any count
        address = str(metadata.get(f"general.base_model.{number}.repo_url", ""))
        if match := _ADDRESS.fullmatch(address):
            bases.append(match.group(1))
    return {
        "license": metadata.get("general.license"),
        "license_name": metadata.get("general.license.name"),
        "license_link": metadata.get("general.license.link"),
        "language": metadata.get("general.languages"),
        "base_model": bases,
    }
