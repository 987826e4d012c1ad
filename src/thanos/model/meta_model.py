"""A model on the meta device: its modules and shapes, without weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thanos.model.experts import unfuse
from thanos.model.transformers_errors import building_errors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_PATCHING = threading.Lock()


def build_meta_model(
    config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False, name: str = "the model"
) -> PreTrainedModel:
    """Build the causal LM of a config with every parameter on the meta device, in ``dtype``, and every buffer real.

    Parameters are read from the checkpoint later. Buffers such as rotary frequencies are not in checkpoints, so they are
    computed here. Fused mixtures of experts are unfused into linear layers. Raises ModelError if a package that the model
    needs is missing, its code or config fails, or a mixture of experts has a layout that is not supported. ``name`` is for
    messages.
    """
    if getattr(config, "rescale_every", 0):
        # RWKV halves hidden states between blocks, and scales weights to match, to stay within float16. Without
        # this, the model computes the same function.
        config = copy.deepcopy(config)
        config.rescale_every = 0
    model = build_fused_model(config, dtype, trust_remote_code=trust_remote_code, name=name)
    unfuse(model)
    return model


def build_fused_model(
    config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False, name: str = "the model"
) -> PreTrainedModel:
    """Build a meta model as :func:`build_meta_model` does, with transformers' own fused mixtures of experts."""
    from transformers import AutoModelForCausalLM

    with building_errors(name, config), _parameters_on_meta():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval().requires_grad_(False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None and param.device.type != "meta":
            # The memory of an uninitialised parameter was never written, so no page of it is in use.
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    with _PATCHING:
        nn.Module.register_parameter = register
        try:
            yield
        finally:
            nn.Module.register_parameter = original


def persistent_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint of the model must hold, by name: parameters, then persistent buffers."""
    return dict(named_tensors(model))


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return (name, tensor) of all parameters, then of all persistent buffers. A tied parameter has its first name only."""
    found: list[tuple[str, Tensor]] = list(model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found.append((f"{prefix}.{name}" if prefix else name, buffer))
    return found


def tensor_owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return the first name of each persistent tensor → all (module, attribute) pairs that hold the tensor."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                holders.setdefault(id(tensor), []).append((module, attribute))
    return {name: holders[id(tensor)] for name, tensor in named_tensors(model)}
