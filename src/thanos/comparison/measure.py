"""The measurements of one loaded model, with the functions of ``thanos eval`` and ``thanos bench decode``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from thanos.bench.decode import time_network
from thanos.checkpoint.weight_files import find_weights
from thanos.errors import DataError
from thanos.evaluation.perplexity import evaluate
from thanos.evaluation.scoring import Reference
from thanos.events import Watcher
from thanos.model.source import ModelSource
from thanos.sparse.modules import is_plain, packed_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from thanos.comparison.run import Request

_FEW_ZEROS = 0.1
"""Fraction of zeros above which a model counts as sparse. Dequantised weights have a few percent of zeros."""

_EVALUATED = ("perplexity", "mean_loss", "kl_divergence", "top1_agreement", "tokens", "windows")


@dataclass(frozen=True, slots=True)
class Facts:
    """Sizes and contents of a loaded model.

    Attributes:
        parameters: number of parameters, tied ones counted once; a packed layer counts with all entries of its dense matrix.
        inner: number of parameters outside embedding and head.
        blocks: number of decoder blocks in the config; None if it does not state one.
        zeros: fraction of zeros in the plain linear layers outside the head.
        packed: whether ``thanos pack`` wrote the model.
        notes: sentences for the model's row.
    """

    parameters: int
    inner: int
    blocks: int | None
    zeros: float
    packed: bool
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, network: PreTrainedModel, source: ModelSource) -> Self:
        """Return the facts of a model."""
        packed = packed_modules(network)
        inside = {id(tensor) for layer in packed.values() for tensor in layer.parameters(recurse=False)}
        plain = {id(tensor): tensor.numel() for tensor in network.parameters() if id(tensor) not in inside}
        layers = sum(layer.in_features * layer.out_features for layer in packed.values())
        layers += sum(layer.bias.numel() for layer in packed.values() if layer.bias is not None)
        embedding: Any = network.get_input_embeddings().weight
        head = network.get_output_embeddings()
        ends = {id(embedding): embedding.numel()}
        if isinstance(head, nn.Linear):
            ends[id(head.weight)] = head.weight.numel()
        linear = [m.weight for m in network.modules() if is_plain(m) and id(m.weight) not in ends]
        entries = sum(weight.numel() for weight in linear)
        zeros = sum(int((weight == 0).sum()) for weight in linear)
        parameters = sum(plain.values()) + layers
        notes = []
        if source.gguf is not None:
            notes.append("the file's weights were dequantised when they were loaded")
        if source.is_packed and not packed:
            notes.append("packed on disk; this device has no kernel for packed layers, so they ran dense")
        return cls(
            parameters=parameters,
            inner=parameters - sum(ends.values()),
            blocks=getattr(network.config.get_text_config(), "num_hidden_layers", None),
            zeros=zeros / max(1, entries),
            packed=source.is_packed,
            notes=notes,
        )


def kind_of(facts: Facts, base: Facts | None) -> str:
    """Return the kind of a model that is not quantised; ``base``: the facts of the first model, None for itself."""
    if facts.packed:
        return "packed"
    if base is not None and facts.inner < base.inner and _can_be_cut_from(facts, base):
        return "shrunk"
    return "sparse" if facts.zeros > _FEW_ZEROS else "dense"


def _can_be_cut_from(facts: Facts, base: Facts) -> bool:
    """Whether a model has as many blocks as ``base``, or fewer of them and an embedding and a head of the same size."""
    if facts.blocks == base.blocks:
        return True
    same_ends = facts.parameters - facts.inner == base.parameters - base.inner
    return same_ends and facts.blocks is not None and base.blocks is not None and facts.blocks < base.blocks


def disk_bytes(source: ModelSource) -> int:
    """Return the bytes of a model's weight files."""
    if source.gguf is not None:
        return sum(part.stat().st_size for part in source.gguf_parts)
    return sum((source.folder / name).stat().st_size for name in find_weights(source.folder).names)


def saved_bytes(network: PreTrainedModel) -> int:
    """Return the bytes that ``torch.save`` writes for a model's tensors, tied ones counted once."""

    class Counter:
        written = 0

        def write(self, data: Any) -> int:
            size = memoryview(data).nbytes
            self.written += size
            return size

        def flush(self) -> None:
            pass

    counter: Any = Counter()
    torch.save(network.state_dict(), counter)
    return counter.written


def speed(network: PreTrainedModel, source: ModelSource, request: Request) -> dict[str, Any]:
    """Return the row's fields of bytes in memory and speed."""
    timed = time_network(
        network, source.name, context=request.context, new_tokens=request.new_tokens, compiled=request.compiled
    )
    names = ("weight_bytes", "packed_layers", "tokens_per_second", "first_token_seconds")
    return {name: getattr(timed, name) for name in names}


def tasks(
    network: PreTrainedModel, source: ModelSource, request: Request, reference: Reference, on_event: Watcher
) -> dict[str, Any]:
    """Return the row's field ``zero_shot``."""
    from thanos.evaluation.tasks import zero_shot

    scores = zero_shot(
        source.name,
        tasks=request.tasks,
        task_folder=request.task_folder,
        limit=request.limit,
        bos="window" if reference.bos == "window" else "auto",
        on_event=on_event,
        trust_remote_code=request.trust_remote_code,
        network=network,
    ).to_dict()
    return {"zero_shot": {"tasks": scores["tasks"], "average": scores["average"]}}


def quality(
    network: PreTrainedModel, source: ModelSource, reference: Reference, first: ModelSource, on_event: Watcher
) -> dict[str, Any]:
    """Return the row's field ``evaluation``: perplexity, and distance to the first model.

    Args:
        network: the model.
        source: the model's source.
        reference: windows and the first model, on the device of ``network``.
        first: source of the first model.
        on_event: function that is called with events of progress.

    Raises:
        DataError: the tokenizers of the two models give other tokens, so their perplexities cannot be compared.
    """
    if not _same_tokens(source, first, reference):
        raise DataError(
            "its tokenizer divides the text into other tokens than the first model's, so perplexity and KL divergence "
            "cannot be compared"
        )
    assert reference.model is not None
    notes = []
    if network.config.get_text_config().vocab_size != reference.model.config.get_text_config().vocab_size:
        reference = replace(reference, dense=None, model=None)
        notes = ["its vocabulary has another size than the first model's, so it has no KL divergence"]
    scored = evaluate(source.name, reference=reference, network=network, on_event=on_event).to_dict()
    if scored["perplexity"] is None:
        notes.append(f"its perplexity, exp({scored['mean_loss']:.4g}), is too large for a number")
    return {"evaluation": {name: scored[name] for name in _EVALUATED}, "notes": notes}


def _same_tokens(source: ModelSource, first: ModelSource, reference: Reference) -> bool:
    """Whether both tokenizers give the same ids for one window of the text."""
    if source is first:
        return True
    text = first.tokenizer().decode(reference.windows[0].tolist())
    return source.tokenizer()(text)["input_ids"] == first.tokenizer()(text)["input_ids"]
