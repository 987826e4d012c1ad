"""Building the record of a cell: its settings and results, the versions, and the machine."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from thanos._version import __version__
from thanos.evaluation.perplexity import Evaluation
from thanos.run.report import PruningReport
from thanos.study.grid import Cell, Study, public_cell
from thanos.study.paths import Locations
from thanos.study.store import CellRecord, cell_key
from thanos.system.meter import PhaseRecord

_KEPT = (
    "text", "text_sha256", "sequence_length", "bos", "bos_ids", "windows", "tokens", "perplexity", "mean_loss", "kl_divergence",
    "top1_agreement",
)  # fmt: skip
"""Fields of an evaluation that a record keeps."""

_PACKAGES = ("torch", "transformers", "safetensors", "lm_eval")


def make_record(
    study: Study, locations: Locations, cell: Cell, device: torch.device, results: dict[str, Any], *, sharers: int = 1
) -> CellRecord:
    """Return the record of a cell; ``results`` are fields of :class:`~thanos.study.store.CellRecord`."""
    values, asked = public_cell(cell), locations.asked(study, cell)
    return CellRecord(
        key=cell_key(values, asked),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=locations.commit,
        thanos_version=__version__,
        versions=_versions(),
        machine={**_machine(device), "sharers": sharers},
        cell=values,
        asked=asked,
        sources=locations.sources(study, cell),
        **{"status": "done", "reason": None, **results},
    )


def pruning_fields(report: PruningReport, calibration: str) -> dict[str, Any]:
    """Return a record's fields of pruning, with the calibration under its public name."""
    written = report.to_dict()
    return {
        "recipe": {**written["recipe"], "calibration": calibration},
        "calibration": {**written["calibration"], "source": calibration},
        "effective_sparsity": {"targeted": report.totals["sparsity_targeted"], "all": report.totals["sparsity_all"]},
        **{name: written[name] for name in ("layers", "phases", "seconds", "host_peak_bytes", "device_peak_bytes")},
    }


def phase_fields(records: dict[str, PhaseRecord]) -> dict[str, dict[str, Any]]:
    """Return a record's ``phases``."""
    return {name: asdict(record) for name, record in records.items()}


def evaluation_fields(evaluation: Evaluation) -> dict[str, Any]:
    """Return a record's ``evaluation``."""
    values = evaluation.to_dict()
    return {name: values[name] for name in _KEPT}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _machine(device: torch.device) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
    }
