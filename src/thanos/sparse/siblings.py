"""Packed layers that read the same input, such as q, k and v, run in one kernel launch.

Layers are siblings if their input is the same tensor. They are found by running the model with fake tensors, so nothing is
computed, and no list of architectures is needed. At run time the first sibling computes the outputs of all and
keeps them. Each of the others takes its output if its input is the same tensor, and otherwise computes its own. After the last
output is taken, nothing is kept. With ``torch.compile`` one call remains, since the compiler knows which inputs are the same
tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from thanos.sparse.kernels.tuned import MOST_MATRICES
from thanos.sparse.ops import packed_linears

if TYPE_CHECKING:
    from thanos.sparse.modules import PackedLinear

_TOKENS = 2
"""Tokens of the run that finds the siblings."""


class Siblings:
    """Layers that read the same input, and the outputs that the first of them has computed for the others.

    Args:
        layers: the layers in the order of their calls. All are ``fixed`` with the same n, or all are ``bitmap``. They have the
            same dtype and input size.
    """

    def __init__(self, layers: list[PackedLinear]) -> None:
        self.layers = layers
        self.held: tuple[Tensor, dict[int, Tensor]] | None = None  # one tuple, so that threads do not mix inputs

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy or a file: the layers, but no outputs that are kept during a forward pass."""
        return {"layers": self.layers, "held": None}

    def output(self, index: int, x: Tensor) -> Tensor:
        """Return the output of one of the layers.

        Args:
            index: index of the layer.
            x: input of the layer.
        """
        held = self.held
        if held is not None and held[0] is x:
            taken = held[1].pop(index, None)
            if taken is not None:
                if not held[1]:
                    self.held = None
                return taken
        layers = self.layers
        if index:
            return layers[index].alone(x)
        own, *others = packed_linears(
            x,
            [layer.weight_words for layer in layers],
            [layer.weight_offsets for layer in layers],
            [layer.cast_bias() for layer in layers],
            [layer.spec.rows for layer in layers],
            layers[0].spec.n,
        )
        self.held = (x, dict(enumerate(others, 1)))
        return own


@torch.inference_mode(mode=False)  # inference tensors have no version counter
@torch.no_grad()
def find_siblings(model: Any, names: Iterable[str]) -> list[list[str]]:
    """Return the groups of linear layers that read the same tensor, each in the order of the calls.

    Args:
        model: the model, on the meta device, with plain linear layers. It is not changed.
        names: names of the layers to group.

    Returns:
        Groups of two or more names; no groups if the model cannot run on tensors without content, or needs more than token ids.
    """
    twin = copy.deepcopy(model).eval()  # in training, OPT branches on a random number, and a fake tensor has no value
    inputs: dict[int, tuple[Tensor, int, list[str]]] = {}
    calls: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            del module
            x = arguments[0]
            # ``inputs`` keeps the tensors alive, so their ids stay unique. A layer is left out if it is called twice, or if its
            # input was modified in place after an earlier layer read it.
            _, version, group = inputs.setdefault(id(x), (x, x._version, []))
            calls[name] = calls.get(name, 0) + (1 if x._version == version else 2)
            group.append(name)

        return hook

    for name in names:
        twin.get_submodule(name).register_forward_pre_hook(watch(name))
    try:
        # transformers calls this under torch.device("meta"), and torch 2.11 refuses inputs on two devices.
        with torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True):
            twin.to_empty(device="cpu")
            twin(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long), use_cache=False)
    except Exception:  # of any type; then the layers run one by one, which is slower but correct
        return []
    groups = [[name for name in group if calls[name] == 1] for _, _, group in inputs.values()]
    return [group for group in groups if len(group) > 1]


def join(layers: list[PackedLinear]) -> None:
    """Let layers that read the same input run in one launch, if they have the same format, n, dtype, input size and device.

    Args:
        layers: the layers in the order of their calls, on any devices.
    """
    kinds: dict[Any, list[PackedLinear]] = {}
    for layer in layers:
        spec = layer.spec
        key = (spec.format, spec.n, spec.dtype, spec.columns, layer.weight_words.device)
        kinds.setdefault(key, []).append(layer)
    for alike in kinds.values():
        for first in range(0, len(alike), MOST_MATRICES):
            part = alike[first : first + MOST_MATRICES]
            if len(part) > 1:
                siblings = Siblings(part)
                for index, layer in enumerate(part):
                    layer.siblings, layer.sibling_index = siblings, index
