"""The loader of packed models: a quantiser that is registered with transformers when this module is imported."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from thanos.checkpoint.layout import TensorSpec
from thanos.checkpoint.reader import read_shard
from thanos.errors import ModelError, UserError
from thanos.sparse.card import save_with_card
from thanos.sparse.formats import VERSION, PackedSpec
from thanos.sparse.kernels import lacking
from thanos.sparse.modules import PackedLinear, packed_modules, quicken
from thanos.sparse.siblings import find_siblings, join
from thanos.sparse.storage import METHOD, ONE_DTYPE, WORDS, check_stored, parse_settings
from thanos.system.library_warnings import ThanosWarning, warn_once

UNPACK = "THANOS_UNPACK"
"""Environment variable: ``auto`` (default) unpacks layers on devices without a kernel, ``always`` all, ``never`` none."""

_CHOICES = ("auto", "always", "never")


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed model; docs/formats.md describes it.

    Args:
        format_version: version of the layout.
        layers: layer's full module name → entry.
        others: keys of later versions, which are kept.
    """

    def __init__(self, format_version: int = VERSION, layers: dict[str, Any] | None = None, **others: Any) -> None:
        self.quant_method: Any = METHOD
        self.format_version = format_version
        self.layers = layers or {}
        self.others = {key: value for key, value in others.items() if key != "quant_method"}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON values."""
        own = {"quant_method": METHOD, "format_version": self.format_version, "layers": self.layers}
        return {**own, **self.others}


@register_quantizer(METHOD)
class SparseQuantizer(HfQuantizer):
    """Replaces linear layers by packed ones before the weights are loaded, and checks the weights afterwards."""

    requires_calibration = True  # a dense model is packed by ``thanos pack``, not while it is loaded

    @property
    def _layers(self) -> dict[str, Any]:
        """The entries of the packed layers, by full module name; layers that are unpacked are removed from it."""
        config: Any = self.quantization_config
        return config.layers

    def _specs(self) -> dict[str, PackedSpec]:
        return parse_settings(self.quantization_config.to_dict(), "the model")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the packed values, in which the model has to run; warn if the caller asked for another.

        Raises:
            ModelError: the layers hold values of two dtypes.
        """
        dtypes = {spec.dtype for spec in self._specs().values()}
        if len(dtypes) > 1:
            raise ModelError(f"config.json has packed layers of {' and '.join(sorted(map(str, dtypes)))}; {ONE_DTYPE}")
        own = dtypes.pop()
        if dtype != own:
            line = f"the packed weights are {own}, so the model runs in {own}, not in {dtype}"
            warnings.warn(line, ThanosWarning, stacklevel=2)
        return own

    def _process_model_before_weight_loading(self, model: Any, **others: Any) -> None:
        specs = self._specs()
        stored = _check_files(others.get("checkpoint_files") or (), specs)
        layers = {name: _find(model, name) for name in specs}
        absent = [name for name, (_, layer) in layers.items() if layer is None]
        for name in (one for one in absent if "." not in one and f"{one}.{WORDS}" in stored):
            # The head of a model that was loaded without it, by AutoModel: transformers leaves out its tensors too.
            del specs[name], layers[name], self._layers[name]
        if len({path for path, _ in layers.values()}) < len(layers):
            raise ModelError("config.json lists a packed layer twice; the packed model is damaged: pack it again")
        paths = [path for path, layer in layers.values() if isinstance(layer, nn.Linear)]
        self._siblings = find_siblings(model, paths)
        for name, spec in specs.items():
            path, layer = layers[name]
            if not isinstance(layer, nn.Linear) or (layer.out_features, layer.in_features) != (spec.rows, spec.columns):
                other = str(layer) if isinstance(layer, nn.Linear) else f"a {type(layer).__name__}"
                raise ModelError(
                    f"config.json packs {name} as a linear layer of {spec.rows} × {spec.columns}, but the model has "
                    f"{'no such layer' if layer is None else other}; the config belongs to another checkpoint"
                )
            model.set_submodule(path, PackedLinear(spec, bias=layer.bias is not None, device="meta"))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if getattr(model, "_tp_size", None):
            raise ModelError(
                "packed layers cannot be divided among processes, as tp_plan does; place whole layers by device_map, "
                "or unpack the model first: thanos unpack PACKED OUT"
            )
        choice = _choice()
        reasons: dict[str, int] = {}
        for name, layer in packed_modules(model).items():
            if layer.weight_words.device.type == "meta":
                raise ModelError(
                    f"{name} would be offloaded, which packed layers do not support; give a device_map that places "
                    "all layers on devices, or unpack the model first: thanos unpack PACKED OUT"
                )
            layer.check(name)
            reason = lacking(_TARGET[-1] or layer.weight_words.device) if choice == "auto" else ""
            if reason or choice == "always":
                self._unpack(model, name, layer)
                reasons[reason] = reasons.get(reason, 0) + 1
        config: Any = self.quantization_config
        config.format_version = VERSION  # the layers now have this version, and ``save_pretrained`` writes it
        for reason, count in reasons.items():
            if reason:
                warn_once(f"{count} packed layers were turned into dense ones: {reason}")
        packed = packed_modules(model)
        for group in self._siblings:
            join([packed[name] for name in group if name in packed])
        if self._layers:
            quicken(model)
            save_with_card(model)
        else:
            self.remove_quantization_config(model)
        return model

    def _unpack(self, model: Any, name: str, layer: PackedLinear) -> None:
        model.set_submodule(name, layer.dense())
        for listed in (name, *(one for one in self._layers if one.partition(".")[2] == name)):
            self._layers.pop(listed, None)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        quicken(model, on=False)
        own = model.dtype
        for name, layer in packed_modules(model).items():
            self._unpack(model, name, layer)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # transformers' config after a save
        return model if dtype in (None, own) else model.to(dtype)  # which would also change float32 buffers

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Remove from the config what is no longer packed, such as a resized head. transformers calls this when it saves."""
        packed = packed_modules(model)
        for name in [one for one in self._layers if one not in packed and one.partition(".")[2] not in packed]:
            del self._layers[name]
        if not self._layers:
            self.remove_quantization_config(model)
        return super().get_state_dict_and_metadata(model)

    def is_serializable(self, *_: Any, **__: Any) -> Any:
        """Whether ``save_pretrained`` works: it writes the packed tensors."""
        return True

    @property
    def is_trainable(self) -> Any:
        """Whether the model can be trained: its packed weights cannot."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` works."""
        return True


def _check_files(files: Sequence[str], specs: dict[str, PackedSpec]) -> dict[str, TensorSpec]:
    """Check the headers of the model's files before memory is allocated; return the files' tensors."""
    tensors: dict[str, TensorSpec] = {}
    if files and all(file.endswith(".safetensors") for file in files):
        for file in files:
            tensors |= read_shard(Path(file))[1]
        check_stored(specs.values(), tensors, str(Path(files[0]).parent))
    return tensors


def _find(model: Any, name: str) -> tuple[str, Any]:
    """Return path and module of a layer. In a model without its head, the path lacks the first part of the name."""
    for path in (name, name.partition(".")[2]):
        try:
            layer = model.get_submodule(path) if path else None
        except AttributeError:
            continue
        if layer is not None:
            return path, layer
    return name, None


def _choice() -> str:
    choice = os.environ.get(UNPACK, "auto")
    if choice not in _CHOICES:
        raise UserError(f"{UNPACK} is {choice!r}; set it to {', '.join(_CHOICES[:-1])} or {_CHOICES[-1]}")
    return choice


_TARGET: list[torch.device | None] = [None]


@contextmanager
def bound_for(device: torch.device | str) -> Iterator[None]:
    """While open, load packed models for the device to which the caller moves them afterwards.

    The device decides whether layers stay packed.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    _TARGET.append(device)
    try:
        yield
    finally:
        _TARGET.pop()
