"""The data of the report: the cells, their machines, the failures, and the cells left out of the comparisons."""

from __future__ import annotations

from collections.abc import Sequence

from thanos.study.report.numbers import count, setting, short
from thanos.study.report.results import Results, over_common_seeds, row_of
from thanos.study.report.sections.common import SPREAD_NOTE, Section, counted_cells, left_out, note, own
from thanos.study.report.tables import Line, Table, measures, number, table
from thanos.study.store import CellRecord


def variations(results: Results) -> Section:
    """Return the rows whose calibration or damping differs from that of most rows."""
    section = Section("variations", "Other calibrations and dampings")
    rows = results.variations
    if not rows:
        return section
    heads = (
        "<Setting|setting; damping; <calibration; sparsity; perplexity; kl_divergence; <with the usual settings|usual; "
        "perplexity|usual_perplexity"
    )
    lines: list[Line] = []
    names = ("method", "pattern", "sparsity", "units", "alpha", "keep_budget", "block_size", "scope", "repair")
    for row in rows:
        usual = results.find(**{name: getattr(row, name) for name in names})
        calibration = f"{row.calibration}, {row.samples} × {row.sequence_length}"
        shared = () if usual is None else over_common_seeds(row, usual)
        if shared and shared[0].records:
            row, usual = shared
        else:
            usual = None
        other = number(None) if usual is None else number(usual.mean("perplexity"), usual.spread("perplexity"))
        fields = measures(row, ("sparsity", "perplexity", "kl_divergence"))
        lines.append(
            (row.setting, own(row, "damping"), calibration, *fields, "" if usual is None else usual.label, other)
        )
    section.prose.append(
        ("These rows are in no other table, since they differ from its rows in calibration or damping.",)
    )
    title = "Rows with another calibration or damping"
    about = note(rows, SPREAD_NOTE, "Both perplexities are over the seeds that both rows have.")
    section.tables.append(table("variations", title, heads, lines, about))
    return section


def data(done: Sequence[CellRecord], failed: Sequence[CellRecord], studies: Sequence[Results]) -> Section:
    """Return the origin of the numbers, and the failed cells."""
    section = Section("data", "Where the numbers come from")
    dates = sorted(record.date[:10] for record in done)
    span = "" if not dates else f" between {dates[0]} and {dates[-1]}" if dates[0] != dates[-1] else f" on {dates[0]}"
    section.prose.append((*counted_cells(done), f" ran{span}; ", count(failed), " failed. ", _machines(done)))
    if failed:
        section.tables.append(_failed(failed))
    for results in studies:
        omitted = left_out(results)
        if omitted:
            section.prose.append((f"{results.model}: ", *omitted) if len(studies) > 1 else omitted)
    if done:
        section.tables.append(_cells(done))
    return section


def _machines(done: Sequence[CellRecord]) -> str:
    if not done:
        return ""
    devices = dict.fromkeys(record.machine["device"] for record in done)
    versions = dict.fromkeys(_versions(record) for record in done)
    commits = [(record.commit or "unknown").partition("+") for record in done]
    shown = dict.fromkeys(commit[:12] + plus + changes for commit, plus, changes in commits)
    return f"Devices: {', '.join(devices)}. Versions: {'; '.join(versions)}. Commits: {', '.join(shown)}."


def _versions(record: CellRecord) -> str:
    return ", ".join(
        [f"thanos {record.thanos_version}", *(f"{name} {value}" for name, value in record.versions.items())]
    )


def _failed(failed: Sequence[CellRecord]) -> Table:
    lines = [(short(record), _setting(record), record.reason or "") for record in failed]
    about = (*counted_cells(failed), f"; the next run repeats {'it' if len(failed) == 1 else 'them'}.")
    return table("failed", "Cells that failed", "<Cell|cell; <setting; <reason", lines, about)


def _cells(done: Sequence[CellRecord]) -> Table:
    fields = ("sparsity", "sparsity_all", "perplexity", "kl_divergence", "zero_shot", "seconds", "peak_bytes")
    lines: list[Line] = []
    for record in done:
        numbers = [setting(record, field) for field in fields]
        words = (record.date[:19], (record.commit or "unknown")[:12], record.machine["device"])
        lines.append((short(record), _setting(record), *numbers, *words))
    heads = f"<Cell|cell; <setting; {'; '.join(fields)}; <date; <commit; <device"
    return table("cells", "Every cell", heads, lines, (*counted_cells(done), "."), folded=True)


def _setting(record: CellRecord) -> str:
    row = row_of([record])
    if row.method == "dense":
        return f"{row.model}, dense"
    return f"{row.model}, {row.setting}, seed {record.cell['seed']}"
