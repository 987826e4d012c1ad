"""Weight-only quantisation of a loaded model by torchao (the extra ``quantised``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from thanos.errors import DataError, ModelError
from thanos.sparse.modules import is_plain
from thanos.system.extras import install_command, is_installed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GROUPS = (128, 64, 32)
"""Numbers of int4 weights that share one scale, the largest first. torchao has kernels for these on CUDA and on the CPU."""


def check_installed() -> None:
    """Raise DataError if torchao is not installed."""
    if not is_installed("torchao"):
        raise DataError(f"--quantised needs the package torchao: {install_command('quantised')}")


def check_device(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ModelError if torchao does not support a kind of quantisation for a model on this device, in this dtype."""
    if kind != "int4":
        return
    if device.type not in ("cuda", "cpu"):
        raise ModelError(f"torchao has no int4 for {device.type}; use a CUDA device or the CPU")
    if device.type == "cuda" and dtype != torch.bfloat16:
        raise ModelError(
            f"torchao's int4 on CUDA computes in bfloat16, and the model runs in {str(dtype)[6:]}; give --dtype bfloat16"
        )


def quantise(model: PreTrainedModel, kind: str) -> str:
    """Quantise the weights of a model's linear layers in place, and return a sentence for the model's notes.

    A head that shares its weight with the embedding is not quantised, since that would add a second copy of the weight.

    Args:
        model: the loaded model, on the device where it runs.
        kind: one of :data:`KINDS`.

    Raises:
        DataError: torchao is not installed.
        ModelError: torchao cannot quantise this model on this device.
    """
    check_installed()
    check_device(kind, model.device, model.dtype)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    layers = {
        name: module for name, module in model.named_modules() if is_plain(module) and not (tied and module is head)
    }
    if not layers:
        raise ModelError(f"{kind}: the model has no plain linear layer, so torchao has nothing to quantise")
    config, words = _CONFIGS[kind](model, layers)
    from torchao.quantization import quantize_

    try:
        quantize_(model, config, filter_fn=lambda module, name: name in layers)
    except Exception as error:  # torchao raises errors of many types for a missing kernel
        raise ModelError(f"torchao cannot quantise to {kind} on {model.device.type}: {_first_line(error)}") from error
    left = [name for name, module in layers.items() if type(module.weight) in (torch.Tensor, nn.Parameter)]
    if len(left) == len(layers):
        raise ModelError(f"torchao quantised no layer to {kind}: it supports none of their shapes")
    kept = f"; {len(left)} of {len(layers)} layers stay dense" if left else ""
    return f"quantised by torchao {_version()}, {words}{'; the head, tied to the embedding, stays dense' if tied else ''}{kept}"


def _int8(model: PreTrainedModel, layers: dict[str, nn.Linear]) -> tuple[Any, str]:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False), "one scale per row"


def _int4(model: PreTrainedModel, layers: dict[str, nn.Linear]) -> tuple[Any, str]:
    """Return torchao's int4 config for the device: tinygemm's tiles on CUDA, the layout of torch's own kernel on a CPU.

    HQQ chooses the scales and zero points. It is the more accurate of torchao's two algorithms and uses the same kernels.
    """
    group = _group_size(layers)
    settings: dict[str, Any] = {
        "group_size": group,
        "int4_choose_qparams_algorithm": "hqq",
        "set_inductor_config": False,
    }
    words = f"HQQ, groups of {group}"
    if model.device.type == "cuda":
        from torchao.quantization import Int4WeightOnlyConfig

        settings["int4_packing_format"] = "tile_packed_to_4d"
        return Int4WeightOnlyConfig(**settings), words
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    except ImportError as error:
        raise ModelError(f"torchao {_version()} has no int4 for CPUs; use a CUDA device, or torchao 0.18") from error
    return PrototypeInt4WeightOnlyConfig(**settings), words


def _group_size(layers: dict[str, nn.Linear]) -> int:
    """Return the group size that divides the width of the most layers; of several, the largest."""
    widths = [layer.in_features for layer in layers.values()]
    return max(_GROUPS, key=lambda size: (sum(width % size == 0 for width in widths), size))


_CONFIGS: dict[str, Callable[[PreTrainedModel, dict[str, nn.Linear]], tuple[Any, str]]] = {"int8": _int8, "int4": _int4}

KINDS = tuple(_CONFIGS)
"""The kinds of quantisation."""


def _version() -> str:
    from importlib import metadata

    return metadata.version("torchao")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
