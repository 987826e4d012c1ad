"""The names of a checkpoint's tensors after blocks were removed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from thanos.checkpoint.layout import RawSource
from thanos.model.layers import find_blocks
from thanos.model.opening import OpenedModel


class Renaming:
    """Maps the names of a checkpoint's tensors to the names after blocks were removed.

    Args:
        opened: the model.
        dropped: indices of the removed blocks.
    """

    def __init__(self, opened: OpenedModel, dropped: frozenset[int]) -> None:
        prefix, _ = find_blocks(opened.meta_model)
        last = re.escape(prefix.rpartition(".")[2])
        stems = set()
        for name, key in opened.key_of.items():
            if name.startswith(f"{prefix}."):
                index = name[len(prefix) + 1 :].split(".")[0]
                if match := re.search(rf"(?:^|\.){last}\.(?={index}\.)", key):
                    stems.add(re.escape(key[: match.end()]))
        self._pattern = re.compile(rf"({'|'.join(sorted(stems))})(\d+)\.")
        self._dropped = dropped

    def __call__(self, key: str) -> str | None:
        """Return the new name of a tensor; None if its block was removed."""
        match = self._pattern.match(key) if self._dropped else None
        if match is None:
            return key
        index = int(match[2])
        if index in self._dropped:
            return None
        return f"{match[1]}{index - sum(one < index for one in self._dropped)}.{key[match.end() :]}"


@dataclass(frozen=True, slots=True)
class Renamed:
    """A source of tensors' bytes under new names.

    Attributes:
        source: the source under the old names.
        names: new name → old name.
    """

    source: RawSource
    names: Mapping[str, str]

    def raw_spans(self, name: str) -> Iterator[memoryview]:
        """As :meth:`RawSource.raw_spans <thanos.checkpoint.layout.RawSource.raw_spans>`."""
        return self.source.raw_spans(self.names[name])
