"""Opening, comparing and loading the pruned model and its dense parent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from thanos.engine.weights import ModelWeights
from thanos.errors import ModelError, NumericsError
from thanos.events import Event, Watcher
from thanos.model.bos import added_bos
from thanos.model.layers import LinearLayer, find_blocks, linear_layers
from thanos.model.loading import adapter_notes
from thanos.model.meta_model import persistent_tensors
from thanos.model.opening import OpenedModel, open_model
from thanos.model.source import ModelSource, find_local, resolve_model
from thanos.patterns.base import STRAY
from thanos.run.survey import name_damage

_LEAST_COSINE = 0.2
"""Least cosine between the kept weights of a child and the parent's weights at the same positions. It is about 0 for unrelated
weights, 1 if pruning did not update the kept weights, and far above this limit if it did."""

_PROBE = "The quick brown fox jumps over 13 lazy dogs.\n\tÉlan, naïveté — 你好! def f(x): return x**2"
"""Text for which both tokenizers must give the same ids: words, digits, white space, other scripts, code."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A pruned model and its dense parent, opened but not loaded.

    Attributes:
        pruned: the pruned model; its meta model is float32.
        dense: the dense model.
        smaller: whether the pruned model has fewer blocks, or smaller sizes, than the dense one.
        masked: the linear layers of the pruned model whose weights contain zeros.
        zeros: number of zeros in these weights.
        sparse: whether the linear layers of the blocks have more zeros than dense weights have by chance.
        size: root mean square of the non-zero weights of these layers.
    """

    pruned: OpenedModel
    dense: OpenedModel
    smaller: bool
    masked: list[LinearLayer]
    zeros: int
    sparse: bool
    size: float


def resolve_pair(model: str | Path, dense: str | Path, *, trust_remote_code: bool) -> tuple[ModelSource, ModelSource]:
    """Find the pruned and the dense model, and compare their tokenizers. No weight is read.

    Raises:
        ModelError: a model is missing, quantised or not supported; the pruned one is a GGUF file; they are the same; or their
            tokenizers differ.
    """
    source = find_local(model, trust_remote_code=trust_remote_code, what="OUT")
    if source is not None and source.gguf is not None:
        raise ModelError(
            f"OUT {model} is a GGUF file, whose weights are quantised; give the folder of safetensors that prune wrote"
        )
    parent = find_local(dense, trust_remote_code=trust_remote_code, what="the dense model")
    folders = [one.folder.resolve() for one in (source, parent) if one is not None and one.gguf is None]
    if len(folders) == 2 and folders[0] == folders[1]:
        raise ModelError(f"--dense {dense} is OUT itself; give the model that OUT was pruned from")
    source = resolve_model(model, trust_remote_code=trust_remote_code)
    parent = resolve_model(dense, trust_remote_code=trust_remote_code)
    _check_tokenizers(source, parent)
    return source, parent


def _check_tokenizers(source: ModelSource, parent: ModelSource) -> None:
    ours, theirs = source.tokenizer(), parent.tokenizer()
    why = ""
    if ours.get_vocab() != theirs.get_vocab():
        why = f"{len(ours)} and {len(theirs)} entries" if len(ours) != len(theirs) else "entries differ"
    elif ours(_PROBE)["input_ids"] != theirs(_PROBE)["input_ids"] or added_bos(ours) != added_bos(theirs):
        why = "they give other tokens for a text"
    if why:
        raise _not_parent(source, parent, f"their tokenizers differ ({why})")


def notes_on(pruned: OpenedModel, dense: OpenedModel) -> list[str]:
    """Return the notes on both models, each with a name for its model."""
    return [*(f"OUT: {note}" for note in pruned.notes), *(f"the dense model: {note}" for note in dense.notes)]


def open_pair(
    source: ModelSource, parent: ModelSource, device: torch.device, watch: Watcher, *, compare_weights: bool
) -> Pair:
    """Open both models and compare them.

    Args:
        source: the pruned model.
        parent: the dense model.
        device: device of the training. The dense model runs in its own dtype on CUDA and in float32 on a CPU.
        watch: function that is called with notes and progress events.
        compare_weights: also compare the weights; see :func:`_check_weights` and :func:`_check_embeddings`.

    Raises:
        ModelError: the models do not belong together, or the pruned one has neither zeros nor smaller sizes.
    """
    pruned = open_model(source, "float32")
    dense = open_model(parent, "auto" if device.type == "cuda" else "float32")
    for opened in (pruned, dense):
        if opened.source.gguf is None:  # open_model has noted that of a GGUF file
            opened.notes.extend(adapter_notes(opened.source))
    for note in notes_on(pruned, dense):
        watch(Event(kind="note", phase="load", message=note))
    smaller = _check_shapes(pruned, dense)
    embedding = getattr(pruned.meta_model.get_input_embeddings(), "weight", None)
    layers = [
        layer
        for layer in linear_layers(pruned.meta_model)
        if layer.weight_name in pruned.key_of and layer.module.get_parameter("weight") is not embedding
    ]
    masked, counts = [], []
    within, total, squares = 0, 0, 0.0
    for done, layer in enumerate(layers, 1):
        weight = pruned.checkpoint.read(pruned.key_of[layer.weight_name])
        zeros = weight.numel() - int(weight.count_nonzero())
        if layer.block is not None:
            within, total = within + zeros, total + weight.numel()
            squares += float(weight.float().square().sum(dtype=torch.float64))
        if zeros:
            masked.append(layer)
            counts.append(zeros)
        watch(Event(kind="progress", phase="load", done=done, total=len(layers)))
    sparse = within > STRAY * total
    if not sparse and not smaller:
        raise ModelError(
            f"OUT {source.name} has no zeros to keep fixed ({within:,} of {total:,} weights of its linear layers), and is as "
            "large as the dense model; give a pruned model"
        )
    pair = Pair(pruned, dense, smaller, masked, sum(counts), sparse, (squares / max(1, total - within)) ** 0.5)
    if compare_weights and smaller:
        _check_embeddings(pair)
    elif compare_weights:
        _check_weights(pair)
    return pair


def _check_shapes(pruned: OpenedModel, dense: OpenedModel) -> bool:
    """Compare the parameters' names and shapes; return whether the pruned model is smaller than the dense one.

    A pruned model has the parameters of its parent. Within the blocks they may be smaller, and there may be fewer blocks. All
    other shapes are equal.

    Raises:
        ModelError: the dense model cannot be the parent.
    """
    ours, theirs = (persistent_tensors(opened.meta_model) for opened in (pruned, dense))
    blocks = [find_blocks(opened.meta_model) for opened in (pruned, dense)]
    (prefix, kept), (_, all_blocks) = blocks
    dropped = tuple(f"{prefix}.{index}." for index in range(len(kept), len(all_blocks)))
    for own, other, where in ((ours, theirs, "the dense model"), (theirs, ours, "OUT")):
        missing = [name for name in own if name not in other and not (dropped and name.startswith(dropped))]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise _not_parent(pruned.source, dense.source, f"{where} has no {missing[0]}{more}")
    smaller = bool(dropped)
    for name, tensor in ours.items():
        sizes, whole = tuple(tensor.shape), tuple(theirs[name].shape)
        fits = len(sizes) == len(whole) and all(size <= limit for size, limit in zip(sizes, whole, strict=True))
        if sizes != whole and not (fits and name.startswith(f"{prefix}.")):
            shapes = f"{list(sizes)} in OUT and {list(whole)} in the dense model"
            raise _not_parent(pruned.source, dense.source, f"{name} has shape {shapes}")
        smaller |= sizes != whole
    return smaller


def _check_embeddings(pair: Pair) -> None:
    """Raise ModelError if the embeddings of the dense and the smaller model do not resemble each other.

    The embeddings have the same shape, since a smaller model only lost parts of its blocks.
    """
    ours, theirs = (_embedding(opened) for opened in (pair.pruned, pair.dense))
    if (cosine := torch.cosine_similarity(ours, theirs, dim=0).item()) < _LEAST_COSINE:
        raise _not_parent(
            pair.pruned.source, pair.dense.source, f"their embeddings do not resemble each other (cosine {cosine:.2f})"
        )


def _embedding(opened: OpenedModel) -> Tensor:
    table = opened.meta_model.get_input_embeddings().get_parameter("weight")
    name = next(name for name, parameter in opened.meta_model.named_parameters() if parameter is table)
    return opened.checkpoint.read(opened.key_of[name]).flatten().float()


def _check_weights(pair: Pair) -> None:
    """Raise ModelError if the dense model's weights cannot be those before pruning.

    Three facts hold for every parent. It has fewer zeros than the pruned model. Its zeros are zeros of the pruned model too,
    with few exceptions, since pruning never changes a zero. The kept weights resemble the parent's weights.
    """
    extra, filled, survivors = 0, 0, 0
    product, ours, theirs = 0.0, 0.0, 0.0
    for layer in pair.masked:
        child = pair.pruned.checkpoint.read(pair.pruned.key_of[layer.weight_name])
        parent = pair.dense.checkpoint.read(pair.dense.key_of[layer.weight_name])
        kept, there = child != 0, parent != 0
        extra += int((there & ~kept).sum())
        filled += int((kept & ~there).sum())
        survivors += int(kept.sum())
        a, b = child.flatten().float(), (parent * kept).flatten().float()
        product, ours, theirs = product + float(a @ b), ours + float(a @ a), theirs + float(b @ b)
    sources = pair.pruned.source, pair.dense.source
    if not extra or extra <= STRAY * pair.zeros:
        raise _not_parent(*sources, "it has the same zeros itself, so it is not dense", child=False)
    if filled > STRAY * survivors:
        raise _not_parent(
            *sources,
            f"{filled:,} non-zero weights of OUT are zero in the dense model, and pruning never changes a zero",
        )
    cosine = product / max(1e-30, (ours * theirs) ** 0.5)
    if cosine < _LEAST_COSINE:
        raise _not_parent(
            *sources, f"the non-zero weights of OUT do not resemble the dense model's (cosine {cosine:.2f})"
        )


def _not_parent(source: ModelSource, parent: ModelSource, why: str, *, child: bool = True) -> ModelError:
    what = f"OUT {source.name} was not pruned from it: " if child else ""
    return ModelError(f"--dense {parent.name} does not fit: {what}{why}; give the model that OUT was pruned from")


def load(opened: OpenedModel, device: torch.device) -> None:
    """Load all weights of an opened model into its meta model, in the meta model's dtype."""
    weights = ModelWeights(opened.meta_model, opened.checkpoint, opened.key_of, device)
    try:
        weights.load(weights.names)
    finally:
        weights.close()


@contextmanager
def named_damage(pair: Pair) -> Iterator[None]:
    """On a NumericsError look for a damaged parameter, and raise one that names the model and the parameter if there is one."""
    try:
        yield
    except NumericsError:
        for what, opened in (("OUT", pair.pruned), ("the dense model", pair.dense)):
            try:
                name_damage(opened, None)
            except NumericsError as error:
                raise NumericsError(f"{what} {opened.source.name}: {error}") from None
        raise


def trainable(opened: OpenedModel, parts: str) -> dict[str, Tensor]:
    """Set ``requires_grad`` of parameters of a loaded model; return them by name, tied ones once.

    Args:
        opened: the model.
        parts: ``all``: all floating-point parameters; ``blocks``: those of the decoder blocks, so neither the embeddings (tied
            ones included) nor the head; ``linear``: the weights of the blocks' linear layers.
    """
    model = opened.meta_model
    if parts == "linear":
        within = tuple(layer.weight_name for layer in linear_layers(model) if layer.block is not None)
    else:
        within = (f"{find_blocks(model)[0]}." if parts == "blocks" else "",)
    parameters: dict[str, Tensor] = {
        name: p for name, p in model.named_parameters() if p.is_floating_point() and name.startswith(within)
    }
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def masks_of(pair: Pair, device: torch.device) -> dict[str, Tensor]:
    """Return, for each masked layer, parameter name → bool mask of the non-zeros, in the shape in which it is stored."""
    return {
        layer.weight_name: (pair.pruned.checkpoint.read(pair.pruned.key_of[layer.weight_name]) != 0).to(device)
        for layer in pair.masked
    }
