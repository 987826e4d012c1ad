"""The routing of tokens to experts, recorded in one run of a block and used again in another.

The pruned block and the dense block may send a token to different experts. Then the inputs of one expert in both blocks are
different tokens, and no product over both exists. With the routing of the pruned block, the dense block's experts receive the
same tokens in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from thanos.model.experts import ROUTING, Experts
from thanos.model.layers import LinearLayer


class Routing:
    """The experts of each token, and their weights, in the calls of a block's mixtures, in order.

    Args:
        block: a decoder block, or a model.

    Attributes:
        mixtures: the block's mixtures whose routing can be used again. Experts that a model's own code calls are not among
            them.
    """

    def __init__(self, block: nn.Module) -> None:
        self.mixtures = [module for module in block.modules() if isinstance(module, Experts)]
        self._inside = {id(module) for mixture in self.mixtures for module in mixture.modules()}
        self._calls: list[tuple[Tensor, Tensor]] = []

    def covers(self, layer: LinearLayer) -> bool:
        """Return whether a layer gets the same tokens in both runs: it belongs to no expert, or to one of ``mixtures``."""
        return not layer.expert or id(layer.module) in self._inside

    @contextmanager
    def record(self) -> Iterator[None]:
        """While open, record the routing of the block's forward pass. It replaces what was recorded before."""
        self._calls = []

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.append(_arguments(args, kwargs)[1:])

        with self._hooked(see):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """While open, the mixtures use the recorded routing instead of their own."""
        calls = iter(self._calls)

        def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return (_arguments(args, kwargs)[0], *next(calls)), {}

        with self._hooked(replace):
            yield

    @contextmanager
    def _hooked(self, hook: Any) -> Iterator[None]:
        with ExitStack() as hooks:
            for module in self.mixtures:
                hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    values = dict(zip(ROUTING, args, strict=False)) | kwargs
    hidden, indices, weights = (values[name] for name in ROUTING)
    return hidden, indices, weights
