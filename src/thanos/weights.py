"""The weights of a skeleton: brought in from a checkpoint when their turn comes, and let go again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn


class TensorSource(Protocol):
    """Anything that hands out a checkpoint's tensors by name."""

    def read(self, name: str) -> Tensor:
        """Return the tensor on the CPU."""
        ...


class ModelWeights:
    """The parameters and persistent buffers of a skeleton, by parameter name.

    Args:
        model: a skeleton, parameters on the meta device.
        source: where the tensors are.
        key_of: parameter name → tensor name in the source; tied parameters appear under one name.
        device: where parameters go.
    """

    def __init__(self, model: nn.Module, source: TensorSource, key_of: dict[str, str], device: torch.device) -> None:
        self._source, self._key_of, self._device = source, key_of, device
        self._owners = _owners(model)
        self._meta: dict[str, Tensor] = {
            name: tensor for name, tensor in _named_tensors(model) if tensor.device.type == "meta"
        }
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)

    @property
    def names(self) -> list[str]:
        """Names of all parameters and persistent buffers that the source holds."""
        return list(self._key_of)

    def key(self, parameter: str) -> str:
        """Return the source's name of a parameter."""
        return self._key_of[parameter]

    def stored(self, parameter: str) -> Tensor:
        """Read one parameter in the dtype in which it is stored, to the device."""
        return self._source.read(self._key_of[parameter]).to(self._device)

    def load(self, names: Iterable[str]) -> None:
        """Bring parameters in, in the skeleton's dtype."""
        for name in names:
            self.put(name, self._source.read(self._key_of[name]))

    def put(self, name: str, value: Tensor) -> None:
        """Set one parameter, wherever the model holds it."""
        dtype = self._meta[name].dtype if name in self._meta else value.dtype
        self._set(name, value.to(self._device, dtype))

    def release(self, names: Iterable[str]) -> None:
        """Let parameters go: back to the meta device."""
        for name in names:
            if name in self._meta:
                self._set(name, self._meta[name])

    def _set(self, name: str, value: Tensor) -> None:
        is_parameter = any(attribute in module._parameters for module, attribute in self._owners[name])
        tensor = nn.Parameter(value, requires_grad=False) if is_parameter else value
        for module, attribute in self._owners[name]:
            (module._parameters if is_parameter else module._buffers)[attribute] = tensor  # type: ignore[assignment]


def persistent_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint of the model must hold, by name: parameters once each, then persistent buffers."""
    return dict(_named_tensors(model))


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = list(model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found.append((f"{prefix}.{name}" if prefix else name, buffer))
    return found


def _owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return, for each persistent tensor's first name, every (module, attribute) that holds it."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                places.setdefault(id(tensor), []).append((module, attribute))
    return {name: places[id(tensor)] for name, tensor in _named_tensors(model)}
