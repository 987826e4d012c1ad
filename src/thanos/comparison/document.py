"""The numbers of a comparison as a JSON document, and several of them as one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from thanos.errors import DataError
from thanos.system.documents import Document

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One model. What was not measured is None.

    Attributes:
        label: name in tables and figures.
        kind: ``dense``, ``sparse`` (zeros in plain weights), ``packed``, ``shrunk`` (smaller layers than the first model, in
            as many blocks), or the kind of quantisation.
        parameters: number of parameters, tied ones once; of a packed or quantised model that of the dense one.
        dtype: dtype in which it runs.
        disk_bytes: bytes of the weight files; of a quantised model those of its tensors as ``torch.save`` writes them.
        weight_bytes: bytes of all parameters and buffers on the device, embeddings and head included, tied ones once.
        packed_layers: number of layers that stayed packed on the device.
        tokens_per_second: new tokens a second at batch 1, from the median step.
        first_token_seconds: seconds from the prompt to its first new token; median.
        evaluation: ``perplexity``, ``mean_loss``, ``tokens`` and ``windows`` as of ``thanos eval``; ``kl_divergence`` and
            ``top1_agreement`` compare with the first model of the comparison.
        zero_shot: ``tasks`` and ``average`` as of ``thanos eval --tasks``.
        texts: prompt → what the model wrote after it.
        notes: sentences about this row that a reader needs.
        reason: why the measurement failed; empty if it did not.
    """

    label: str
    kind: str = "dense"
    parameters: int | None = None
    dtype: str | None = None
    disk_bytes: int | None = None
    weight_bytes: int | None = None
    packed_layers: int = 0
    tokens_per_second: float | None = None
    first_token_seconds: float | None = None
    evaluation: dict[str, Any] | None = None
    zero_shot: dict[str, Any] | None = None
    texts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison(Document):
    """Models that were measured in one run.

    Attributes:
        command: the command line.
        machine: hardware, versions, commit and date.
        settings: what the numbers depend on: ``dtype`` (of all models but packed ones of another dtype), ``text``,
            ``text_sha256``, ``sequence_length``, ``windows``, ``bos``, ``context``, ``new_tokens``, ``compiled``, ``tasks``,
            ``limit``.
        rows: the models, the one that the others are compared with first.
    """

    command: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row]
    schema: int = SCHEMA

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the document from the values of ``to_dict``."""
        known = {one.name for one in dataclasses.fields(Row)}
        rows = [Row(**{name: value for name, value in row.items() if name in known}) for row in values["rows"]]
        return cls(
            command=values["command"],
            machine=values["machine"],
            settings=values["settings"],
            rows=rows,
            schema=values["schema"],
        )

    @property
    def failed(self) -> list[Row]:
        """The rows with a reason."""
        return [row for row in self.rows if row.reason]


NAME = "comparison.json"
"""The document's file in the folder of a comparison."""


def read_comparisons(paths: Sequence[Path]) -> list[Comparison]:
    """Read documents, one or several in each file.

    Args:
        paths: files, or folders with :data:`NAME`.

    Raises:
        DataError: a file cannot be read, or is not such a document.
    """
    found: list[Comparison] = []
    for path in paths:
        file = path / NAME if path.is_dir() else path
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            runs = values["runs"]
            if values["schema"] != SCHEMA:
                raise ValueError(f"schema {values['schema']}; this version reads {SCHEMA}")
            found += [Comparison.from_dict(run) for run in runs]
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file} is not the JSON of a comparison ({type(error).__name__}: {error}); give a {NAME} that "
                "thanos compare wrote"
            ) from error
    return found


def groups_of(runs: Sequence[Comparison]) -> list[list[Comparison]]:
    """Divide runs into groups whose numbers may stand in one table.

    They have the same first model, text and windows, tasks, timing and device.
    """
    groups: dict[str, list[Comparison]] = {}
    for run in runs:
        first = run.rows[0].label if run.rows else ""
        key = json.dumps([first, run.settings, run.machine.get("device")], sort_keys=True)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def merged(runs: Sequence[Comparison]) -> list[Row]:
    """Return the rows of one group. Of a model that several runs measured, the last measurement counts."""
    rows: dict[str, Row] = {}
    for run in runs:
        for row in run.rows:
            if row.label not in rows or not row.reason:
                rows[row.label] = row
    return list(rows.values())
