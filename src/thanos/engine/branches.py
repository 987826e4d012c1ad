"""The branches of a block, such as attention, and the inputs of their last layers, kept for later passes.

A branch is a module that returns what a linear layer in it, its last one, has returned: attention returns the output of its
projection. While no layer before the last one changes, the last one's input is the same in each pass over a batch. So a pass
runs the last layer alone on the input that an earlier pass has kept, and the results have the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from thanos.engine.activations import Activations
from thanos.engine.block_flow import Run, levels
from thanos.engine.weights import ALIGNMENT
from thanos.model.layers import LinearLayer


class Branch(NamedTuple):
    """A branch of a block.

    Attributes:
        module: name of the branch's module within the block.
        layer: full name of its last layer.
        later: names of the weights that do not affect this layer's input: its own, and those of the layers called after it.
        entries: number of entries of the tuple that the module returns, all but the first None; 0 if it returns a tensor.
    """

    module: str
    layer: str
    later: frozenset[str]
    entries: int


class BlockOrder(NamedTuple):
    """The dependencies, the calls and the branches of a block's layers.

    Attributes:
        levels: layer name → level; see :func:`~thanos.engine.block_flow.levels`.
        calls: names of the layers, in the order of their calls on one sequence.
        branches: the branches.
    """

    levels: Mapping[str, int]
    calls: Sequence[str]
    branches: Sequence[Branch]


def block_order(run: Run, block: nn.Module, layers: Sequence[LinearLayer], prefix: str) -> BlockOrder:
    """Run a block once, and return its order. ``prefix`` begins the full names of its modules."""
    watch = _Watch(block, layers, prefix)
    found = levels(lambda: watch.follow(run), layers)
    return BlockOrder(found, watch.calls, watch.branches())


@dataclass(slots=True)
class _Watch:
    """Follows one run of a block.

    Attributes:
        calls: names of the layers in the order of their calls.
    """

    block: nn.Module
    layers: Sequence[LinearLayer]
    prefix: str
    calls: list[str] = field(default_factory=list)
    _outputs: dict[str, tuple[Tensor, int]] = field(
        default_factory=dict
    )  # layer → output, its number of changes in place
    _found: list[tuple[str, str, int]] = field(default_factory=list)  # module, layer, entries
    _ended: Counter[str] = field(default_factory=Counter)  # module → number of its calls

    def follow(self, run: Run) -> Tensor:
        """Run the block and record what its modules return."""
        self.calls, self._outputs, self._found, self._ended = [], {}, [], Counter()
        own = {id(layer.module) for layer in self.layers}
        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.enter_context(layer.module.register_forward_pre_hook(self._enter(layer.name)))
                hooks.enter_context(layer.module.register_forward_hook(self._leave_layer(layer.name)))
            for name, module in self.block.named_modules():
                if name and id(module) not in own:
                    hooks.enter_context(module.register_forward_hook(self._leave(name)))
            output = run()
        self._outputs = {}
        return output

    def branches(self) -> list[Branch]:
        """Return the branches of the run that was followed last. Of modules that return the same, the outermost is taken."""
        experts = {layer.name for layer in self.layers if layer.expert}
        found: dict[str, Branch] = {}
        for module, layer, entries in self._found:
            at = self.calls.index(layer)
            before, after = self.calls[:at], self.calls[at:]
            # The routing to experts may differ from pass to pass, so what follows them may, too.
            fixed = experts.isdisjoint([*before, *(name for name in experts if self._holds(module, name))])
            if fixed and self.calls.count(layer) == self._ended[module] == 1:
                later = frozenset(f"{name}.weight" for name in after if name not in before)
                found[layer] = Branch(module, layer, later, entries)
        return list(found.values())

    def _holds(self, module: str, layer: str) -> bool:
        return layer.startswith(f"{self.prefix}{module}.")

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda *_: self.calls.append(name)

    def _leave_layer(self, name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: Any, output: Tensor) -> None:
            self._outputs[name] = output, output._version

        return see

    def _leave(self, name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: Any, output: Any) -> None:
            self._ended[name] += 1
            parts: tuple[Any, ...] = output if type(output) is tuple else (output,)
            if not parts or any(part is not None for part in parts[1:]):
                return
            for layer, (result, version) in self._outputs.items():
                if parts[0] is result and result._version == version and self._holds(name, layer):
                    self._found.append((name, layer, len(parts) if parts is output else 0))

        return see


@dataclass(slots=True)
class _Kept:
    """The kept inputs of one branch's last layer.

    Attributes:
        sizes: first sequence of each batch that is kept → its number of sequences.
    """

    branch: Branch
    module: nn.Module
    layer: nn.Module
    prefix: str
    sizes: dict[int, int] = field(default_factory=dict)

    def skips(self, name: str) -> bool:
        """Return whether a module is not called if the branch's last layer runs alone."""
        return name.startswith(self.prefix) and name != self.branch.layer


class BranchInputs:
    """The inputs of the last layers of a block's branches, in one stream, batch by batch.

    A batch is used again only if the same sequences form a batch. In another one the last bits could differ.

    Args:
        room: returns storage for such inputs of all sequences, from those of one, (1, T, b); None if memory has no room. Then
            passes run the branches.

    Attributes:
        sizes: bytes of each branch's storage when storage was last allocated; :meth:`close` does not change it.
    """

    def __init__(self, room: Callable[[Tensor], Activations | None]) -> None:
        self._room, self.sizes = room, list[int]()
        self._kept: list[_Kept] = []
        self._stores: dict[int, Activations | None] = {}  # by position of the branch, for one block after the other

    def begin(self, block: nn.Module, branches: Sequence[Branch], prefix: str) -> None:
        """Forget what was kept, and keep the inputs of these branches of a block from now on."""
        self._kept = [
            _Kept(
                branch,
                block.get_submodule(branch.module),
                block.get_submodule(branch.layer.removeprefix(prefix)),
                f"{prefix}{branch.module}.",
            )
            for branch in branches
        ]

    def changed(self, name: str) -> None:
        """Forget the inputs that depend on a parameter, which has another value now."""
        for kept in self._kept:
            if name not in kept.branch.later:
                kept.sizes.clear()

    @contextmanager
    def used(
        self, first: int, count: int, needed: Collection[str] = (), changed: Collection[str] = (), *, keep: bool = True
    ) -> Iterator[None]:
        """While open, a pass over ``count`` sequences from ``first`` on uses the kept inputs, and keeps those that it computes.

        Args:
            first: the batch's first sequence.
            count: number of its sequences.
            needed: full names of modules whose calls are observed; a branch that holds one of them runs.
            changed: names of parameters that have other values in this pass.
            keep: whether inputs are kept.
        """
        with ExitStack() as stack:
            for number, kept in enumerate(self._kept):
                if not kept.branch.later.issuperset(changed):
                    continue
                if kept.sizes.get(first) != count:
                    if keep:  # before hooks that end the pass at this layer
                        hook = self._keeper(number, first, count)
                        stack.enter_context(kept.layer.register_forward_pre_hook(hook, prepend=True))
                elif not any(map(kept.skips, needed)):
                    stack.enter_context(_replaced_forward(kept.module, self._last_layer(number, first, count)))
            yield

    @property
    def nbytes(self) -> int:
        """Size of the storage that exists now, in bytes."""
        return sum(store.nbytes for store in self._stores.values() if store is not None)

    def close(self) -> None:
        """Forget everything, and free the storage."""
        self._kept = []
        for store in self._stores.values():
            if store is not None:
                store.close()
        self._stores = {}

    def _keeper(self, number: int, first: int, count: int) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            states = args[0]
            if states.dim() != 3 or len(states) != count or not _is_plain(states):
                return
            store, sizes = self._store(number, states), self._kept[number].sizes
            if store is not None:
                for other in [one for one, size in sizes.items() if one < first + count and first < one + size]:
                    del sizes[other]
                store.write(first, states)
                sizes[first] = count

        return keep

    def _last_layer(self, number: int, first: int, count: int) -> Callable[..., Any]:
        kept, store = self._kept[number], self._stores[number]
        assert store is not None

        def forward(*_: Any, **__: Any) -> Any:
            states = next(store.batches(count, first, first + count))[1]
            output = kept.layer(states if _is_plain(states) else states.clone())
            entries = kept.branch.entries
            return (output, *[None] * (entries - 1)) if entries else output

        return forward

    def _store(self, number: int, states: Tensor) -> Activations | None:
        """Return the storage of a branch: that of the previous block, if shape and dtype are the same."""
        if number in self._stores:
            store = self._stores[number]
            if store is None or store.takes(states):
                return store
            store.close()
        self._stores[number] = self._room(states[:1])
        self.sizes = [store.nbytes for store in self._stores.values() if store is not None]
        return self._stores[number]


def _is_plain(states: Tensor) -> bool:
    """Return whether a product reads a tensor as it would read a copy; else its last bits may differ from the copy's."""
    return states.is_contiguous() and states.data_ptr() % ALIGNMENT == 0


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
