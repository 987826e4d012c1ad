"""Sequences that the dense model generates for the training, and what an interrupted recovery keeps of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from thanos.calibration.continued import Pieces, generate_sequences
from thanos.calibration.generation import Part
from thanos.calibration.prompts import read_prompt_ids
from thanos.events import Event
from thanos.model.loading import end_of_text_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from thanos.calibration.windows import Calibration
    from thanos.engine.distributed import World
    from thanos.model.opening import OpenedModel
    from thanos.recovery.recipe import RecoveryRecipe
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
    pieces: Pieces,
    *,
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

    made = generate_sequences(model, ids, bos, count, seed, end, emit, pieces, done=done, keep=keep)
    work.keep_generated(made)
    return world.from_first(lambda: made)


def generated_text(
    dense: OpenedModel,
    calibration: Calibration,
    recipe: RecoveryRecipe,
    emit: Callable[[Event], None],
    work: RecoveryFolder,
    world: World,
    *,
    resume: bool,
) -> Tensor:
    """Return the sequences that the dense model generates for a recipe, or has generated before an interruption.

    Args:
        dense: the dense model, loaded.
        calibration: windows of the text. No piece of the held-out ones is continued.
        recipe: the recipe.
        emit: function that is called with events.
        work: the work folder.
        world: the processes.
        resume: whether an interrupted run goes on.

    Returns:
        Token ids, (generate + generated_held_out, T) int64, on the CPU.
    """
    model: Any = dense.meta_model
    tokenizer, bos = dense.source.tokenizer(), calibration.bos_ids
    text, end = calibration.ids[: recipe.trained], end_of_text_id(tokenizer, dense.source.config())
    prompts = [] if world.rank else read_prompt_ids(recipe, tokenizer, text.shape[1] - len(bos), emit, model)
    count = recipe.generate + recipe.generated_held_out
    pieces = Pieces(recipe.segment, recipe.prompt, prompts)
    return kept_sequences(model, text, bos, count, recipe.seed, end, emit, work, world, pieces, resume=resume)
