"""No pattern: any entry may be zero."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unstructured:
    """Any weight may be removed."""

    group: int = 1
    sparsity: None = None

    def __str__(self) -> str:
        return "unstructured"

    def check_width(self, columns: int) -> None:
        """Any width will do."""

    def check_block_size(self, block_size: int) -> None:
        """Any block size will do."""
