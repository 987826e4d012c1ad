"""``thanos bench decode``: times decoding, one token at a time, of a packed model and of a dense one in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thanos.bench.measure import machine, median_seconds, synchronize
from thanos.bench.weights import weight_bytes
from thanos.errors import DataError, ModelError
from thanos.events import Event, Watcher
from thanos.model.loading import adapter_notes, context_length, load_model
from thanos.model.source import find_local, resolve_model
from thanos.sparse.modules import packed_modules
from thanos.system.documents import Document

SCHEMA = 1

_WARM_STEPS = 3
"""Steps before a CUDA graph is captured, in which kernels are compiled and chosen."""

_FIRST_TOKENS = 5
"""Largest number of timed passes over the prompt."""

_READ_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Bytes of the buffer that is read to measure the memory bandwidth; it is larger than the caches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeTime:
    """The times of one model.

    Attributes:
        model: the model, as the user named it.
        packed_layers: number of layers that stayed packed on the device.
        tokens_per_second: new tokens per second at batch 1, from the median step.
        first_token_seconds: median seconds from the prompt to its first new token.
        weight_bytes: bytes of all parameters and buffers on the device, tied ones counted once.
        read_bytes: bytes of weights that one step reads: all but an input embedding that is not tied to the head.
        bytes_per_second: ``read_bytes`` · ``tokens_per_second``.
        tokens: the generated ids.
    """

    model: str
    packed_layers: int
    tokens_per_second: float
    first_token_seconds: float
    weight_bytes: int
    read_bytes: int
    bytes_per_second: float
    tokens: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeReport(Document):
    """The result of :func:`time_decoding`; the attributes are the keys of ``bench decode --json``.

    Attributes:
        machine: hardware, versions and date.
        device: device of the models.
        context: number of tokens of the prompt, which has random ids.
        new_tokens: number of timed steps.
        compiled: whether ``torch.compile`` compiled the steps.
        read_rate: bytes per second at which the device reads a large buffer.
        models: the packed model first, then the dense one if there is one.
        same_tokens: number of decoded tokens before the first that differs between both models; None without a dense model.
    """

    machine: dict[str, Any]
    device: str
    context: int
    new_tokens: int
    compiled: bool
    read_rate: float
    models: list[DecodeTime]
    same_tokens: int | None
    schema: int = SCHEMA


def time_decoding(
    packed: str,
    *,
    dense: str | None = None,
    device: torch.device,
    context: int = 128,
    new_tokens: int = 64,
    compiled: bool = False,
    trust_remote_code: bool = False,
    on_event: Watcher | None = None,
) -> DecodeReport:
    """Time greedy decoding at batch 1, one model after the other.

    On CUDA a step is a CUDA graph over a static cache; elsewhere it is a plain call.

    Args:
        packed: the packed model.
        dense: another model to compare with, packed or not; None to time only one.
        device: device of the models.
        context: number of tokens of the prompt.
        new_tokens: number of steps to time.
        compiled: compile the steps by ``torch.compile``.
        trust_remote_code: let transformers run Python code from a checkpoint.
        on_event: function that is called with events of progress.

    Raises:
        ModelError: a model cannot be read.
        DataError: prompt and new tokens exceed the model's positions, or a number is below 1.
    """
    if context < 1 or new_tokens < 1:
        raise DataError(f"context and new tokens must be at least 1; got {context} and {new_tokens}")
    emit = on_event or (lambda event: None)
    names = [packed] if dense is None else [packed, dense]
    for name in names:
        find_local(name, trust_remote_code=trust_remote_code, packed=True)
    sources = [resolve_model(name, trust_remote_code=trust_remote_code, packed=True) for name in names]
    for name, source in zip(names, sources, strict=True):
        check_positions(name, source.config(), context, new_tokens)
    results = []
    for done, (name, source) in enumerate(zip(names, sources, strict=True), 1):
        emit(Event(kind="phase", phase="evaluate"))
        for line in adapter_notes(source):
            emit(Event(kind="note", phase="evaluate", message=line))
        model: Any = load_model(source, device=device)
        results.append(time_network(model, name, context=context, new_tokens=new_tokens, compiled=compiled))
        del model
        emit(Event(kind="progress", phase="evaluate", done=done, total=len(names)))
    return DecodeReport(
        machine=machine(str(device)),
        device=str(device),
        context=context,
        new_tokens=new_tokens,
        compiled=compiled,
        read_rate=read_rate(device),
        models=results,
        same_tokens=_common(results[0].tokens, results[1].tokens) if len(results) > 1 else None,
    )


def check_positions(name: str, config: Any, context: int, new_tokens: int) -> None:
    """Raise DataError if prompt and new tokens exceed a model's positions."""
    positions = context_length(config)
    if positions is not None and context + new_tokens + _WARM_STEPS + 1 > positions:
        raise DataError(
            f"{name} has {positions} positions; lower --context (now {context}) or --new-tokens (now {new_tokens})"
        )


@torch.inference_mode()
def time_network(
    model: Any, name: str, *, context: int = 128, new_tokens: int = 64, compiled: bool = False
) -> DecodeTime:
    """Time greedy decoding at batch 1 of a loaded model, on its own device.

    Args:
        model: a causal language model of transformers.
        name: the model's name in the result and in messages.
        context: number of tokens of the prompt, which has random ids.
        new_tokens: number of steps to time.
        compiled: compile the steps by ``torch.compile``; the time of compiling is not included.

    Raises:
        DataError: prompt and new tokens exceed the model's positions.
        ModelError: a step cannot be captured as a CUDA graph.
    """
    device = model.device
    check_positions(name, model.config, context, new_tokens)
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompt = torch.randint(0, vocabulary, (1, context), generator=draw).to(device)
    decode = _graph_steps if device.type == "cuda" else _plain_steps
    step: Any = model
    if compiled:
        # torch compiles the same forward function only for a few models of a process, so forget the earlier ones.
        torch.compiler.reset()
        step = torch.compile(model, dynamic=None if device.type == "cpu" else False)
        if device.type == "cpu":  # it compiles in the first steps, which the graph's warm steps are on CUDA
            _plain_steps(model, step, prompt, _WARM_STEPS)
    seconds, tokens = decode(model, step, prompt, new_tokens)
    rate = 1 / statistics.median(seconds)
    total, read = weight_bytes(model)
    return DecodeTime(
        model=name,
        packed_layers=len(packed_modules(model)),
        tokens_per_second=rate,
        first_token_seconds=_first_token_seconds(model, prompt),
        weight_bytes=total,
        read_bytes=read,
        bytes_per_second=read * rate,
        tokens=tokens,
    )


def _first_token_seconds(model: Any, prompt: Tensor) -> float:
    """Return the median seconds of a pass over the prompt, until its most probable next token is on the host."""

    def first() -> None:
        int(model(input_ids=prompt, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1))

    return median_seconds(first, repeats=_FIRST_TOKENS, device=str(prompt.device))


def _plain_steps(model: Any, call: Any, prompt: Tensor, count: int) -> tuple[list[float], list[int]]:
    """Return the seconds of each step, and the new tokens. ``call`` is the model or its compiled form."""
    output = model(input_ids=prompt, use_cache=True)
    token = output.logits[:, -1:].argmax(-1)
    seconds, tokens = [], [int(token)]
    for _ in range(count):
        began = time.perf_counter()
        output = call(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        tokens.append(int(token))  # waits for the device
        seconds.append(time.perf_counter() - began)
    return seconds, tokens


def _graph_steps(model: Any, call: Any, prompt: Tensor, count: int) -> tuple[list[float], list[int]]:
    """Like :func:`_plain_steps`, with a step captured as a CUDA graph."""
    from transformers import StaticCache

    length = prompt.shape[1] + _WARM_STEPS + count + 1
    cache = StaticCache(config=model.config, max_cache_len=length)
    position = torch.arange(prompt.shape[1], device=prompt.device)[None]
    first = (
        model(input_ids=prompt, position_ids=position, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    )
    token, position = first.clone(), position[:, -1:] + 1

    def step() -> None:
        output = call(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        token.copy_(output.logits[:, -1:].argmax(-1))
        position.add_(1)

    tokens = [int(first)]
    side: Any = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_STEPS):
            step()
            tokens.append(int(token))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        raise ModelError(
            f"{type(model).__name__} cannot be captured as a CUDA graph ({str(error).splitlines()[0]}); time it on the CPU"
        ) from error
    seconds = []
    for _ in range(count):
        synchronize(str(prompt.device))
        began = time.perf_counter()
        graph.replay()
        synchronize(str(prompt.device))
        seconds.append(time.perf_counter() - began)
        tokens.append(int(token))
    return seconds, tokens[: count + 1]


def read_rate(device: torch.device) -> float:
    """Return the bytes per second at which a device reads a buffer that is larger than its caches."""
    data = torch.ones(_READ_BYTES.get(device.type, 256 << 20) // 4, device=device)

    def read() -> None:
        data.sum()

    return data.nbytes / _fastest(read, device)


def _fastest(work: Callable[[], None], device: torch.device) -> float:
    seconds = []
    for _ in range(5):
        synchronize(str(device))
        began = time.perf_counter()
        work()
        synchronize(str(device))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _common(a: list[int], b: list[int]) -> int:
    """Return the length of the common prefix of two lists of tokens, without the first token, which follows the prompt."""
    count = 0
    for one, other in zip(a[1:], b[1:], strict=False):
        if one != other:
            break
        count += 1
    return count
