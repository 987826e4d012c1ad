"""The differences in size between a smaller model and its dense parent, counted in the tensors and the configs of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thanos.errors import ModelError
from thanos.model.layers import block_names, find_blocks, linear_layers
from thanos.model.opening import OpenedModel, open_model
from thanos.model.source import resolve_model
from thanos.shrink.families import family_of
from thanos.shrink.units import attention_of, width_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A number in the dense model (before) and in the smaller one (after)."""

    before: int
    after: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockChange:
    """One block.

    Attributes:
        dense_block: its index in the dense model; None if it is not known which blocks were removed.
        block: its index in the smaller model; None if it was removed.
        parameters: number of its parameters; None if ``dense_block`` is None.
        removed: layer name → indices of the removed units in the dense model, if the smaller model's ``pruning.json`` lists
            them.
    """

    dense_block: int | None
    block: int | None
    parameters: Change | None
    removed: dict[str, list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shrinkage:
    """A smaller model compared with its dense parent.

    Attributes:
        dense: the dense model as the user named it.
        sizes: ``block_count``, ``mlp_width`` (neurons of an MLP or of an expert), ``query_heads``, ``key_value_heads``.
        parameters: number of entries of all tensors.
        block_parameters: number of parameters in the blocks.
        tensor_bytes: bytes of all tensors.
        file_bytes: bytes of the weight files.
        blocks: one entry for each block of the dense model, or of the smaller one if it is not known which blocks were removed.
    """

    dense: str
    sizes: dict[str, Change]
    parameters: Change
    block_parameters: Change
    tensor_bytes: Change
    file_bytes: Change
    blocks: list[BlockChange]


def compare_with_dense(smaller: OpenedModel, dense: str | Path, *, trust_remote_code: bool = False) -> Shrinkage:
    """Compare the sizes of a smaller model and its dense parent. Only names, shapes and dtypes are read.

    Raises ModelError if a model cannot be read, or the smaller model is not the dense one with fewer units.
    """
    parent = open_model(resolve_model(dense, trust_remote_code=trust_remote_code))
    before, after = _sizes(parent), _sizes(smaller)
    _check_related(parent, smaller, before, after)
    removed, dropped = _read_removed(smaller, parent)
    counts = [_block_parameters(one) for one in (parent, smaller)]
    return Shrinkage(
        dense=str(dense),
        sizes={name: Change(before=before[name], after=after[name]) for name in before},
        parameters=_change(parent, smaller, lambda one: sum(info.numel for info in one.checkpoint.tensors.values())),
        block_parameters=Change(before=sum(counts[0]), after=sum(counts[1])),
        tensor_bytes=_change(parent, smaller, lambda one: sum(info.nbytes for info in one.checkpoint.tensors.values())),
        file_bytes=_change(parent, smaller, _file_bytes),
        blocks=_blocks(counts[0], counts[1], dropped, removed, find_blocks(parent.meta_model)[0]),
    )


def _change(parent: OpenedModel, smaller: OpenedModel, count: Any) -> Change:
    return Change(before=count(parent), after=count(smaller))


def _file_bytes(opened: OpenedModel) -> int:
    if opened.source.gguf is not None:
        return sum(part.stat().st_size for part in opened.source.gguf_parts)
    return opened.checkpoint.layout.nbytes


def _sizes(opened: OpenedModel) -> dict[str, int]:
    text: Any = opened.meta_model.config.get_text_config(decoder=True)
    family = family_of(text.model_type, type(opened.meta_model).__name__)
    heads = attention_of(text)
    return {
        "block_count": text.num_hidden_layers,
        "mlp_width": width_of(text, family.width),
        "query_heads": heads.queries,
        "key_value_heads": heads.keys,
    }


def _check_related(
    parent: OpenedModel, smaller: OpenedModel, before: Mapping[str, int], after: Mapping[str, int]
) -> None:
    configs: list[Any] = [one.meta_model.config.get_text_config(decoder=True) for one in (parent, smaller)]
    for name in ("model_type", "hidden_size", "vocab_size"):
        one, other = (getattr(config, name) for config in configs)
        if one != other:
            raise ModelError(
                f"--dense {parent.source.name} has {name} {one}, but {smaller.source.name} has {other}; give as --dense the "
                "model that the smaller one was made from"
            )
    widths = [attention_of(config).width for config in configs]
    if widths[0] != widths[1]:
        raise ModelError(
            f"--dense {parent.source.name} has head_dim {widths[0]}, but {smaller.source.name} has {widths[1]}; give as "
            "--dense the model that the smaller one was made from"
        )
    for name in before:
        if after[name] > before[name]:
            raise ModelError(
                f"--dense {parent.source.name} has {name} {before[name]}, fewer than {smaller.source.name} ({after[name]}); "
                "exchange the two models"
            )


def _read_removed(smaller: OpenedModel, parent: OpenedModel) -> tuple[dict[str, list[int]], list[int] | None]:
    """Return the units that each layer lost and the blocks that were removed (None if unknown), from ``pruning.json``.

    The report has indices in the model that was pruned. If that model had been made smaller before, they are not the parent's.
    So a layer is left out if its shape in the report differs from its shape in the parent.
    """
    path = smaller.source.folder / "pruning.json"
    if smaller.source.gguf is not None or not path.is_file():
        return {}, None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        shapes = {layer.name: list(layer.shape) for layer in linear_layers(parent.meta_model)}
        removed = {
            one["name"]: list(one["removed_units"])
            for one in report["layers"]
            if one.get("removed_units") and one["shape"] == shapes.get(one["name"])
        }
        return removed, report.get("cut", {}).get("dropped_blocks")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} is not a report of this version ({error}); move it away to compare without it"
        ) from error


def _block_parameters(opened: OpenedModel) -> list[int]:
    prefix, blocks = find_blocks(opened.meta_model)
    return [
        sum(opened.checkpoint.tensors[opened.key_of[name]].numel for name in block_names(opened.key_of, prefix, index))
        for index in range(len(blocks))
    ]


def _blocks(
    before: list[int], after: list[int], dropped: list[int] | None, removed: Mapping[str, list[int]], prefix: str
) -> list[BlockChange]:
    """Return the blocks in order.

    Args:
        before: number of parameters of each block of the dense model.
        after: number of parameters of each block of the smaller model.
        dropped: indices of the blocks that were removed; None if unknown.
        removed: layer name in the dense model → indices of the units that it lost.
        prefix: name of the list of blocks in the dense model.
    """
    if len(before) == len(after):
        dropped = []
    if dropped is None or len(before) - len(dropped) != len(after):
        return [BlockChange(dense_block=None, block=index, parameters=None, removed={}) for index in range(len(after))]
    changes, index = [], 0
    for dense_index, parameters in enumerate(before):
        stays = dense_index not in dropped
        start = f"{prefix}.{dense_index}."
        changes.append(
            BlockChange(
                dense_block=dense_index,
                block=index if stays else None,
                parameters=Change(before=parameters, after=after[index] if stays else 0),
                removed={name: units for name, units in removed.items() if stays and name.startswith(start)},
            )
        )
        index += stays
    return changes
