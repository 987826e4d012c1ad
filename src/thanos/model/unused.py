"""Tensors of a checkpoint without a parameter in the model: they are copied unchanged, and a reason is reported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from thanos.checkpoint.weight_files import MERGE, adapter_without_effect, is_adapters
from thanos.model.layers import find_blocks

MTP = "multi-token prediction layer: transformers does not run it"

_NAMED = re.compile(r"(?:^|\.)(?:mtp|[^.]*nextn)", re.IGNORECASE)
"""Names of tensors of layers for multi-token prediction, if these layers are not numbered after the decoder blocks."""

_JOINT = re.compile(r"\.(?:eh_proj|enorm|hnorm)\.")
"""Names of their norms and projection, which join a token with the hidden states before it."""


class Unused:
    """Finds the reasons why tensors are not used.

    Args:
        meta_model: the model.
        keys: names of all tensors of the checkpoint.
        used: names of the tensors that have a parameter.
    """

    def __init__(self, meta_model: Any, keys: Iterable[str], used: Iterable[str]) -> None:
        blocks_name, blocks = find_blocks(meta_model)
        self._class = type(meta_model).__name__
        self._count = len(blocks)
        self._pattern = re.compile(rf"(?:^|\.){re.escape(blocks_name.rpartition('.')[2])}\.(\d+)\.")
        self._prefix = f"{meta_model.base_model_prefix}."
        self._tied = meta_model.state_dict().keys() - set(used)
        config = meta_model.config.get_text_config()
        # DeepSeek and GLM state the number of these layers in their configs, and store them after the last block.
        self._counted = any(
            re.search("mtp|nextn", name) and type(number) is int and number > 0 for name, number in vars(config).items()
        )
        self._joints = {self._index(key) for key in keys if _JOINT.search(key)}

    def is_prediction(self, key: str) -> bool:
        """Return whether a tensor belongs to a layer for multi-token prediction."""
        index = self._index(key)
        beyond = index is not None and index >= self._count
        return bool(_NAMED.search(key)) or (beyond and (self._counted or index in self._joints))

    def why(self, key: str) -> str:
        """Return the reason why a tensor has no parameter."""
        if self.is_prediction(key):
            return MTP
        index = self._index(key)
        if index is not None and index >= self._count:
            return f"layer {index}, beyond the {self._count} of config.json: transformers does not run it"
        if self._tied & {key, key.removeprefix(self._prefix), self._prefix + key}:
            return "copy of a tied weight: transformers does not read it"
        return f"no parameter of {self._class}"

    def notes(self, keys: Iterable[str]) -> list[str]:
        """Return the notes: one for each kind of layers that transformers does not run, and one if there is an adapter.

        ``keys`` are the names of the tensors without a parameter.
        """
        keys = sorted(keys)
        predicting = [key for key in keys if self.is_prediction(key)]
        indices = {index for key in set(keys) - set(predicting) if (index := self._index(key)) is not None}
        beyond = sorted(index for index in indices if index >= self._count)
        adapter = [key for key in keys if is_adapters(key)]
        stay = "transformers does not run them, so they are copied without pruning"
        notes = []
        if predicting:
            notes.append(f"the checkpoint has layers for multi-token prediction ({len(predicting)} tensors): {stay}")
        if beyond:
            which = str(beyond[0]) if len(beyond) == 1 else f"{beyond[0]} to {beyond[-1]}"
            notes.append(f"the checkpoint has layers beyond the {self._count} of config.json ({which}): {stay}")
        if adapter:
            notes.append(f"{adapter_without_effect(adapter)} and is copied; {MERGE}")
        return notes

    def _index(self, key: str) -> int | None:
        found = self._pattern.search(key)
        return int(found.group(1)) if found else None
