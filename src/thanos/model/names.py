"""Match the names of a checkpoint's tensors with the names of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from thanos.checkpoint.layout import Checkpoint
from thanos.model.experts import Experts, rename_expert

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def match_parameters(parameters: set[str], tensors: set[str], base_model_prefix: str) -> dict[str, str] | None:
    """Map parameter names one to one onto a checkpoint's tensor names; None if a parameter has no tensor.

    Names are equal, or differ by the base model's prefix: hub checkpoints of GPT-2 lack ``transformer.``. A tensor without a
    parameter, such as a buffer or a tied copy, is ignored.
    """
    prefix = f"{base_model_prefix}."
    candidates = (
        {name: name for name in parameters},
        {name: name.removeprefix(prefix) for name in parameters},
        {name: f"{prefix}{name}" for name in parameters},
    )
    for mapping in candidates:
        if set(mapping.values()) <= tensors and len(set(mapping.values())) == len(mapping):
            return mapping
    return None


def rename_keys(meta_model: PreTrainedModel, keys: Iterable[str]) -> tuple[dict[str, str], bool]:
    """Translate a checkpoint's names by transformers' tables.

    Return the model's name → the checkpoint's name, and whether all names were translated.

    The tables hold pure renamings, such as GPT-NeoX's head, and conversions. The only conversion that is supported is the
    stacking of experts' matrices.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    rules = get_model_conversion_mapping(meta_model) or []
    renamings = [rule for rule in rules if type(rule) is WeightRenaming]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamed, understood = {}, True
    for key in keys:
        plain = key
        for rule in renamings:
            plain = rule.rename_source_key(plain)[0]
        name = rename_expert(plain, converters)
        if name is None:
            understood = False
        else:
            renamed[name] = key
    return renamed, understood


def split_fused(meta_model: PreTrainedModel, checkpoint: Checkpoint, renamed: dict[str, str]) -> None:
    """Split the tensors in which a checkpoint fuses the experts of a block into one tensor for each matrix of each expert."""
    prefix = f"{meta_model.base_model_prefix}."
    for path, experts in meta_model.named_modules():
        if isinstance(experts, Experts):
            for fused, matrices in experts.fused.items():
                for stem in (path, path.removeprefix(prefix), f"{prefix}{path}"):
                    key = renamed.pop(f"{stem}.{fused}", None)
                    if key is not None:
                        named = {f"{stem}.{matrix}": shape for matrix, shape in matrices.items()}
                        checkpoint.split(key, named)
                        renamed |= {name: name for name in named}
