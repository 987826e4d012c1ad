"""A pass over two streams: statistics of the inputs of a block's layers in the pruned model and in the dense model.

Each batch runs through the pruned block and then, for the same sequences, through the dense block. The products of both inputs
are added immediately, so that only the inputs of one batch are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thanos.calibration.statistics import Gathered, InputGroup, Pairs
from thanos.engine.block_flow import BLOCK_INPUT, Stream
from thanos.engine.early_end import stopping_after, stopping_at
from thanos.engine.routing import Routing
from thanos.model.layers import LinearLayer

if TYPE_CHECKING:
    from thanos.engine.stages.base import BlockContext


class PairedPass:
    """Runs a block over both streams, for the hooks on its layers; or the modules after the blocks, for one layer of them.

    Open :func:`~thanos.calibration.statistics.gather` before it: the pass adds :class:`~thanos.calibration.statistics.Pairs` to
    its groups.

    Args:
        context: the context of the block, with a dense stream.
        layers: layers whose statistics are gathered.
        streams: layer that writes into the residual stream → the stream to which its output is added; see
            :func:`~thanos.engine.block_flow.residual_streams`.
        pairable: names of the layers that need products with the dense model's inputs.
        groups: the groups of the layers.
        calls: names of the block's layers in the order of their calls; the first pass over a block fills it.
    """

    def __init__(
        self,
        context: BlockContext,
        layers: Sequence[LinearLayer],
        streams: Mapping[str, Stream],
        pairable: Collection[str],
        groups: Gathered,
        calls: list[str],
    ) -> None:
        assert context.dense_stream is not None
        self._runner, self._dense, self._index = context.runner, context.dense_stream, context.index
        self._block, self._prefix, self._groups, self._pairable = context.module, context.prefix, groups, pairable
        self._layers, self._all, self._calls_before = list(layers), list(context.layers), calls
        self._routing = Routing(context.module)
        self._streams = {layer.name: streams[layer.name] for layer in layers if layer.name in streams}
        sources = [f"{context.prefix}{stream.source}" for stream in self._streams.values()]
        self._needed = [*(layer.name for layer in layers), *sources]
        self._inputs: dict[str, list[Tensor]] = {}  # group's first layer → its inputs in this batch, in order
        self._calls: dict[str, int] = {}  # group's first layer → its calls by the dense block in this batch
        self._residuals: list[dict[str, Tensor]] = [{}, {}]  # of the pruned and of the dense block: module → its input
        self._parallel: list[dict[str, Tensor]] = [{}, {}]  # the same: parallel layer → its output
        self._on_dense = False
        # The outputs of later blocks that are left out, to which the layers that write into the residual stream are fitted.
        self._stands_for_more = context.stands_for_more
        self._beyond: Tensor | None = None
        self._output: Tensor | None = None  # of the pruned block, for the same batch
        self._own: dict[str, Tensor] = {}  # layer that writes into the residual stream → its output in that block

    def run(self, end: int) -> Iterator[int]:
        """Run this process's sequences before ``end``; yield the number of finished sequences after each batch.

        Raises:
            torch.OutOfMemoryError: the device has no room; start again with smaller batches and new groups.
        """
        # The modules after the blocks run one sequence at a time.
        size = 1 if self._index is None else self._runner.settled(self._index)
        pruned, dense = self._runner.batches(size, 0, end), self._dense.inputs(size, 0, end)
        beyond = self._dense.outputs(size, 0, end) if self._stands_for_more else None
        with self._hooks(), self._ending() as batch_ended:
            for (first, hidden), (_, wanted) in zip(pruned, dense, strict=True):
                self._beyond = None if beyond is None else next(beyond)[1]
                self._residuals = [{BLOCK_INPUT: hidden}, {BLOCK_INPUT: wanted}]
                self._inputs, self._calls, self._parallel = {}, {}, [{}, {}]
                used = first, len(hidden), self._needed
                with self._routing.record(), self._runner.branches.used(*used):
                    if beyond is None:
                        self._observe(hidden, first)
                    else:
                        assert self._index is not None
                        self._output = self._runner.run(self._index, hidden, first)
                batch_ended()
                self._allocate_pairs(hidden.device)
                self._groups.paused = self._on_dense = True
                try:
                    with self._dense.weights(), self._routing.replay(), self._dense.branches.used(*used):
                        self._observe(wanted, first)
                finally:
                    self._groups.paused = self._on_dense = False
                self._add_residuals()
                yield first + len(hidden)
        self._inputs, self._residuals, self._parallel = {}, [{}, {}], [{}, {}]
        self._beyond, self._output, self._own = None, None, {}

    def _observe(self, hidden: Tensor, first: int) -> None:
        if self._index is None:
            self._runner.observe_tail_of(first, hidden)
        elif self._on_dense:
            self._runner.observe_other(self._index, hidden, first)
        else:
            self._runner.observe_batch(self._index, hidden, first)

    def _ending(self) -> AbstractContextManager[Callable[[], None]]:
        if self._index is None:
            return stopping_at(self._layers[0])
        if self._stands_for_more or any(stream.parallel for stream in self._streams.values()):
            return nullcontext(lambda: None)  # the parallel layer, or the block's output, is needed and may come last
        return stopping_after(self._layers, self._all, self._calls_before)

    # --- hooks ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles: list[Any] = []
        for layer in self._layers:
            handles.append(layer.module.register_forward_pre_hook(self._at_layer(layer)))
            if self._stands_for_more and layer.name in self._streams:
                handles.append(layer.module.register_forward_hook(self._after_own(layer.name)))
        for name in {stream.source for stream in self._streams.values()} - {BLOCK_INPUT}:
            module = self._block.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._at_stream(name), with_kwargs=True))
        for name in {stream.parallel for stream in self._streams.values() if stream.parallel}:
            module = self._block.get_submodule(name.removeprefix(self._prefix))
            handles.append(module.register_forward_hook(self._after_parallel(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _at_layer(self, layer: LinearLayer) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            group = self._groups.of.get(layer.name)
            if group is None or group.layers[0] is not layer:
                return
            if not self._on_dense:
                self._inputs.setdefault(layer.name, []).append(args[0])
            elif group.pairs is not None and not (self._stands_for_more and layer.name in self._streams):
                self._add_cross(group, args[0])

        return see

    def _at_stream(self, name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            self._residuals[self._on_dense][name] = value.clone()  # a block may add to it in place

        return see

    def _after_parallel(self, name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: Any, output: Tensor) -> None:
            self._parallel[self._on_dense][name] = output.clone()  # a block may add to it in place

        return see

    def _after_own(self, name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: Any, output: Tensor) -> None:
            if not self._on_dense:
                self._own[name] = output.clone()  # a block may add to it in place

        return see

    # --- products ---------------------------------------------------------------------------------------------------

    def _allocate_pairs(self, device: torch.device) -> None:
        """Allocate the products of the groups that were found in this batch."""
        for group in self._groups:
            if group.pairs is None and any(layer.name in self._pairable for layer in group.layers):
                group.pairs = Pairs.empty(group.layers, self._streams, device)

    def _add_cross(self, group: InputGroup, wanted: Tensor) -> None:
        assert group.pairs is not None
        name = group.layers[0].name
        number = self._calls.get(name, 0)
        self._calls[name] = number + 1
        inputs = _rows(self._inputs[name][number])
        wanted = _rows(wanted)
        assert wanted.shape == inputs.shape, f"{name} has other tokens in the dense model"
        group.pairs.cross.add(wanted, inputs)

    def _add_residuals(self) -> None:
        for name, stream in self._streams.items():
            group = self._groups.of.get(name)
            if group is None or group.pairs is None:
                continue
            (inputs,) = self._inputs[group.layers[0].name]
            if self._beyond is None:
                pruned, dense = (self._before(stream, number) for number in range(2))
            else:
                # The wanted output is the later blocks' output minus the output of the block's other layers. So nothing is
                # added to the cross products: W (0 − G) + R in place of W (C − G) + R.
                assert self._output is not None
                bias = getattr(group.layers[0].module, "bias", None)
                dense = _rows(self._beyond if bias is None else self._beyond - bias)
                pruned = _rows(self._output).float() - _rows(self._own[name]).float()
            group.pairs.residuals[name].add_difference(dense, pruned, _rows(inputs))

    def _before(self, stream: Stream, number: int) -> Tensor:
        """Return the residual stream to which a layer's output is added, (tokens, c); ``number`` 1 for the dense block."""
        states = _rows(self._residuals[number][stream.source])
        return states + _rows(self._parallel[number][stream.parallel]) if stream.parallel else states


def _rows(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1])
