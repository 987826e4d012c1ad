"""Sequences that the dense model generates in addition to those of a text: continued pieces of the text, or prompts.

The training of a pruned model overfits to few sequences. The dense model can generate any number of further ones. The target
of the training is the dense model's output, which exists for any text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from thanos.calibration.generation import SEEDS, Part, continue_prompts
from thanos.calibration.prompts import read_prompt_ids, with_prompts
from thanos.calibration.windows import Calibration, begin_windows
from thanos.events import Event, Phase
from thanos.model.loading import check_token_ids
from thanos.recipe import Recipe
from thanos.recipe.repair import PROMPT, SEGMENT, held_out_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PIECES = {"cpu": 16, "cuda": 2048}
"""Largest number of pieces that are continued together, by type of device."""

_MOST_TOKENS = {"cpu": 16 * SEGMENT, "cuda": 4096 * SEGMENT}
"""Largest number of their tokens, by type of device. Keys and values of all tokens are in memory."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of which generated sequences consist.

    Attributes:
        segment: tokens of a piece; at most those of a sequence.
        prompt: tokens of the text with which a piece begins.
        prompts: token ids of prompts, without BOS, each of at most half a segment.
    """

    segment: int = SEGMENT
    prompt: int = PROMPT
    prompts: Sequence[Sequence[int]] = ()


def batch_size(device: torch.device, segment: int) -> int:
    """Return the number of pieces of ``segment`` tokens that are continued together, if memory suffices."""
    return max(1, min(PIECES[device.type], _MOST_TOKENS[device.type] // segment))


def generate_sequences(
    model: PreTrainedModel,
    ids: Tensor,
    bos: tuple[int, ...],
    count: int,
    seed: int,
    end: int,
    emit: Callable[[Event], None],
    pieces: Pieces = Pieces(),
    *,
    phase: Phase = "generate",
    done: Sequence[Part] = (),
    keep: Callable[[Part], None] = lambda part: None,
) -> Tensor:
    """Return sequences that consist of continued pieces of a text, or of continued prompts.

    If the device's memory runs out, the batches of the parts that are left are halved.

    A piece begins with ``pieces.prompt`` tokens from a random position of the text, or with half a segment if that is shorter.
    Without any, it begins with BOS alone, or with ``end`` if there is no BOS. If there are prompts, it begins with one of them.
    Each prompt is used once, in random order, before one is used again.

    Args:
        model: the dense model.
        ids: token ids of the text, (n, T) int64, on the CPU. With prompts only T is used.
        bos: ids of the tokens with which each sequence, and each piece that is continued, begins; empty without any.
        count: number of sequences to generate.
        seed: seed of the positions and of the sampled tokens.
        end: id of the end-of-text token.
        emit: function that is called with events of progress.
        pieces: their size, and how they begin.
        phase: phase of these events.
        done: the parts that an interrupted call has made, in order, on the same type of device. The next ones have at most the
            size of the last of them.
        keep: function that is called with each new part.

    Returns:
        Token ids, (count, T) int64, on the CPU.
    """
    text = ids[:, len(bos) :]
    width = text.shape[1]
    segment = min(pieces.segment, width)
    needed = math.ceil(count * width / segment)
    draw = torch.Generator().manual_seed(seed % SEEDS)
    if pieces.prompts:
        begun, lengths = _drawn(pieces.prompts, bos, needed, draw)
    else:
        begun, lengths = _cut(text, bos, min(pieces.prompt, segment // 2), needed, draw), None
        if not begun.shape[1]:
            begun = torch.full((needed, 1), end)
    length = len(bos) + segment
    parts, made = [*done], None
    kept = sum(len(part.ids) for part in parts)
    batch = len(parts[-1].ids) if parts else batch_size(model.device, segment)

    def add(part: Part) -> None:
        keep(part)
        parts.append(part)

    def report(event: Event) -> None:
        emit(replace(event, tokens=event.tokens - kept * length))  # of this call alone, for the rate

    while made is None:
        try:
            before = tuple(parts)
            made = continue_prompts(
                *(model, begun, length, seed, batch, phase, report), lengths=lengths, done=before, keep=add
            )
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        if made is None:  # outside the except block, where the error's traceback still refers to tensors
            torch.cuda.empty_cache()
            batch //= 2
    stream = made[:, len(bos) :].flatten()
    return begin_windows(stream[: count * width].view(count, width), bos)


def _cut(text: Tensor, bos: tuple[int, ...], prompt: int, pieces: int, draw: torch.Generator) -> Tensor:
    """Return the beginnings of pieces, (pieces, b + prompt): BOS, and tokens from random positions of a text (n, width)."""
    rows = torch.randint(len(text), (pieces, 1), generator=draw)
    columns = torch.randint(text.shape[1] - prompt + 1, (pieces, 1), generator=draw) + torch.arange(prompt)
    return begin_windows(text[rows, columns], bos)


def _drawn(
    prompts: Sequence[Sequence[int]], bos: tuple[int, ...], pieces: int, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return BOS and prompts as rows (pieces, b + longest), padded at the end, and their lengths with BOS (pieces,)."""
    rounds = [torch.randperm(len(prompts), generator=draw) for _ in range(math.ceil(pieces / len(prompts)))]
    chosen = [[*bos, *prompts[number]] for number in torch.cat(rounds)[:pieces].tolist()]
    rows = pad_sequence([torch.tensor(ids) for ids in chosen], batch_first=True)
    return rows, torch.tensor([len(ids) for ids in chosen])


def generate_more(
    made: Calibration,
    model: PreTrainedModel,
    recipe: Recipe,
    end: int,
    emit: Callable[[Event], None],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Calibration:
    """Return windows of a text, and before them the sequences that a recipe wants generated.

    The windows that the recipe holds out stay the last ones. No piece of them is continued.

    Args:
        made: windows of a text.
        model: the dense model, on the device on which it generates.
        recipe: the recipe; without ``generate`` the windows are returned unchanged.
        end: id of the end-of-text token.
        emit: function that is called with events of progress.
        tokenizer: the model's; a recipe with ``prompts`` needs it.

    Raises:
        DataError: the text holds token ids that the model does not embed, or the prompts cannot be used.
        NumericsError: the model gives NaN or infinity.
    """
    if not recipe.generate:
        return made
    check_token_ids(made.ids, model)
    held_out = held_out_count(recipe, len(made.ids) + recipe.generate)
    text = made.ids[: len(made.ids) - held_out]
    made = with_prompts(made, recipe)
    prompts = read_prompt_ids(recipe, tokenizer, text.shape[1] - len(made.bos_ids), emit, model)
    arguments = (model, text, made.bos_ids, recipe.generate, made.seed, end, emit)
    new = generate_sequences(*arguments, Pieces(recipe.segment, recipe.prompt, prompts), phase="calibration")
    return replace(made, ids=torch.cat([new, made.ids]), generated=recipe.generate)
