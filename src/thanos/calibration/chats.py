"""Chats in files of text: lists of messages, as chat templates want them (``role``, ``content``) or as ShareGPT writes them.

ShareGPT's keys are ``from`` and ``value``. A message without a role or content is refused: most templates would write an empty
turn for it, without a warning.
"""

from __future__ import annotations

from typing import Any

from thanos.errors import DataError

CHAT_COLUMNS = ("messages", "conversations")
"""Columns that hold chats if no column is named, the first one first."""

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
"""Speaker in ShareGPT's files → role in chat templates."""

_INSTEAD = ("tool_calls", "function_call")
"""Keys that a message may have instead of ``content``."""


def messages_of(chat: list[Any], place: str) -> list[dict[str, Any]]:
    """Return the messages of a chat with ``role`` and ``content``, further keys included.

    Args:
        chat: the messages, with these keys, or with ``from`` and ``value``.
        place: file and row, for messages.

    Raises:
        DataError: a message has other keys, or a null under them; or an unknown speaker.
    """
    return [_message(message, f"{place}, message {number}") for number, message in enumerate(chat, 1)]


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"{place} is not an object; a chat is a list of messages with role and content")
    given = {key: value for key, value in message.items() if value is not None}  # parquet has null for an absent key
    if "from" in given and "value" in given and "role" not in given:
        speaker = given["from"]
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise DataError(f"{place} is from {speaker!r}; choose one of {', '.join(_ROLES)}, or give role and content")
        message = {key: value for key, value in message.items() if key not in ("from", "value")}
        return {"role": _ROLES[speaker], "content": given["value"], **message}
    if not isinstance(given.get("role"), str) or not ("content" in given or any(key in given for key in _INSTEAD)):
        keys = ", ".join(map(repr, given)) or "nothing"
        raise DataError(f"{place} holds {keys}; a message has role and content, or from and value: rename the keys")
    return message
