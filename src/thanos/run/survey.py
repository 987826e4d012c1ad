"""Survey of a checkpoint's tensors: zeros, NaN and infinity, and the reason why a tensor is not pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from thanos.checkpoint.entries import count_any_zeros, count_zeros
from thanos.events import Event
from thanos.model.layers import LinearLayer, block_names, find_blocks
from thanos.model.opening import OpenedModel
from thanos.model.unused import Unused
from thanos.run.report import DenseRecord

NOT_LINEAR = "not a linear layer's weight"

_SAMPLES, _SAMPLE_ENTRIES = 4, 1 << 14
"""Number of contiguous ranges in the sample of a weight, and of entries in each. Only these are read from the disk."""

_MANY_ZEROS = 0.1
"""Fraction of zeros from which a weight counts as pruned. Dense 16-bit weights have a few zeros in ten thousand entries."""


def survey(
    opened: OpenedModel, layers: Iterable[LinearLayer], left_dense: dict[str, str], watch: Callable[[Event], None]
) -> tuple[list[DenseRecord], int]:
    """Read every tensor that is not pruned, before the work begins; return a record of each, and the number of their zeros.

    The weights of ``layers`` are not read here: the engine checks them before it solves each layer. ``left_dense`` maps the
    name of each other linear layer to the reason. Raises NumericsError if a parameter that is not pruned holds NaN or
    infinity.
    """
    pruned = {opened.key_of[layer.weight_name] for layer in layers}
    named = {key: parameter for parameter, key in opened.key_of.items()}
    parameters = {name for name, _ in opened.meta_model.named_parameters()}
    stays = {key: info for key, info in opened.checkpoint.tensors.items() if key not in pruned}
    unused = Unused(opened.meta_model, opened.checkpoint.tensors, opened.key_of)
    dense, zeros = [], 0
    for done, (key, info) in enumerate(stays.items(), 1):
        name = named.get(key, key)
        # A tensor that is no parameter may hold any value: masks with -inf are common.
        count = count_zeros if named.get(key) in parameters else count_any_zeros
        zeros += sum(count(name, part) for part in opened.checkpoint.chunks(key))
        reason = left_dense.get(name.removesuffix(".weight"), NOT_LINEAR) if key in named else unused.why(key)
        dense.append(DenseRecord(name=name, parameters=info.numel, reason=reason))
        # At most 100 events: mixtures of experts have tens of thousands of tensors.
        if 100 * done // len(stays) != 100 * (done - 1) // len(stays):
            watch(Event(kind="progress", phase="load", done=done, total=len(stays)))
    return dense, zeros


def sampled_sparsity(opened: OpenedModel, layers: Sequence[LinearLayer]) -> tuple[float, bool]:
    """Estimate the zeros of layers from a sample of each weight.

    Return the fraction of zeros over all layers, and whether more than half of the layers count as pruned.
    """
    zeros, shares = 0.0, []
    for layer in layers:
        key = opened.key_of[layer.weight_name]
        numel = opened.checkpoint.tensors[key].numel
        step = max(_SAMPLE_ENTRIES, numel // _SAMPLES)
        parts = [
            opened.checkpoint.entries(key, start, min(_SAMPLE_ENTRIES, numel - start))
            for start in range(0, numel, step)
        ]
        share = sum(int((part == 0).sum()) for part in parts) / max(1, sum(len(part) for part in parts))
        shares.append(share)
        zeros += share * numel
    entries = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    return zeros / max(1, entries), 2 * sum(share >= _MANY_ZEROS for share in shares) > len(shares)


def name_damage(opened: OpenedModel, block: int | None) -> None:
    """Raise NumericsError, which names the first parameter with NaN or infinity, if there is one.

    Only the parameters of ``block`` are checked; None stands for all parameters of the model.
    """
    names = opened.key_of
    if block is not None:
        names = block_names(opened.key_of, find_blocks(opened.meta_model)[0], block)
    parameters = {name for name, _ in opened.meta_model.named_parameters()}
    for name in names:
        if name in parameters:
            for part in opened.checkpoint.chunks(opened.key_of[name]):
                count_zeros(name, part)
