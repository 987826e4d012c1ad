"""``recovery.json``, the report of a recovery, which is also added to ``pruning.json`` and the model card."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thanos.engine.records import LayerRecord
from thanos.errors import ModelError
from thanos.run.model_card import model_card
from thanos.run.recovery_card import recovery_sentence
from thanos.run.report import PruningReport
from thanos.system.documents import Document
from thanos.system.meter import PhaseRecord

SCHEMA = 1
NAME = "recovery.json"

NOTHING_BETTER = "no epoch lowered the held-out loss: the original weights are written"


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryReport(Document):
    """The report of a recovery; the attributes are the keys of ``recovery.json``.

    Attributes:
        thanos_version: version of this package.
        model: the pruned model: ``name``, ``architecture``, ``parameters``.
        dense: name of the dense model.
        recipe: all settings.
        calibration: the text; as in ``pruning.json``.
        sequences: ``trained`` (those that the dense model generated included) and ``held_out``, numbers of sequences.
        steps: number of steps that were planned.
        rate: the largest learning rate, as given or as chosen; None in reports of earlier versions.
        train: the parameters that were trained, as given or as chosen; None in reports of earlier versions.
        history: measurements of the held-out loss: ``step``, ``epoch``, ``loss`` (mean training loss of the epoch),
            ``held_out`` (KL(dense ‖ model), nats per token). Step 0 is the model before the recovery.
        best_step: step whose weights were written; 0 for the original weights.
        ended: why the training ended early; empty if it did not.
        held_out_before: held-out loss before the recovery.
        held_out_after: held-out loss of the written weights.
        masked_layers: number of layers whose zeros were fixed.
        zeros: number of zeros in these layers, as written.
        versions: versions of the packages, and the device.
        phases: seconds and peak memory by phase; only of the last part if the run was resumed.
        seconds: sum over the phases.
        warnings: lines for the user.
        schema: version of this format.
    """

    thanos_version: str
    model: dict[str, Any]
    dense: str
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    sequences: dict[str, int]
    steps: int
    history: list[dict[str, Any]]
    best_step: int
    ended: str
    held_out_before: float
    held_out_after: float
    masked_layers: int
    zeros: int
    versions: dict[str, str]
    phases: dict[str, PhaseRecord]
    seconds: float
    warnings: list[str] = field(default_factory=list)
    rate: float | None = None
    train: str | None = None
    schema: int = SCHEMA

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecoveryReport:
        """Build a report from the values of :meth:`to_dict`.

        Raises:
            ValueError: the schema is not this version's.
        """
        if values.get("schema") != SCHEMA:
            raise ValueError(f"{NAME} has schema {values.get('schema')!r}; this version reads {SCHEMA}")
        phases = {name: PhaseRecord(**record) for name, record in values["phases"].items()}
        return super(RecoveryReport, cls).from_dict({**values, "phases": phases})


def read_pruning_report(folder: Path) -> PruningReport | None:
    """Return the report of the pruning run that made a folder; None if another tool made it.

    Raises:
        ModelError: the folder has a ``pruning.json`` of another version.
    """
    path = folder / "pruning.json"
    if not path.is_file():
        return None
    try:
        return PruningReport.read(path)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is not a report of this version ({error}); move it away to recover without it"
        ) from error


def write_reports(report: RecoveryReport, source: Path, folder: Path, zeros: Mapping[str, int]) -> None:
    """Write ``recovery.json``, and extend the pruning report and the model card.

    Args:
        report: the report.
        source: folder of the pruned model.
        folder: folder of the output.
        zeros: layer name → number of zeros in the written weight.
    """
    report.write(folder / NAME)
    pruning = read_pruning_report(source)
    if pruning is not None:
        pruning = extended(pruning, report, zeros)
        pruning.write(folder / "pruning.json")
        (folder / "README.md").write_text(model_card(pruning), encoding="utf-8")
        return
    card = source / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace").rstrip() + "\n\n" if card.is_file() else ""
    (folder / "README.md").write_text(f"{text}## Recovery\n\n{recovery_sentence(report.to_dict())}\n", encoding="utf-8")


def extended(pruning: PruningReport, report: RecoveryReport, zeros: Mapping[str, int]) -> PruningReport:
    """Return a pruning report with a recovery added. The records of changed layers have the new numbers of zeros.

    Args:
        pruning: report of the run that pruned the model.
        report: report of the recovery.
        zeros: layer name → number of zeros in the written weight, for the layers with fixed zeros.
    """
    layers = pruning.layers
    if report.best_step:
        layers = [_changed(layer, zeros.get(layer.name, layer.zeros)) for layer in layers]
    # A trained weight may round to zero when it is stored, so there may be a few more zeros.
    more = sum(layer.zeros for layer in layers) - sum(layer.zeros for layer in pruning.layers)
    totals = dict(pruning.totals)
    totals |= {
        "zeros_targeted": totals["zeros_targeted"] + more,
        "zeros_all": totals["zeros_all"] + more,
        "sparsity_targeted": (totals["zeros_targeted"] + more) / max(1, totals["targeted_parameters"]),
        "sparsity_all": (totals["zeros_all"] + more) / max(1, totals["parameters"]),
    }
    return dataclasses.replace(pruning, layers=layers, totals=totals, recovery=report.to_dict())


def _changed(layer: LayerRecord, zeros: int) -> LayerRecord:
    size = layer.shape[0] * layer.shape[1]
    by = [*(layer.changed_by or []), "recovery"]
    return dataclasses.replace(layer, zeros=zeros, sparsity=zeros / size, changed_by=by)
