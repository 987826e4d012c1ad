"""How a tokenizer begins a text: with a beginning-of-text token (BOS), with several (GLM: ``[gMASK]<sop>``), or with none.

"BOS" stands for all tokens that a tokenizer adds before a text, whatever it calls them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from thanos.errors import DataError
from thanos.system.suggestions import near

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["window", "text", "none"]
"""Position of BOS: at the start of each window, at the start of the text only, or nowhere."""

BOS_CHOICES = ("auto", "window", "text")

_PROBE = "a"
"""Any text. Only the tokens before it matter."""


def check_bos(bos: str) -> None:
    """Raise DataError for a choice that is not in :data:`BOS_CHOICES`."""
    if bos not in BOS_CHOICES:
        raise DataError(f"--bos: must be one of {', '.join(BOS_CHOICES)}; got {bos!r}{near(bos, BOS_CHOICES)}")


def defined_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the BOS that a tokenizer defines, whether it adds it or not; None if it defines none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if isinstance(bos, int) else None


def added_bos(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids of the tokens that a tokenizer adds before every text, in order; empty if it adds none.

    They need not be the ``bos_token`` that the tokenizer defines.
    """
    whole = list(tokenizer(_PROBE, verbose=False)["input_ids"])  # type: ignore[arg-type]
    text = plain_ids(tokenizer, _PROBE)
    special = [token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id]
    while text and text[0] in special:  # some tokenizers add these tokens even where they are told not to
        text = text[1:]
    begins = (at for at in range(len(whole)) if text and whole[at : at + len(text)] == text)
    return tuple(whole[: next(begins, 0)])


def window_bos(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids with which ``window`` begins a window: those that the tokenizer adds, else the BOS that it defines."""
    defined = defined_bos(tokenizer)
    return added_bos(tokenizer) or (() if defined is None else (defined,))


def ids_at(bos: Bos, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids of the tokens that stand at a position of BOS; empty for ``none``."""
    return window_bos(tokenizer) if bos == "window" else added_bos(tokenizer)


def bos_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokens of :func:`added_bos` as text."""
    return "".join(map(str, tokenizer.convert_ids_to_tokens(list(added_bos(tokenizer)))))


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, without tokens that the tokenizer adds."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]


def without_bos(ids: list[int], bos: tuple[int, ...]) -> list[int]:
    """Return token ids without a leading BOS, which the text itself may hold, so that no second one is added."""
    return ids[len(bos) :] if bos and tuple(ids[: len(bos)]) == bos else ids
