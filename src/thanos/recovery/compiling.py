"""``torch.compile`` for the training of a recovery: the blocks of both models, and the divergence.

Without it a step of a small model waits for the host, which starts thousands of short operations. In a larger model the
element-wise operations between the matrix products take most of the time. A compiled block does them in a few kernels. Blocks
of one kind share their compiled code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from thanos.errors import RecipeError
from thanos.events import Event
from thanos.model.experts import mixtures
from thanos.model.layers import find_blocks
from thanos.recovery.distance import Distillation
from thanos.recovery.recipe import RecoveryRecipe
from thanos.system.meter import PhaseMeter

LEAST_STEPS = 100
"""Number of steps from which on compiling takes less time than it saves, on a GPU."""

KINDS = 4
"""Largest number of kinds of blocks that are compiled by default. Each kind takes several seconds."""

_RECOMPILE_LIMIT = 64
"""Number of variants of one function. Each kind of block has several: with and without gradients, for each size of batch."""


def check_compile(recipe: RecoveryRecipe) -> None:
    """Raise RecipeError if the recipe asks for the compiler together with a setting with which it does not work."""
    if recipe.compile and recipe.shard:
        raise RecipeError("compile does not work with shard; leave out --compile or --shard")


def check_compiles(recipe: RecoveryRecipe, *models: nn.Module) -> None:
    """Raise RecipeError if the recipe asks for the compiler, and a model is a mixture of experts."""
    if recipe.compile and _have_experts(_blocks(*models)):
        raise RecipeError(
            "compile does not work for a mixture of experts: each expert gets another number of tokens in every pass, and "
            "each number would be compiled anew; leave out --compile"
        )


@contextmanager
def compiled_if_wanted(
    recipe: RecoveryRecipe,
    device: torch.device,
    module: Distillation,
    notes: list[str],
    emit: Callable[[Event], None],
    meter: PhaseMeter,
) -> Iterator[None]:
    """While active, the models run compiled if the recipe wants it and the compiler works.

    If it fails, wholly or for a part of the models, a remark is added to ``notes`` and reported. The first use of the compiler
    takes several seconds, which are the phase ``compile`` of the run.
    """

    def remark(message: str) -> None:
        notes.append(message)
        emit(Event(kind="note", phase="compile", message=message))

    if not _wanted(recipe, device, module):
        yield
        return
    emit(Event(kind="phase", phase="compile"))
    with meter.phase("compile"):
        why = fault(device)
    if why:
        remark(f"torch.compile does not work here, so the training runs without it, which is slower: {why}")
        yield
    else:
        with compiled(module, remark):
            yield


def _wanted(recipe: RecoveryRecipe, device: torch.device, module: Distillation) -> bool:
    """Return whether the recipe asks for the compiler; if it leaves that open, whether it saves time.

    It saves time on CUDA, for at least :data:`LEAST_STEPS` steps and at most :data:`KINDS` kinds of blocks. It is not used for
    sharded models, nor for mixtures of experts: the sizes of an expert's inputs change in every pass, and each size would be
    compiled anew.
    """
    if recipe.compile is not None:
        return recipe.compile
    if device.type != "cuda" or recipe.shard or recipe.steps < LEAST_STEPS:
        return False
    blocks = _blocks(module.student, module.teacher.model)
    return len({_kind(block) for block in blocks}) <= KINDS and not _have_experts(blocks)


def fault(device: torch.device) -> str:
    """Compile a small function and run it; return the error in one line, or an empty text if it works."""
    try:
        torch.compile(lambda tensor: tensor.exp() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # the compiler calls other programs, and raises whatever they raise
        return _first_line(error)
    return ""


def _first_line(error: BaseException) -> str:
    """Return the line that names the cause: torch may put a line "backend='inductor' raised:" before it."""
    lines = [line for line in str(error).strip().splitlines() if not line.endswith(" raised:")]
    return lines[0] if lines else type(error).__name__


@contextmanager
def compiled(module: Distillation, remark: Callable[[str], None]) -> Iterator[None]:
    """While active, the blocks of both models and the divergence run compiled.

    A block that cannot be compiled runs as it is. The first time, ``remark`` is called with a message.
    """
    blocks = _blocks(module.student, module.teacher.model)
    config: Any = torch._dynamo.config
    for block in blocks:
        block.compile(dynamic=False)
    module.compile_divergence(True)
    try:
        with config.patch(recompile_limit=_RECOMPILE_LIMIT, suppress_errors=True), _failures(remark):
            yield
    finally:
        module.compile_divergence(False)
        for block in blocks:
            block._compiled_call_impl = None


@contextmanager
def _failures(remark: Callable[[str], None]) -> Iterator[None]:
    """Call ``remark`` at the first suppressed failure of the compiler, in place of its traceback of hundreds of lines.

    The compiler reports a failure only by this logger.
    """
    logger, said = logging.getLogger("torch._dynamo.convert_frame"), False

    def keep(record: logging.LogRecord) -> bool:
        nonlocal said
        if record.levelno < logging.WARNING:
            return True
        if not said:
            error = record.exc_info[1] if record.exc_info else None
            # Without an error it is the remark about too many variants. Its first line names the limit.
            why = record.getMessage().splitlines()[0] if error is None else _first_line(error)
            remark(f"torch.compile failed for a part of the models, which runs without it, which is slower: {why}")
        said = True
        return False

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _blocks(*models: nn.Module) -> list[nn.Module]:
    return [block for model in models for block in find_blocks(model)[1]]


def _have_experts(blocks: Iterable[nn.Module]) -> bool:
    return any(any(mixtures(block)) for block in blocks)


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Return what the compiled code of a block depends on: its class, and its parameters' names, shapes and dtypes."""
    shapes = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters())
    return type(block), shapes
