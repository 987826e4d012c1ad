"""The numbers of a comparison as a JSON document, and the merging of several comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from thanos.errors import DataError
from thanos.system.documents import Document

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One model. A value that was not measured is None.

    Attributes:
        label: name in tables and figures.
        kind: ``dense``, ``sparse`` (zeros in plain weights), ``packed``, ``shrunk`` (smaller layers or fewer blocks than the
            first model), or the kind of quantisation.
        parameters: number of parameters, tied ones counted once; for a packed or quantised model that of the dense one.
        dtype: dtype in which the model runs.
        disk_bytes: bytes of the weight files; for a quantised model the bytes that ``torch.save`` writes for its tensors.
        weight_bytes: bytes of all parameters and buffers on the device, embeddings and head included, tied ones counted once.
        packed_layers: number of layers that stayed packed on the device.
        tokens_per_second: new tokens per second at batch 1, from the median step.
        first_token_seconds: seconds from the prompt to its first new token; median.
        evaluation: ``perplexity``, ``mean_loss``, ``tokens`` and ``windows`` as in ``thanos eval --json``; ``kl_divergence``
            and ``top1_agreement`` compare with the first model of the comparison.
        zero_shot: ``tasks`` and ``average`` as in ``thanos eval --tasks … --json``.
        texts: prompt → continuation.
        notes: sentences shown with the row.
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


_MAYBE = (int, float, type(None))
_SETTINGS = {
    "dtype": str,
    "text": str,
    "sequence_length": int,
    "windows": int,
    "context": int,
    "compiled": bool,
    "tasks": list,
    "limit": _MAYBE,
}
_MACHINE = {"device": str, "date": str, "commit": (str, type(None)), "versions": dict, "threads": int}
"""Keys without which the page of a comparison cannot be drawn, with the types of their values."""


def _types(hint: Any) -> tuple[type, ...]:
    """Return the types of the JSON values of an annotation. A whole number also counts as a float."""
    kinds = tuple(get_origin(part) or part for part in (get_args(hint) if isinstance(hint, UnionType) else (hint,)))
    return (*kinds, int) if float in kinds else kinds


_ROW = {name: _types(hint) for name, hint in get_type_hints(Row).items()}
"""Types of a row's values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison(Document):
    """The measurements of one run.

    Attributes:
        command: the command line; empty if Python called.
        machine: hardware, versions, commit and date.
        settings: the settings of the measurements: ``dtype`` (of all models except packed ones stored in another dtype),
            ``text``, ``text_sha256``, ``sequence_length``, ``windows``, ``bos``, ``bos_ids``, ``context``, ``new_tokens``,
            ``compiled``, ``tasks``, ``limit``.
        rows: the models; the others are compared with the first.
    """

    command: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row]
    schema: int = SCHEMA

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the document from the values of ``to_dict``.

        Raises:
            KeyError, TypeError, ValueError: the values are not those of a comparison.
        """
        missing = [f"settings.{key}" for key in _SETTINGS if key not in values["settings"]]
        missing += [f"machine.{key}" for key in _MACHINE if key not in values["machine"]]
        if missing or not values["rows"]:
            raise ValueError(f"a run without {', '.join(missing) or 'rows'}")
        for part, kinds in ((values["settings"], _SETTINGS), (values["machine"], _MACHINE)):
            _check(part, kinds)
        return cls(
            command=values["command"],
            machine=values["machine"],
            settings=values["settings"],
            rows=[_row(row) for row in values["rows"]],
            schema=values["schema"],
        )

    @property
    def failed(self) -> list[Row]:
        """The rows of models of which a measurement failed."""
        return [row for row in self.rows if row.reason]


def _row(values: Mapping[str, Any]) -> Row:
    """Return a row, without the keys that this version does not know. Raise TypeError or ValueError if a value is wrong."""
    row = Row(**{name: value for name, value in values.items() if name in _ROW})
    _check(values, {name: kind for name, kind in _ROW.items() if name in values})
    _check(row.texts, dict.fromkeys(row.texts, str))
    _check(row.evaluation or {}, dict.fromkeys(row.evaluation or {}, _MAYBE))
    if row.zero_shot is not None:
        average = row.zero_shot["average"]
        _check(average, dict.fromkeys(average, _MAYBE))
    return row


def _check(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raise TypeError if a value is of another type, or ValueError if a number is NaN or infinite."""
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            raise TypeError(f"{name} is {values[name]!r}")
        if isinstance(values[name], float) and not math.isfinite(values[name]):
            raise ValueError(f"{name} is {values[name]}")


NAME = "comparison.json"
"""The document's file in the folder of a comparison."""


def read_comparisons(paths: Sequence[Path]) -> list[Comparison]:
    """Read the comparisons from files; a file contains one or several.

    Args:
        paths: files, or folders with :data:`NAME`.

    Raises:
        DataError: a file cannot be read, or is not a document of a comparison.
    """
    comparisons: list[Comparison] = []
    for path in paths:
        file = path / NAME if path.is_dir() else path
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            runs = values["runs"]
            if values["schema"] != SCHEMA:
                raise ValueError(f"schema {values['schema']}; this version reads {SCHEMA}")
            if not runs:
                raise ValueError("no runs")
            comparisons += [Comparison.from_dict(run) for run in runs]
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file} is not the JSON of a comparison ({type(error).__name__}: {error}); give a {NAME} that "
                "thanos compare wrote"
            ) from error
    return comparisons


def groups_of(runs: Sequence[Comparison]) -> list[list[Comparison]]:
    """Group the runs whose numbers are comparable: those with the same first model, settings and device."""
    groups: dict[str, list[Comparison]] = {}
    for run in runs:
        first = run.rows[0].label if run.rows else ""
        key = json.dumps([first, run.settings, run.machine.get("device")], sort_keys=True)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def merged(runs: Sequence[Comparison]) -> list[Row]:
    """Return the rows of one group. If several runs measured a model, its last row without a failure is used.

    The texts of earlier runs for other prompts are kept.
    """
    rows: dict[str, Row] = {}
    for run in runs:
        for row in run.rows:
            earlier = rows.get(row.label)
            if earlier is None or not row.reason:
                rows[row.label] = row if earlier is None else replace(row, texts=earlier.texts | row.texts)
    return list(rows.values())


def measured_again(runs: Sequence[Comparison]) -> list[str]:
    """Return the labels of which comparable runs have different rows, except those of first models: :func:`merged` uses one."""
    found: dict[str, None] = {}
    for group in groups_of(runs):
        rows: dict[str, Row] = {}
        for row in (row for run in group for row in run.rows[1:] if not row.reason):
            if rows.setdefault(row.label, row) != row:
                found[row.label] = None
    return list(found)
