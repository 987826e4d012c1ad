"""The names of a checkpoint's tensors after blocks have gone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from thanos.checkpoint.layout import RawSource
from thanos.model.layers import find_blocks
from thanos.model.opening import OpenedModel


class Renaming:
    """Renumbers the names of a checkpoint's tensors after blocks have gone.

    Args:
        opened: the model.
        gone: indices of the blocks that go.
    """

    def __init__(self, opened: OpenedModel, gone: frozenset[int]) -> None:
        prefix, _ = find_blocks(opened.meta_model)
        last = re.escape(prefix.rpartition(".")[2])
        stems = set()
        for name, key in opened.key_of.items():
            if name.startswith(f"{prefix}."):
                index = name[len(prefix) + 1 :].split(".")[0]
                if found := re.search(rf"(?:^|\.){last}\.(?={index}\.)", key):
                    stems.add(re.escape(key[: found.end()]))
        self._pattern = re.compile(rf"({'|'.join(sorted(stems))})(\d+)\.")
        self._gone = gone

    def __call__(self, key: str) -> str | None:
        """Return the new name of a tensor; None if its block goes."""
        found = self._pattern.match(key) if self._gone else None
        if found is None:
            return key
        index = int(found[2])
        if index in self._gone:
            return None
        return f"{found[1]}{index - sum(one < index for one in self._gone)}.{key[found.end() :]}"


@dataclass(frozen=True, slots=True)
class Renamed:
    """Hands out the bytes of tensors under new names.

    Attributes:
        source: of the bytes.
        names: new name → name in the source.
    """

    source: RawSource
    names: Mapping[str, str]

    def raw_spans(self, name: str) -> Iterator[memoryview]:
        """As :meth:`RawSource.raw_spans <thanos.checkpoint.layout.RawSource.raw_spans>`."""
        return self.source.raw_spans(self.names[name])
