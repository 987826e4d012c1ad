"""``torch.compile`` for the training of a recovery: the blocks of both models, and the divergence.

Without it a step of a small model waits for the host, which starts thousands of short operations. In a larger model the
element-wise operations between the matrix products take most of the time. A compiled block does them in a few kernels. Blocks
of one kind share their compiled code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    if recipe.compile and any(any(mixtures(block)) for block in _blocks(*models)):
        raise RecipeError(
            "compile does not work for a mixture of experts: each expert gets another number of tokens in every pass, and "
            "each number would be compiled anew; leave out --compile"
        )


def use_compiler(
    recipe: RecoveryRecipe,
    device: torch.device,
    module: Distillation,
    notes: list[str],
    emit: Callable[[Event], None],
    meter: PhaseMeter,
) -> bool:
    """Return whether to compile. If the compiler is wanted and fails, add a remark to ``notes`` and report it.

    The first use of the compiler takes several seconds, which are the phase ``compile`` of the run.
    """
    if not _wanted(recipe, device, module):
        return False
    emit(Event(kind="phase", phase="compile"))
    with meter.phase("compile"):
        why = fault(device)
    if why:
        notes.append(f"torch.compile does not work here, so the training runs without it, which is slower: {why}")
        emit(Event(kind="note", phase="compile", message=notes[-1]))
    return not why


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
    return len({_kind(block) for block in blocks}) <= KINDS and not any(any(mixtures(block)) for block in blocks)


def fault(device: torch.device) -> str:
    """Compile a small function and run it; return the error in one line, or an empty text if it works."""
    try:
        torch.compile(lambda tensor: tensor.exp() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # the compiler calls other programs, and raises whatever they raise
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return ""


@contextmanager
def compiled(module: Distillation) -> Iterator[None]:
    """While active, the blocks of both models and the divergence run compiled.

    A block that cannot be compiled runs as it is.
    """
    blocks = _blocks(module.student, module.teacher.model)
    config: Any = torch._dynamo.config
    for block in blocks:
        block.compile(dynamic=False)
    module.compile_divergence()
    try:
        with config.patch(recompile_limit=_RECOMPILE_LIMIT, suppress_errors=True):
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def _blocks(*models: nn.Module) -> list[nn.Module]:
    return [block for model in models for block in find_blocks(model)[1]]


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Return what the compiled code of a block depends on: its class, its attributes' names, and its tensors' shapes."""
    shapes = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters())
    return type(block), shapes
