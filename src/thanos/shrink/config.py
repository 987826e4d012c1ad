"""The config of a smaller model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thanos.errors import ModelError
from thanos.shrink.families import family_of
from thanos.shrink.units import GROUP, HEADS, NEURONS, QUERY, attention_of, width_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_BLOCK_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Fields with a list that has one entry for each block."""

_PERIODS = ("sliding_window_pattern", "_sliding_window_pattern")
"""Fields of Gemma 3 for the period of the blocks with full attention, if there is no ``layer_types``."""

_EXPERT_MULTIPLE = 8
"""The number of neurons of an expert must be a multiple of this: torch's ``grouped_mm`` needs rows of a multiple of 16 bytes,
which are 8 floats of 16 bits."""


def smaller_config(
    config: PreTrainedConfig, removed: Mapping[str, int], dropped_blocks: Sequence[int] = (), head_unit: str = GROUP
) -> dict[str, Any]:
    """Return the config of a smaller model, in the form of ``to_dict``.

    Args:
        config: config of the model. If the model has several parts, the text model's config is changed.
        removed: kind of units → number of units that each writer loses.
        dropped_blocks: indices of the removed blocks.
        head_unit: the unit of heads; see :func:`~thanos.shrink.units.units_of`.

    Raises:
        ModelError: nothing would be left, a block's function depends on its index, or the config's class refuses the sizes.
    """
    return changed_config(config, config.to_dict(), removed, dropped_blocks, head_unit)


def changed_config(
    config: PreTrainedConfig,
    values: Mapping[str, Any],
    removed: Mapping[str, int],
    dropped_blocks: Sequence[int] = (),
    head_unit: str = GROUP,
) -> dict[str, Any]:
    """Like :func:`smaller_config`, but return ``values``, the content of ``config.json``, with the changes."""
    changes = _changes(config, removed, dropped_blocks, head_unit)
    changed = _with_changes(config, values, changes)
    if reason := _refusal(config, changed):
        hint = _possible_heads(config, values, removed, dropped_blocks, head_unit)
        raise ModelError(f"{type(config).__name__} refuses the smaller sizes: {reason}{hint}")
    return changed


def lists_out_of_order(config: PreTrainedConfig, dropped_blocks: Sequence[int]) -> list[str]:
    """Return the names of the config's lists by block that, without the dropped blocks, are not a prefix of the old list.

    A program that does not read the list, but computes the kind of a block from its index, would run another model.

    Args:
        config: config of the text model.
        dropped_blocks: indices of the removed blocks.
    """
    dropped, names = set(dropped_blocks), []
    for name in _BLOCK_LISTS:
        values = getattr(config, name, None) or []
        left = [value for index, value in enumerate(values) if index not in dropped]
        if left != values[: len(left)]:
            names.append(name)
    return names


def changed_sizes(
    config: PreTrainedConfig, removed: Mapping[str, int], dropped_blocks: Sequence[int] = (), head_unit: str = GROUP
) -> dict[str, tuple[int, int]]:
    """Return the sizes in the config that change: name of the field → number before and after.

    Arguments and errors are those of :func:`smaller_config`, but the config's class does not check the sizes.
    """
    text: Any = config.get_text_config(decoder=True)
    family = family_of(text.model_type, type(config).__name__)
    before = {family.width: width_of(text, family.width), family.layers: text.num_hidden_layers}
    if removed.get(HEADS):
        heads = attention_of(text)
        before |= {"num_attention_heads": heads.queries, "num_key_value_heads": heads.keys}
    after = _changes(config, removed, dropped_blocks, head_unit)
    return {name: (size, after[name]) for name, size in before.items() if after.get(name, size) != size}


def _changes(
    config: PreTrainedConfig, removed: Mapping[str, int], dropped_blocks: Sequence[int], head_unit: str
) -> dict[str, Any]:
    """Return the fields of the text model's config that change."""
    text: Any = config.get_text_config(decoder=True)
    family = family_of(text.model_type, type(config).__name__)
    changes: dict[str, Any] = {}
    if neurons := removed.get(NEURONS, 0):
        width = width_of(text, family.width)
        changes[family.width] = left = _left(width, neurons, "neurons in each MLP")
        if left % _EXPERT_MULTIPLE and family.has_experts:
            raise ModelError(
                f"experts of {left} neurons cannot run: torch's grouped_mm needs rows of a multiple of 16 bytes; keep a "
                f"multiple of {_EXPERT_MULTIPLE} neurons"
            )
    if heads := removed.get(HEADS, 0):
        if isinstance(family.attention, str):
            raise ModelError(f"{type(config).__name__} cannot lose heads: {family.attention}")
        now = attention_of(text)
        queries, keys = (now.keys, 0) if head_unit == QUERY and now.shared > 1 else (now.shared, 1)
        units = now.queries // queries
        changes["num_attention_heads"] = _left(units, heads, f"{_unit(queries, keys)} in each block") * queries
        changes["num_key_value_heads"] = now.keys - heads * keys
        changes["head_dim"] = now.width
    if dropped_blocks:
        if family.uses_index and getattr(text, family.uses_index, False):
            raise ModelError(
                f"no block can be removed: with {family.uses_index} a block's function depends on its index"
            )
        changes |= _fewer_blocks(text, family.layers, dropped_blocks)
    return changes


def _unit(queries: int, keys: int) -> str:
    if keys and queries == 1:
        return "heads"
    return f"key-value heads with {queries} query heads each" if keys else f"query heads of each of {queries} groups"


def _left(units: int, removed: int, what: str) -> int:
    if not 0 < removed < units:
        allowed = f"1 to {units - 1} can" if units > 1 else "the last one must stay"
        raise ModelError(f"{removed} of {units} {what} cannot be removed; {allowed}")
    return units - removed


def _fewer_blocks(text: Any, layers: str, dropped_blocks: Sequence[int]) -> dict[str, Any]:
    """Return the changed fields for the number of blocks and the kind of each block."""
    count, dropped = text.num_hidden_layers, set(dropped_blocks)
    if wrong := sorted(index for index in dropped if not 0 <= index < count):
        raise ModelError(f"there is no block {wrong[0]}; the blocks are 0 to {count - 1}")
    changes: dict[str, Any] = {layers: _left(count, len(dropped), "blocks")}
    stay = [index for index in range(count) if index not in dropped]
    for name in _BLOCK_LISTS:
        values = getattr(text, name, None)
        if values is not None:
            changes[name] = [values[index] for index in stay]
    windows = getattr(text, "max_window_layers", None) or 0  # blocks before it have no sliding window
    if 0 < windows < count:
        changes["max_window_layers"] = windows - sum(index < windows for index in dropped)
    if hasattr(text, "mlp_only_layers"):
        step = getattr(text, "decoder_sparse_step", 1)
        without_experts = set(text.mlp_only_layers or ())
        changes["mlp_only_layers"] = [
            new for new, old in enumerate(stay) if old in without_experts or (step > 0 and (old + 1) % step)
        ]
        changes["decoder_sparse_step"] = 1
    return changes


def _with_changes(config: PreTrainedConfig, values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config's values with the text model's fields changed. Aliases of a changed field are removed."""
    changed = copy.deepcopy(dict(values))
    text = config.get_text_config(decoder=True)
    inner = [name for name, part in vars(config).items() if part is text]
    target = changed.setdefault(inner[0], {}) if inner else changed
    for alias, field in text.attribute_map.items():
        if field in changes:
            target.pop(alias, None)
    target.update(changes)
    if "layer_types" in changes:
        for name in _PERIODS:
            if not _is_periodic(changes["layer_types"], target.get(name)):
                target.pop(name, None)  # a program that reads it instead of the list would run another model
    return changed


def _is_periodic(layer_types: Sequence[str], period: int | None) -> bool:
    """Whether exactly the blocks whose number, from 1, is a multiple of the period have full attention."""
    full = [number for number, kind in enumerate(layer_types, 1) if kind == "full_attention"]
    return bool(period) and full == list(range(period, len(layer_types) + 1, period))


def _refusal(config: PreTrainedConfig, values: Mapping[str, Any]) -> str:
    """Return the reason why the config's class refuses the values; empty if it accepts them."""
    try:
        type(config).from_dict(copy.deepcopy(dict(values)))
    except Exception as error:  # the checks of the classes raise errors of many types
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[-1].removeprefix("ValueError: ").rstrip(".") if lines else type(error).__name__
    return ""


def _possible_heads(
    config: PreTrainedConfig,
    values: Mapping[str, Any],
    removed: Mapping[str, int],
    dropped_blocks: Sequence[int],
    head_unit: str,
) -> str:
    """Return the end of a message that states how many heads can be removed; empty if ``removed`` has no heads."""
    if not removed.get(HEADS):
        return ""
    now = attention_of(config.get_text_config(decoder=True))
    units = now.shared if head_unit == QUERY and now.shared > 1 else now.keys

    def accepted() -> Iterable[int]:
        for heads in range(1, units):
            changes = _changes(config, {**removed, HEADS: heads}, dropped_blocks, head_unit)
            if not _refusal(config, _with_changes(config, values, changes)):
                yield heads

    possible = ", ".join(map(str, accepted()))
    return f"; of {units} units of heads, {possible or 'none'} can be removed"
