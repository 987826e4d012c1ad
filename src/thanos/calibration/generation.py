"""Text that the dense model writes: calibration ``self``, and continuations of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thanos.errors import NumericsError
from thanos.events import Event, Phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GENERATION_BATCH = 16
"""Number of sequences that the model generates together for calibration ``self``."""


SEEDS = 2**63
"""Number of seeds that torch's generators take. A larger seed counts modulo this number."""


@dataclass(frozen=True, slots=True)
class Part:
    """Prompts that were continued together.

    Attributes:
        ids: token ids of the prompts and their continuations, (n, length) int64, on the CPU.
        states: states of torch's random generators afterwards, from which the next part is sampled: type of device → state,
            uint8. ``cpu`` always; ``cuda`` if the model is on a CUDA device.
    """

    ids: Tensor
    states: Mapping[str, Tensor]


def generate(
    model: PreTrainedModel,
    samples: int,
    length: int,
    seed: int,
    start: tuple[int, ...],
    emit: Callable[[Event], None],
) -> Tensor:
    """Sample sequences from the model at temperature 1. Each begins with the tokens ``start``: BOS, else end-of-text."""
    prompts = torch.tensor(start).expand(samples, -1)
    return continue_prompts(model, prompts, length, seed, GENERATION_BATCH, "calibration", emit)


def continue_prompts(
    model: PreTrainedModel,
    prompts: Tensor,
    length: int,
    seed: int,
    batch: int,
    phase: Phase,
    emit: Callable[[Event], None],
    *,
    lengths: Tensor | None = None,
    done: Sequence[Part] = (),
    keep: Callable[[Part], None] = lambda part: None,
) -> Tensor:
    """Sample a continuation of each prompt from the model at temperature 1, whatever its generation config says.

    The end-of-text tokens of the generation config are never sampled, so no continuation ends early. The model reads the
    shortest prompt of a batch at once, and the rest of the others token by token.

    Args:
        model: the dense model.
        prompts: token ids, (n, p) int64, on any device.
        length: tokens of a prompt and its continuation, more than p and the same for all prompts.
        seed: seed of the samples. The global random state is not changed.
        batch: prompts that the model continues together.
        phase: of the progress events.
        emit: function that is called with them.
        lengths: number of tokens of each prompt, (n,) int64, at the beginning of its row; any tokens may follow them
            there. None: p for all.
        done: the first parts of an earlier call with the same arguments, made on the same type of device. They are not sampled
            again. On a CPU the result has the same bits as without them.
        keep: function that is called with each new part, before its event.

    Returns:
        Token ids, (n, length) int64, on the CPU; each row begins with its prompt.

    Raises:
        NumericsError: the model gives NaN or infinity, so that no token can be sampled.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    parts, count = [*done], sum(len(part.ids) for part in done)
    devices = [model.device] if model.device.type == "cuda" else []
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        suppress_tokens=_ids(getattr(model.generation_config, "eos_token_id", None)),
    )
    sizes = torch.full((len(prompts),), prompts.shape[1]) if lengths is None else lengths
    with torch.random.fork_rng(devices), torch.inference_mode(), _replaced_defaults(model):
        torch.manual_seed(seed % SEEDS)
        _check_outputs(model, prompts[:1, : sizes[0]])
        if parts:
            _set_states(parts[-1].states, devices)
        while count < len(prompts):
            begun, ends = prompts[count : count + batch].to(model.device), sizes[count : count + batch]
            shortest = begun[:, : int(ends.min())]
            config.max_new_tokens = length - shortest.shape[1]
            with _named_sampling_errors():
                ids = model.generate(  # type: ignore[operator]
                    shortest,
                    attention_mask=torch.ones_like(shortest),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([_GivenTokens(begun, ends.to(model.device))]),
                )
            parts.append(Part(ids.cpu(), _states(devices)))
            count += len(begun)
            keep(parts[-1])
            emit(Event(kind="progress", phase=phase, done=count, total=len(prompts), tokens=count * length))
    return torch.cat([part.ids for part in parts])


class _GivenTokens:
    """Lets the model sample nothing but the prompt's next token as long as there is one.

    So prompts of several lengths are continued together without padding. With padding the model would need an attention
    mask, and PyTorch's fastest attention takes none.

    Args:
        prompts: token ids, (n, p) int64.
        lengths: number of tokens of each prompt, (n,) int64.
    """

    def __init__(self, prompts: Tensor, lengths: Tensor) -> None:
        self._prompts, self._lengths = prompts, lengths

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits of the next token, (n, vocabulary), for the tokens before it, (n, t)."""
        position = input_ids.shape[1]
        if position >= self._prompts.shape[1]:
            return scores
        token, given = self._prompts[:, position, None], (position < self._lengths)[:, None]
        logit = torch.where(given, 0.0, scores.gather(1, token))
        return scores.masked_fill_(given, -torch.inf).scatter_(1, token, logit)  # in place: they may take gigabytes


def _ids(end: int | list[int] | None) -> list[int] | None:
    return [end] if isinstance(end, int) else end


_NO_TOKENS = "the model gives NaN or infinite logits, so that it cannot generate text; try --dtype float32"


def _check_outputs(model: PreTrainedModel, prompt: Tensor) -> None:
    """Raise NumericsError if no token can be sampled after a prompt, (1, p).

    On CUDA, sampling from NaN ends in an assertion of the device, after which the process cannot use it any more.
    """
    logits = model(input_ids=prompt.to(model.device)).logits[:, -1]
    if bool(logits.float().softmax(-1).isnan().any()):
        raise NumericsError(_NO_TOKENS)


@contextmanager
def _named_sampling_errors() -> Iterator[None]:
    """Raise NumericsError in place of torch's error about probabilities that are no numbers."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise NumericsError(_NO_TOKENS) from error


def _states(devices: Sequence[torch.device]) -> dict[str, Tensor]:
    return {"cpu": torch.get_rng_state()} | {device.type: torch.cuda.get_rng_state(device) for device in devices}


def _set_states(states: Mapping[str, Tensor], devices: Sequence[torch.device]) -> None:
    torch.set_rng_state(states["cpu"])
    for device in devices:
        torch.cuda.set_rng_state(states[device.type], device)


@contextmanager
def _replaced_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Give the model an empty generation config: ``generate`` replaces unset values of the passed config by the model's."""
    from transformers import GenerationConfig

    network: Any = model
    before = network.generation_config
    network.generation_config = GenerationConfig()
    try:
        yield
    finally:
        network.generation_config = before
