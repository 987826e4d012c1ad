"""The prompts of a comparison, and the texts that a model writes for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from thanos.calibration.prompts import split_prompts
from thanos.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "The capital of France is",
    'def is_prime(n):\n    """Return whether n is a prime number."""\n',
    "A robot walked into a library and asked for",
)
"""The default prompts: a fact, a program, and a story."""

NEW_TOKENS = 64
"""Largest number of tokens that a model generates for a prompt."""


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts of a text file, separated by blank lines.

    Raises:
        DataError: the file cannot be read, or contains no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"--prompts {path} cannot be read: {error.strerror}; give a text file of prompts") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"--prompts {path} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8"
        ) from error
    prompts = tuple(split_prompts(text))
    if not prompts:
        raise DataError(f"--prompts {path} contains no prompt; write at least one, separated by blank lines")
    return prompts


@torch.inference_mode()
def continuations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> dict[str, str]:
    """Return prompt → continuation by greedy decoding, without a chat template."""
    network: Any = model
    written = {}
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
        generated = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        written[prompt] = str(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True))
    return written
