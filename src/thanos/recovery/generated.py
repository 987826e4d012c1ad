"""Sequences that the dense model generates for the training, and what an interrupted recovery keeps of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from thanos.calibration.continued import generate_sequences
from thanos.calibration.generation import Part
from thanos.events import Event

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from thanos.engine.distributed import World
    from thanos.recovery.states import RecoveryFolder


def kept_sequences(
    model: PreTrainedModel,
    ids: Tensor,
    bos: tuple[int, ...],
    count: int,
    seed: int,
    end: int,
    emit: Callable[[Event], None],
    work: RecoveryFolder,
    world: World,
    *,
    segment: int,
    prompt: int,
    resume: bool,
) -> Tensor:
    """Return the sequences of :func:`~thanos.calibration.continued.generate_sequences`.

    They and their parts are kept in the work folder.

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
    done = work.generated_parts if resume else []
    if done and done[-1].states.keys() != {"cpu", model.device.type}:
        work.drop_parts()
        done = []
    emit(Event(kind="phase", phase="generate", done=sum(len(part.ids) for part in done)))

    def keep(part: Part) -> None:
        work.keep_part(part)
        world.from_first(lambda: None)

    made = generate_sequences(
        model, ids, bos, count, seed, end, emit, segment=segment, prompt=prompt, done=done, keep=keep
    )
    work.keep_generated(made)
    return world.from_first(lambda: made)
