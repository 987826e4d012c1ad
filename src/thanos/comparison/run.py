"""The run of a comparison: its models are measured one after the other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from thanos.bench.decode import check_positions
from thanos.bench.measure import machine
from thanos.calibration.text import check_text_exists, check_text_source, fetch_text
from thanos.comparison.document import Comparison, Row
from thanos.comparison.entries import Entry, entries_of, labels_of
from thanos.comparison.measure import Facts, disk_bytes, kind_of, quality, saved_bytes, speed, tasks
from thanos.comparison.prompts import PROMPTS, continuations
from thanos.comparison.quantised import check_device, check_installed, quantise
from thanos.errors import DataError, ResourceError, UserError, resource_errors
from thanos.evaluation.perplexity import joined_text
from thanos.evaluation.reference import make_reference
from thanos.evaluation.scoring import Reference
from thanos.evaluation.windows import check_window
from thanos.events import Event, Watcher
from thanos.model.bos import check_bos
from thanos.model.loading import adapter_notes, load_model, parse_dtype
from thanos.model.opening import running_dtype
from thanos.model.source import ModelSource, find_local, resolve_model
from thanos.run.names import public_name
from thanos.system.device import choose_device
from thanos.system.event_stream import EventStream


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """The settings of a comparison.

    Attributes:
        text, sequence_length, max_windows, bos: text and windows of the perplexity, as for
            :func:`~thanos.evaluation.perplexity.evaluate`.
        tasks, task_folder, limit: tasks of lm_eval, as for :func:`~thanos.evaluation.tasks.zero_shot`; no tasks if empty.
        prompts: texts that each model continues.
        context: tokens of the timed prompt.
        new_tokens: number of timed decoding steps.
        compiled: whether torch.compile compiles the models before they are timed.
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


APART = "into another OUT, then draw one page from both: thanos compare OUT1 OUT2 --out OUT"
"""How to measure the models that a comparison did not reach: the end of a sentence."""


def compare(
    models: Sequence[str],
    request: Request | None = None,
    *,
    quantised: str = "",
    command: str = "",
    on_event: Watcher | None = None,
    on_row: Callable[[Comparison], None] | None = None,
) -> Comparison:
    """Measure models one after the other, and compare each with the first.

    If a measurement fails, the row states the reason, and the comparison continues with the next one. If the first model
    cannot be loaded, its error is raised, since the others could not be compared with it. A model that does not exist is an
    error before anything is measured.

    Args:
        models: hub names, folders (packed ones too) or ``.gguf`` files.
        request: the settings; default: :class:`Request`.
        quantised: quantised versions to measure too, see :func:`~thanos.comparison.entries.entries_of`.
        command: the command line, for the document.
        on_event: function that is called with events of progress.
        on_row: function that is called after each model with the comparison of all models so far, which a caller can save
            in case the run ends early.

    Raises:
        UserError: an argument, the text, the device or the first model cannot be used.
        ResourceError: a kernel failed on the device, and models are left.
    """
    request = request or Request()
    entries = entries_of(models, quantised)
    _check(request, entries)
    run = _Run(request, EventStream(on_event))
    run.check(entries)
    about = {**machine(str(run.device)), **_packages(entries)}
    rows: list[Row] = []
    for done, (entry, label) in enumerate(zip(entries, labels_of(entries), strict=True), 1):
        run.on_event(Event(kind="note", phase="load", message=f"model {done} of {len(entries)}: {label}"))
        rows.append(run.row(entry, label))
        if on_row is not None:
            on_row(Comparison(command=command, machine=about, settings=run.settings(), rows=[*rows]))
        if run.fault and done < len(entries):
            raise ResourceError(
                f"{label}: the device reported a fault, after which this process cannot use it ({run.fault}); "
                f"{len(entries) - done} of {len(entries)} models are left: measure them and the first model {APART}"
            )
    return Comparison(command=command, machine=about, settings=run.settings(), rows=rows)


def _check(request: Request, entries: Sequence[Entry]) -> None:
    """Check all settings that can be checked before a model is loaded."""
    on_disk = [find_local(entry.model, trust_remote_code=request.trust_remote_code, packed=True) for entry in entries]
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
    if None in on_disk:  # a text is smaller than the models that are downloaded next
        fetch_text(request.text, evaluation=True)


def _packages(entries: Sequence[Entry]) -> dict[str, Any]:
    from importlib import metadata

    names = ("transformers", *(["torchao"] if any(entry.quantised for entry in entries) else []))
    return {name: metadata.version(name) for name in names}


class _Run:
    """One run. The first model stays in the host's memory between comparisons with it.

    Attributes:
        fault: message of an error after which the process cannot use the device; empty if there was none.
    """

    def __init__(self, request: Request, on_event: Watcher) -> None:
        self.request, self.on_event = request, on_event
        self.device = choose_device(request.device)
        self.fault = ""
        self._reference: Reference | None = None
        self._first: tuple[ModelSource, Facts] | None = None
        self._dtype: torch.dtype | None = None
        self._text = ""
        self._opened: dict[str, ModelSource] = {}

    def check(self, entries: Sequence[Entry]) -> None:
        """Set the dtype of all models, check that the device supports the quantised versions in it, and read the text.

        Models of the hub are downloaded, so that a name that does not exist ends the run before hours of measurements.

        Raises:
            ModelError: the device does not support one, the first model's config cannot be read, or a model cannot be
                downloaded.
            DataError: the text cannot be read, or a window or a timed text is longer than the first model allows.
        """
        trust = self.request.trust_remote_code
        source = resolve_model(entries[0].model, trust_remote_code=trust, packed=True)
        self._opened[entries[0].model] = source  # its config and tokenizer are read once
        for name in dict.fromkeys(entry.model for entry in entries[1:] if entry.model != entries[0].model):
            # A misspelt folder is taken for a hub name.
            if find_local(name, trust_remote_code=trust, packed=True) is None:
                self._opened[name] = resolve_model(name, trust_remote_code=trust, packed=True)
        self._dtype = running_dtype(source, self.request.dtype)
        for entry in entries:
            if entry.quantised:
                check_device(entry.quantised, self.device, self._dtype)
        text = self.request.text
        check_window(self.request.sequence_length, source.config())
        check_positions(source.name, source.config(), self.request.context, self.request.new_tokens)
        check_text_source(text, evaluation=True, tokenizer=source.tokenizer)
        self._text = joined_text(text, source.tokenizer(), self.on_event)

    def settings(self) -> dict[str, Any]:
        """Return :attr:`Comparison.settings <thanos.comparison.document.Comparison>`."""
        request, reference = self.request, self._reference
        assert reference is not None
        return {
            "dtype": str(self._dtype).removeprefix("torch."),
            "text": reference.text,
            "text_sha256": reference.sha256,
            "sequence_length": request.sequence_length,
            "windows": len(reference.windows),
            "bos": reference.bos,
            "bos_ids": list(reference.bos_ids),
            "context": request.context,
            "new_tokens": request.new_tokens,
            "compiled": request.compiled,
            "tasks": list(request.tasks),
            "limit": request.limit,
        }

    def row(self, entry: Entry, label: str) -> Row:
        """Measure one model. If a measurement fails, the row states the reason, and the next measurement follows.

        Raises:
            UserError: the first model cannot be loaded, or the text cannot be used.
        """
        fields: dict[str, Any] = {"label": label, "kind": entry.quantised or "dense", "notes": [], "reason": ""}
        self._try(fields, lambda: self._measure(entry, fields), strict=self._reference is None)
        try:
            self._free()
        except torch.AcceleratorError as error:  # an earlier kernel's, which every later call reports again
            self.fault = (str(error).strip().splitlines() or [""])[0]
        return Row(**fields)

    def _try(self, fields: dict[str, Any], measure: Callable[[], Any], *, strict: bool = False) -> None:
        """Call ``measure`` and add the fields that it returns to the row, or the reason why it failed.

        If ``strict``, an error is raised as long as there is no first model to compare with.
        """
        try:
            with resource_errors(device=self.device):
                values = measure() or {}
        except Exception as error:  # from this package, torch, torchao, transformers or lm_eval
            if strict and self._reference is None:
                raise
            line = (str(error).strip().splitlines() or [""])[0]
            reason = line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"
            fields["reason"] = "; ".join(filter(None, (fields["reason"], reason)))
        else:
            fields["notes"] += values.pop("notes", [])
            fields |= values

    def _measure(self, entry: Entry, fields: dict[str, Any]) -> None:
        request, on_event = self.request, self.on_event
        source = self._opened.pop(entry.model, None) or resolve_model(
            entry.model, trust_remote_code=request.trust_remote_code, packed=True
        )
        on_event(Event(kind="phase", phase="load"))
        assert self._dtype is not None
        network = load_model(source, dtype=self._dtype, device=self.device)
        facts = Facts.of(network, source)
        fields |= {"parameters": facts.parameters, "kind": kind_of(facts, self._first and self._first[1])}
        if self._first is None:
            self._reference = make_reference(
                source,
                network,
                text=self._text,
                name=public_name(request.text),
                sequence_length=request.sequence_length,
                max_windows=request.max_windows,
                bos=request.bos,
                emit=on_event,
            )
            self._reference = replace(self._reference, dense=source.name, model=network)
            self._first = source, facts
        reference, (first, _) = self._reference, self._first
        assert reference is not None
        assert reference.model is not None
        if entry.quantised:
            fields["kind"] = entry.quantised
            fields["notes"].append(quantise(network, entry.quantised))
        fields["disk_bytes"] = saved_bytes(network) if entry.quantised else disk_bytes(source)
        fields["notes"] += [*adapter_notes(source), *facts.notes]
        fields["dtype"] = str(network.dtype).removeprefix("torch.")
        if network.dtype != self._dtype:  # packed weights keep the dtype in which they were packed
            fields["notes"].append(f"runs in {fields['dtype']}, the dtype of its packed weights")
        on_event(Event(kind="phase", phase="generate"))
        self._try(fields, lambda: {"texts": continuations(network, source.tokenizer(), request.prompts)})
        self._try(fields, lambda: speed(network, source, request))
        if request.tasks:
            self._try(fields, lambda: tasks(network, source, request, reference, on_event))
        reference.model.to(self.device)  # type: ignore[arg-type]
        on_event(Event(kind="phase", phase="evaluate"))
        self._try(fields, lambda: quality(network, source, reference, first, on_event))

    def _free(self) -> None:
        """Move the first model to the host's memory, and free the device's memory of the measured one."""
        if self._reference is not None and self._reference.model is not None:
            self._reference.model.to("cpu")  # type: ignore[arg-type]
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
