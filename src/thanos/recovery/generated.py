"""Sequences that the dense model generates for the training, in addition to those of the calibration text.

The model overfits to few sequences. The dense model can generate any number of further ones, as continuations of pieces of the
calibration text. The target is the dense model's prediction, which exists for any text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thanos.calibration.generation import Part, continue_prompts
from thanos.calibration.windows import begin_windows
from thanos.events import Event
from thanos.recovery.sequences import SEGMENT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from thanos.engine.distributed import World
    from thanos.recovery.states import RecoveryFolder

PROMPT = 32
"""Number of tokens of a piece of the calibration text. The dense model continues a piece to a length of
:data:`~thanos.recovery.sequences.SEGMENT` tokens."""

_BATCH = {"cpu": 16, "cuda": 2048}
"""Pieces that are continued together, by type of device; fewer if memory does not suffice."""


def generate_sequences(
    model: PreTrainedModel,
    ids: Tensor,
    bos: tuple[int, ...],
    count: int,
    seed: int,
    pad: int,
    emit: Callable[[Event], None],
    *,
    done: Sequence[Part] = (),
    keep: Callable[[Part], None] = lambda part: None,
) -> Tensor:
    """Return sequences that consist of continued pieces of a text.

    If the device's memory runs out, the batches of the remaining parts are halved.

    A piece begins with :data:`PROMPT` tokens from a random position of the text, or with half a segment if that is shorter.

    Args:
        model: the dense model.
        ids: token ids of the text, (n, T) int64, on the CPU.
        bos: ids of the tokens with which each sequence, and each piece that is continued, begins; empty without any.
        count: number of sequences to generate.
        seed: seed of the positions and of the sampled tokens.
        pad: any token id.
        emit: function that is called with events of progress.
        done: the parts that an interrupted call has made, in order, on the same type of device. The next ones have at most the
            size of the last of them.
        keep: function that is called with each new part.

    Returns:
        Token ids, (count, T) int64, on the CPU.
    """
    text = ids[:, len(bos) :]
    width = text.shape[1]
    segment = min(SEGMENT, width)
    prompt = max(0 if bos else 1, min(PROMPT, segment // 2))  # BOS alone is a prompt, too
    pieces = math.ceil(count * width / segment)
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(text), (pieces, 1), generator=draw)
    columns = torch.randint(width - prompt + 1, (pieces, 1), generator=draw) + torch.arange(prompt)
    begun = begin_windows(text[rows, columns], bos)
    length = len(bos) + segment
    parts, made = [*done], None
    batch = len(parts[-1].ids) if parts else _BATCH[model.device.type]

    def add(part: Part) -> None:
        keep(part)
        parts.append(part)

    while made is None:
        try:
            before = tuple(parts)
            made = continue_prompts(model, begun, length, seed, pad, batch, "generate", emit, done=before, keep=add)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        if made is None:  # outside the except block, where the error's traceback still refers to tensors
            torch.cuda.empty_cache()
            batch //= 2
    return begin_windows(made[:, len(bos) :].flatten()[: count * width].view(count, width), bos)


def kept_sequences(
    model: PreTrainedModel,
    ids: Tensor,
    bos: tuple[int, ...],
    count: int,
    seed: int,
    pad: int,
    emit: Callable[[Event], None],
    work: RecoveryFolder,
    world: World,
    *,
    resume: bool,
) -> Tensor:
    """Return the sequences of :func:`generate_sequences`, and keep them and their parts in the work folder.

    Rank 0 generates. All processes synchronise after each part, so that none waits longer than the timeout of
    torch.distributed.

    An interruption loses the part that is being generated. With ``resume``, what the interrupted run has kept is not generated
    again. On a CPU the result has the same bits as without an interruption. Parts that another type of device has made are
    discarded, since its random generator is another one.
    """
    made: Tensor | None = None
    while world.rank and made is None:
        made = world.from_first(lambda: None)
    if made is not None:
        return made
    whole = work.generated if resume else None
    if whole is not None:
        return world.from_first(lambda: whole)
    emit(Event(kind="phase", phase="generate"))
    done = work.generated_parts if resume else []
    if done and done[-1].states.keys() != {"cpu", model.device.type}:
        work.drop_parts()
        done = []

    def keep(part: Part) -> None:
        work.keep_part(part)
        world.from_first(lambda: None)

    made = generate_sequences(model, ids, bos, count, seed, pad, emit, done=done, keep=keep)
    work.keep_generated(made)
    return world.from_first(lambda: made)
