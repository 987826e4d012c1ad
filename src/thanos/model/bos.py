"""How a tokenizer begins a text: with a beginning-of-text token (BOS) or without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from thanos.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["window", "text", "none"]
"""Position of BOS: at the start of each window, at the start of the text alone, or nowhere."""

BOS_CHOICES = ("auto", "window", "text")

_PROBE = "a"
"""Any text. Only the tokens before it matter."""


def check_bos(bos: str) -> None:
    """Raise DataError for a choice that is not in :data:`BOS_CHOICES`."""
    if bos not in BOS_CHOICES:
        raise DataError(f"bos {bos!r} is unknown; choose one of {', '.join(BOS_CHOICES)}")


def defined_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the BOS that a tokenizer defines, whether it adds it or not; None if it defines none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if isinstance(bos, int) else None


def added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the BOS that a tokenizer adds before every text; None if it adds none."""
    bos = defined_bos(tokenizer)
    if bos is None:
        return None
    whole = tokenizer(_PROBE, verbose=False)["input_ids"]
    return bos if list(whole[:1]) == [bos] and plain_ids(tokenizer, _PROBE)[:1] != [bos] else None  # type: ignore[index]


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, without tokens that the tokenizer adds."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]


def without_bos(ids: list[int], bos: int | None) -> list[int]:
    """Return token ids without a leading BOS, which the text itself may hold, so that no second one is added."""
    return ids[1:] if bos is not None and ids[:1] == [bos] else ids
