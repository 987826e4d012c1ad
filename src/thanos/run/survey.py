"""Looking through a checkpoint's tensors: zeros, NaN and infinity, and why each tensor that stays is left as it is."""

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
"""Contiguous ranges of a weight that a sample takes, and the entries of each. Only these are read from the disk."""

_MANY_ZEROS = 0.1
"""Share of zeros from which a weight counts as pruned: dense 16-bit weights have a few in ten thousand."""


def survey(
    opened: OpenedModel, layers: Iterable[LinearLayer], left_dense: dict[str, str], watch: Callable[[Event], None]
) -> tuple[list[DenseRecord], int]:
    """Read every tensor that stays: count its zeros, and refuse NaN and infinity before the work rather than after.

    Args:
        opened: the model.
        layers: what will be pruned, which is looked at when its turn comes.
        left_dense: name of each other linear layer → why it stays.
        watch: is told how many tensors were read.

    Returns:
        Each tensor that stays and why, and the number of zeros in them.

    Raises:
        NumericsError: a parameter that stays holds NaN or infinity.
    """
    pruned = {opened.key_of[layer.weight_name] for layer in layers}
    named = {key: parameter for parameter, key in opened.key_of.items()}
    parameters = {name for name, _ in opened.meta_model.named_parameters()}
    stays = {key: info for key, info in opened.checkpoint.tensors.items() if key not in pruned}
    unused = Unused(opened.meta_model, opened.checkpoint.tensors, opened.key_of)
    dense, zeros = [], 0
    for done, (key, info) in enumerate(stays.items(), 1):
        name = named.get(key, key)
        # What no parameter needs may be anything: masks that hold -inf are common.
        count = count_zeros if named.get(key) in parameters else count_any_zeros
        zeros += sum(count(name, part) for part in opened.checkpoint.chunks(key))
        reason = left_dense.get(name.removesuffix(".weight"), NOT_LINEAR) if key in named else unused.why(key)
        dense.append(DenseRecord(name=name, parameters=info.numel, reason=reason))
        if 100 * done // len(stays) != 100 * (done - 1) // len(stays):  # mixtures have tens of thousands of tensors
            watch(Event(kind="progress", phase="load", done=done, total=len(stays)))
    return dense, zeros


def sampled_sparsity(opened: OpenedModel, layers: Sequence[LinearLayer]) -> tuple[float, bool]:
    """Return the share of zeros that layers hold already, from a sample of each, and whether most of them are pruned."""
    zeros, shares = 0.0, []
    for layer in layers:
        flat = opened.checkpoint.read(opened.key_of[layer.weight_name]).reshape(-1)
        step = max(_SAMPLE_ENTRIES, len(flat) // _SAMPLES)
        parts = [flat[start : start + _SAMPLE_ENTRIES] for start in range(0, len(flat), step)]
        share = sum(int((part == 0).sum()) for part in parts) / max(1, sum(len(part) for part in parts))
        shares.append(share)
        zeros += share * len(flat)
    entries = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    return zeros / max(1, entries), 2 * sum(share >= _MANY_ZEROS for share in shares) > len(shares)


def name_damage(opened: OpenedModel, block: int | None) -> None:
    """Find the tensor that made a block's numbers NaN or infinite.

    Args:
        opened: the model.
        block: index of the block; None for what lies outside the blocks.

    Raises:
        NumericsError: one of its tensors holds NaN or infinity; names it.
    """
    names = opened.key_of
    if block is not None:
        names = block_names(opened.key_of, find_blocks(opened.meta_model)[0], block)
    parameters = {name for name, _ in opened.meta_model.named_parameters()}
    for name in names:
        if name in parameters:
            for part in opened.checkpoint.chunks(opened.key_of[name]):
                count_zeros(name, part)
