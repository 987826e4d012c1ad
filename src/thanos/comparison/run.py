"""Measure the models of a comparison, one after the other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from thanos.bench.measure import machine
from thanos.calibration.text import check_text_exists
from thanos.comparison.document import Comparison, Row
from thanos.comparison.entries import Entry, entries_of, labels_of
from thanos.comparison.measure import Facts, disk_bytes, kind_of, quality, saved_bytes, speed, tasks
from thanos.comparison.prompts import PROMPTS, continuations
from thanos.comparison.quantised import check_device, check_installed, quantise
from thanos.errors import DataError, UserError, resource_errors
from thanos.evaluation.reference import make_reference
from thanos.evaluation.scoring import Reference
from thanos.events import Event, Watcher
from thanos.model.bos import check_bos
from thanos.model.loading import load_model, parse_dtype
from thanos.model.opening import running_dtype
from thanos.model.source import ModelSource, find_local, resolve_model
from thanos.run.model_card import public_name
from thanos.system.device import choose_device
from thanos.system.event_stream import EventStream


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is measured.

    Attributes:
        text: text of the perplexity, as for :func:`~thanos.evaluation.perplexity.evaluate`; also ``sequence_length``,
            ``max_windows`` and ``bos``.
        tasks: names of lm_eval's tasks; empty for none. ``task_folder`` and ``limit`` as for
            :func:`~thanos.evaluation.tasks.zero_shot`.
        prompts: texts that each model continues.
        context, new_tokens: tokens of the timed prompt, and timed steps.
        compiled: whether models are compiled by torch.compile before they are timed.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: dtype of every model; ``auto`` is the first model's.
        trust_remote_code: let transformers run Python code from a checkpoint.
    """

    text: str = "wikitext2"
    sequence_length: int = 2048
    max_windows: int | None = None
    bos: str = "auto"
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    limit: int | None = None
    prompts: tuple[str, ...] = PROMPTS
    context: int = 128
    new_tokens: int = 64
    compiled: bool = False
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False


def compare(
    models: Sequence[str],
    request: Request | None = None,
    *,
    quantised: str = "",
    command: str = "",
    on_event: Watcher | None = None,
    on_row: Callable[[Comparison], None] | None = None,
) -> Comparison:
    """Measure models side by side, each alone on the device. The first is the one that the others are compared with.

    A model that fails has the reason in its row, and the others go on. If the first one cannot be loaded, nothing can be
    compared, and its error is raised.

    Args:
        models: hub names, folders (packed ones too) or ``.gguf`` files.
        request: what is measured; default: :class:`Request`.
        quantised: quantised versions to measure too, see :func:`~thanos.comparison.entries.entries_of`.
        command: the command line, for the document.
        on_event: function that is called with events of progress.
        on_row: function that is called with the rows so far after each model, so that a run that ends early leaves them.

    Raises:
        UserError: an argument, the text, the device or the first model cannot be used.
    """
    request = request or Request()
    entries = entries_of(models, quantised)
    _check(request, entries)
    run = _Run(request, EventStream(on_event))
    run.check(entries)
    about = {**machine(str(run.device)), **_packages(entries)}
    rows: list[Row] = []
    for done, (entry, label) in enumerate(zip(entries, labels_of(entries), strict=True), 1):
        run.tell(Event(kind="note", phase="load", message=f"model {done} of {len(entries)}: {label}"))
        rows.append(run.row(entry, label))
        if on_row is not None:
            on_row(Comparison(command=command, machine=about, settings=run.settings(), rows=[*rows]))
    return Comparison(command=command, machine=about, settings=run.settings(), rows=rows)


def _check(request: Request, entries: Sequence[Entry]) -> None:
    """Check everything that needs no model, before the first is loaded."""
    for entry in entries:
        find_local(entry.model, trust_remote_code=request.trust_remote_code, packed=True)
    if request.sequence_length < 2:
        raise DataError(f"--sequence-length must be at least 2, to predict one token; got {request.sequence_length}")
    for name, value in (("max-windows", request.max_windows), ("limit", request.limit)):
        if value is not None and value < 1:
            raise DataError(f"--{name} must be at least 1; got {value}")
    if request.context < 1 or request.new_tokens < 1:
        raise DataError(
            f"--context and --new-tokens must be at least 1; got {request.context} and {request.new_tokens}"
        )
    if request.dtype != "auto":
        parse_dtype(request.dtype)
    check_bos(request.bos)
    check_text_exists(request.text, evaluation=True)
    if any(entry.quantised for entry in entries):
        check_installed()
    if request.tasks:
        from thanos.evaluation.tasks import check_tasks

        check_tasks(request.tasks, request.task_folder)


def _packages(entries: Sequence[Entry]) -> dict[str, Any]:
    from importlib import metadata

    names = ("transformers", *(["torchao"] if any(entry.quantised for entry in entries) else []))
    return {name: metadata.version(name) for name in names}


class _Run:
    """The models of one run. The first model stays on the host, for the comparisons with it."""

    def __init__(self, request: Request, tell: Watcher) -> None:
        self.request, self.tell = request, tell
        self.device = choose_device(request.device)
        self._reference: Reference | None = None
        self._first: tuple[ModelSource, Facts] | None = None
        self._dtype: torch.dtype | None = None

    def check(self, entries: Sequence[Entry]) -> None:
        """Choose the dtype of all models, and refuse quantised versions that the device has not in this dtype.

        Raises:
            ModelError: there is such a version, or the first model's config cannot be read.
        """
        source = resolve_model(entries[0].model, trust_remote_code=self.request.trust_remote_code, packed=True)
        self._dtype = running_dtype(source, self.request.dtype)
        for entry in entries:
            if entry.quantised:
                check_device(entry.quantised, self.device, self._dtype)

    def settings(self) -> dict[str, Any]:
        """Return what the numbers depend on, as the document states it."""
        request, found = self.request, self._reference
        assert found is not None
        return {
            "dtype": str(self._dtype).removeprefix("torch."),
            "text": found.text,
            "text_sha256": found.sha256,
            "sequence_length": request.sequence_length,
            "windows": len(found.windows),
            "bos": found.bos,
            "bos_ids": list(found.bos_ids),
            "context": request.context,
            "new_tokens": request.new_tokens,
            "compiled": request.compiled,
            "tasks": list(request.tasks),
            "limit": request.limit,
        }

    def row(self, entry: Entry, label: str) -> Row:
        """Measure one model. A measurement that fails has its reason in the row; the others go on.

        Raises:
            UserError: the first model cannot be loaded, or the text cannot be used: nothing could be compared.
        """
        found: dict[str, Any] = {"label": label, "kind": entry.quantised or "dense", "notes": [], "reason": ""}
        self._try(found, lambda: self._measure(entry, found), strict=self._reference is None)
        self._park()
        return Row(**found)

    def _try(self, found: dict[str, Any], work: Callable[[], Any], *, strict: bool = False) -> None:
        """Do one part of the work and add the values that it returns to the row, or the reason why it failed."""
        try:
            with resource_errors(device=self.device):
                values = work() or {}
        except Exception as error:  # of this package, torch, torchao, transformers or lm_eval: the other models go on
            if strict and self._reference is None:
                raise
            line = (str(error).strip().splitlines() or [""])[0]
            reason = line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"
            found["reason"] = "; ".join(filter(None, (found["reason"], reason)))
        else:
            found["notes"] += values.pop("notes", [])
            found |= values

    def _measure(self, entry: Entry, found: dict[str, Any]) -> None:
        request, tell = self.request, self.tell
        source = resolve_model(entry.model, trust_remote_code=request.trust_remote_code, packed=True)
        tell(Event(kind="phase", phase="load"))
        assert self._dtype is not None
        network = load_model(source, dtype=self._dtype, device=self.device)
        facts = Facts.of(network, source)
        found |= {"parameters": facts.parameters, "kind": kind_of(facts, self._first and self._first[1])}
        if self._first is None:
            self._reference = make_reference(
                source,
                network,
                text=request.text,
                name=public_name(request.text),
                sequence_length=request.sequence_length,
                max_windows=request.max_windows,
                bos=request.bos,
                emit=tell,
            )
            self._reference = replace(self._reference, dense=source.name, model=network)
            self._first = source, facts
        reference, (first, _) = self._reference, self._first
        assert reference is not None
        assert reference.model is not None
        if entry.quantised:
            found["kind"] = entry.quantised
            found["notes"].append(quantise(network, entry.quantised))
        found["disk_bytes"] = saved_bytes(network) if entry.quantised else disk_bytes(source)
        found["notes"] += facts.notes
        found["dtype"] = str(network.dtype).removeprefix("torch.")
        if network.dtype != self._dtype:  # packed weights have the dtype in which they were packed
            found["notes"].append(f"runs in {found['dtype']}, the dtype of its packed weights")
        tell(Event(kind="phase", phase="evaluate"))
        self._try(found, lambda: {"texts": continuations(network, source.tokenizer(), request.prompts)})
        self._try(found, lambda: speed(network, source, request))
        if request.tasks:
            self._try(found, lambda: tasks(network, source, request, reference, tell))
        reference.model.to(self.device)  # type: ignore[arg-type]
        self._try(found, lambda: quality(network, source, reference, first, tell))

    def _park(self) -> None:
        """Move the first model off the device, and free the measured one."""
        if self._reference is not None and self._reference.model is not None:
            self._reference.model.to("cpu")  # type: ignore[arg-type]
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
