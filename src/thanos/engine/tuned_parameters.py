"""The trainable parameters of a block: float32 masters in one flat tensor, with the zeros that must stay.

One flat tensor means one operation for the optimiser's step, for the mask, for setting gradients to zero and for the sum of
gradients over processes, whatever the number of parameters. (A mixture of experts has hundreds.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Tunable:
    """One parameter to tune.

    Attributes:
        name: its name.
        value: its current value, in the dtype in which the block holds it.
        stored: dtype in which the result is stored.
        sparse: whether entries that are zero stay zero; False for vectors such as gains and biases.
    """

    name: str
    value: Tensor
    stored: torch.dtype
    sparse: bool


class Masters:
    """Float32 copies of parameters in one flat tensor, their gradients in another, and a step of Adam on both.

    Bytes per entry: 16 (copy, gradient, two moments) and 1 (mask), in addition to the block's own parameters.

    Args:
        tunables: the parameters, all on one device; at least one.
        betas: decay rates of Adam's moments.

    Attributes:
        leaves: parameter name → leaf of the autograd graph: a view of the flat copy, whose gradient is a view of
            :attr:`gradient`.
        gradient: all gradients, (entries,) float32.
        free: number of entries that may change.
        size: root mean square of the entries of the matrices that may change; of all parameters if there are none. It is the
            scale of a learning rate: Adam moves every entry by about the rate, whatever the size of the weights.
    """

    def __init__(self, tunables: Sequence[Tunable], betas: tuple[float, float]) -> None:
        device, count = tunables[0].value.device, sum(tunable.value.numel() for tunable in tunables)
        self._tunables = tunables
        self._flat = nn.Parameter(torch.empty(count, dtype=torch.float32, device=device), requires_grad=False)
        self._zeros = torch.zeros(count, dtype=torch.bool, device=device)
        self.gradient = torch.zeros_like(self._flat)
        self.leaves: dict[str, nn.Parameter] = {}
        end = 0
        for tunable in tunables:
            begin, end = end, end + tunable.value.numel()
            self._flat[begin:end] = tunable.value.detach().reshape(-1)
            if tunable.sparse:
                self._zeros[begin:end] = tunable.value.reshape(-1) == 0
            leaf = nn.Parameter(self._flat[begin:end].view(tunable.value.shape))
            leaf.grad = self.gradient[begin:end].view(tunable.value.shape)
            self.leaves[tunable.name] = leaf
        self._flat.grad = self.gradient
        self.free = count - int(self._zeros.count_nonzero())
        matrices = [tunable.value for tunable in tunables if tunable.sparse]
        self.size = _root_mean_square(matrices) or _root_mean_square([self._flat])
        self._adam = torch.optim.Adam([self._flat], betas=betas, fused=True)

    def step(self, rate: float) -> None:
        """Take a step of Adam by the gradients, at a learning rate; then set the zeros that must stay to zero again."""
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        self._flat.masked_fill_(self._zeros, 0.0)  # not a product: NaN × 0 is NaN

    def rounded(self) -> dict[str, Tensor]:
        """Return copies of the masters, rounded to the stored dtypes."""
        # A copy, since a conversion to float32 would return the master itself.
        return {
            tunable.name: self.leaves[tunable.name].detach().to(tunable.stored, copy=True) for tunable in self._tunables
        }


def _root_mean_square(values: Sequence[Tensor]) -> float:
    """Return the root mean square of the non-zero entries of tensors."""
    squares = sum(float(value.float().square().sum(dtype=torch.float64)) for value in values)
    return (squares / max(1, sum(int(value.count_nonzero()) for value in values))) ** 0.5


def held(tunables: Sequence[Tunable], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return stored values in the dtypes in which the block holds its parameters."""
    return {tunable.name: values[tunable.name].to(tunable.value.dtype) for tunable in tunables}
