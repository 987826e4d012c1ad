"""The weights of a meta model, loaded from a checkpoint when they are needed and released afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from thanos.checkpoint.layout import TensorSource
from thanos.model.meta_model import named_tensors, tensor_owners
from thanos.system.background import Background
from thanos.system.staging import Staging

ALIGNMENT = 64
"""Bytes of a cache line. On the CPU a product may sum in another order if a matrix does not begin at a multiple of it. A tensor
that was read from a file often does not, so a resumed run would get other last bits than the run that computed the tensor."""


class ModelWeights:
    """The parameters and persistent buffers of a meta model, by parameter name.

    Args:
        model: a meta model, with its parameters on the meta device.
        source: source of the tensors.
        key_of: parameter name → tensor name in the source; tied parameters appear under one name.
        device: device to which parameters are loaded.
    """

    def __init__(self, model: nn.Module, source: TensorSource, key_of: dict[str, str], device: torch.device) -> None:
        self._source, self._key_of, self._device = source, key_of, device
        self._owners = tensor_owners(model)
        self._meta: dict[str, Tensor] = {
            name: tensor for name, tensor in named_tensors(model) if tensor.device.type == "meta"
        }
        # Values that were loaded without rounding, and their dtype in the source.
        self._as_stored: dict[str, tuple[Tensor, torch.dtype]] = {}
        self._reader = Background("thanos-reader", device)
        self._staging = Staging(device)  # used by one thread at a time: the reader, or the caller once that is done
        self._ahead: tuple[dict[str, Tensor], Future[dict[str, torch.dtype]]] | None = None
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)

    @property
    def names(self) -> list[str]:
        """Names of all parameters and persistent buffers that the source holds."""
        return list(self._key_of)

    def key(self, parameter: str) -> str:
        """Return a parameter's tensor name in the source."""
        return self._key_of[parameter]

    def parameter(self, name: str) -> Tensor:
        """Return one parameter as the model holds it now; on the meta device if it is not loaded."""
        return self._current(name)

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """Return the dtype of one parameter in the source."""
        return self._source.tensors[self._key_of[parameter]].dtype

    def stored(self, parameter: str) -> Tensor:
        """Return one parameter's value in the source, in its stored dtype, on the device. Do not modify it."""
        if parameter in self._as_stored:  # loaded without rounding: no need to read it again
            value, dtype = self._as_stored[parameter]
            return value.to(dtype)
        return self._source.read(self._key_of[parameter]).to(self._device)

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to read parameters in the background, for the next :meth:`load` of the same names.

        If the device has no room for them in addition to the loaded ones, nothing is read ahead, and that load reads them.
        """
        self._forget_ahead()
        try:
            tensors = self._allocate(names)
        except torch.OutOfMemoryError:
            return
        self._ahead = tensors, self._reader.submit(self._fill, tensors)

    def load(self, names: Iterable[str]) -> None:
        """Load parameters in the meta model's dtype. Wait for the background reading of the same names, if any."""
        names = list(names)
        if self._ahead is not None and list(self._ahead[0]) == names:
            (tensors, future), self._ahead = self._ahead, None
            exact = future.result()
        else:
            self._forget_ahead()
            tensors = self._allocate(names)
            exact = self._fill(tensors)
        for name, value in tensors.items():
            self._set(name, value)
            if name in exact:
                self._as_stored[name] = value, exact[name]

    def put(self, name: str, value: Tensor) -> None:
        """Set one parameter in all modules that hold it."""
        dtype = self._meta[name].dtype if name in self._meta else value.dtype
        self._as_stored.pop(name, None)
        value = value.to(self._device, dtype)
        self._set(name, value if value.data_ptr() % ALIGNMENT == 0 else value.clone())

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Use other values of some parameters inside the context; afterwards the same tensor objects as before are in place."""
        before: list[tuple[dict[str, Any], str, Any]] = []
        for name, value in values.items():
            for module, attribute in self._owners[name]:
                slots: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
                before.append((slots, attribute, slots[attribute]))
                slots[attribute] = value
        try:
            yield
        finally:
            for slots, attribute, value in before:
                slots[attribute] = value

    def is_own(self, name: str) -> bool:
        """Return whether a tensor is a parameter that exactly one module holds, not a buffer and not shared."""
        owners = self._owners[name]
        return len(owners) == 1 and owners[0][1] in owners[0][0]._parameters

    def release(self, names: Iterable[str]) -> None:
        """Free parameters: the model's tensors are on the meta device again."""
        for name in names:
            self._as_stored.pop(name, None)
            if name in self._meta:
                self._set(name, self._meta[name])

    def close(self) -> None:
        """End the background reading."""
        self._forget_ahead()
        self._reader.close()

    def _allocate(self, names: Iterable[str]) -> dict[str, Tensor]:
        # In the caller's thread and on its stream, so that the CUDA allocator reuses the memory of an earlier block.
        tensors = {}
        for name in names:
            like = self._meta[name] if name in self._meta else self._current(name)
            tensors[name] = torch.empty(like.shape, dtype=like.dtype, device=self._device)
        return tensors

    def _fill(self, tensors: dict[str, Tensor]) -> dict[str, torch.dtype]:
        """Read the tensors into the allocated memory; return name → stored dtype, where the stored value can be recovered."""
        exact = {}
        try:
            for name, tensor in tensors.items():
                flat, done, dtype = tensor.view(-1), 0, tensor.dtype
                for chunk in self._source.chunks(self._key_of[name]):
                    target = flat[done : done + len(chunk)]
                    if tensor.is_cuda:
                        self._staging.fill(target, chunk)
                    else:
                        target.copy_(chunk)
                    done, dtype = done + len(chunk), chunk.dtype
                assert done == flat.numel(), f"{name} has {flat.numel()} entries, and the checkpoint {done}"
                if dtype == tensor.dtype or widens(dtype, tensor.dtype):
                    exact[name] = dtype
        finally:
            self._staging.wait()  # also after an error: a pending copy would write into memory that is reused
        return exact

    def _forget_ahead(self) -> None:
        if self._ahead is not None:
            (_, future), self._ahead = self._ahead, None
            future.exception()  # wait: the task writes into its memory until it is done

    def _current(self, name: str) -> Tensor:
        module, attribute = self._owners[name][0]
        tensor = module._parameters.get(attribute)
        tensor = module._buffers[attribute] if tensor is None else tensor
        assert tensor is not None
        return tensor

    def _set(self, name: str, value: Tensor) -> None:
        is_parameter = any(attribute in module._parameters for module, attribute in self._owners[name])
        tensor = nn.Parameter(value, requires_grad=False) if is_parameter else value
        for module, attribute in self._owners[name]:
            (module._parameters if is_parameter else module._buffers)[attribute] = tensor  # type: ignore[assignment]


def widens(stored: torch.dtype, held: torch.dtype) -> bool:
    """Return whether ``held`` represents every value of ``stored``, so that converting there and back is exact."""
    return stored in (torch.bfloat16, torch.float16) and held in (torch.float32, torch.float64)
