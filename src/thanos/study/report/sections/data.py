"""What the report rests on: the cells, where they ran, what failed, and what was left out of the comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from thanos.study.report.numbers import Prose, count, setting, short
from thanos.study.report.results import Results, over_common_seeds, row_of
from thanos.study.report.sections.common import SPREAD_NOTE, Section, left_out, note
from thanos.study.report.tables import Table, columns, measures, number, text
from thanos.study.store import CellRecord


def variations(results: Results) -> Section:
    """Return the rows with another calibration or damping than the others."""
    section = Section("variations", "Other calibrations and dampings")
    rows = results.variations
    if not rows:
        return section
    heads = columns(
        "<Setting|setting",
        "damping",
        "<calibration",
        "sparsity (%)|sparsity",
        "perplexity",
        "KL (nats/token)|kl_divergence",
        "<with the usual settings|usual",
        "perplexity|usual_perplexity",
    )
    lines = []
    for row in rows:
        usual = results.find(
            method=row.method,
            pattern=row.pattern,
            sparsity=row.sparsity,
            alpha=row.alpha,
            keep_budget=row.keep_budget,
            block_size=row.block_size,
        )
        calibration = f"{row.calibration}, {row.samples} × {row.sequence_length}"
        shared = () if usual is None else over_common_seeds(row, usual)
        if shared and shared[0].records:
            row, usual = shared
        else:
            usual = None
        other = number(None) if usual is None else number(usual.mean("perplexity"), usual.spread("perplexity"))
        fields = measures(row, ("sparsity", "perplexity", "kl_divergence"))
        damping = number(setting(row.records[0], "damping"))
        lines.append(
            (text(row.setting), damping, text(calibration), *fields, text("" if usual is None else usual.label), other)
        )
    section.prose.append(
        ("These rows stand in no other table, since they differ in more than what is compared there.",)
    )
    title = "Rows with another calibration or damping"
    section.tables.append(
        Table(
            "variations",
            title,
            heads,
            tuple(lines),
            note=note(rows, SPREAD_NOTE, "Side by side over the seeds that both rows have."),
        )
    )
    return section


def data(done: Sequence[CellRecord], failed: Sequence[CellRecord], studies: Sequence[Results]) -> Section:
    """Return where every number comes from, and the cells that failed."""
    section = Section("data", "Where the numbers come from")
    dates = sorted(record.date[:10] for record in done)
    span = "" if not dates else f" between {dates[0]} and {dates[-1]}" if dates[0] != dates[-1] else f" on {dates[0]}"
    section.prose.append((count(done), f" cells ran{span}; ", count(failed), " failed. ", *_machines(done)))
    if failed:
        section.tables.append(_failed(failed))
    for results in studies:
        found = left_out(results)
        if found:
            section.prose.append((f"{results.model}: ", *found) if len(studies) > 1 else found)
    if done:
        section.tables.append(_cells(done))
    return section


def _machines(done: Sequence[CellRecord]) -> Prose:
    devices = Counter(record.machine["device"] for record in done)
    versions = Counter(_versions(record) for record in done)
    commits = list(dict.fromkeys(record.commit or "unknown" for record in done))
    shown = [
        commit.partition("+")[0][:12] + ("+" + commit.partition("+")[2] if "+" in commit else "") for commit in commits
    ]
    parts = (
        [f"Devices: {', '.join(devices)}. Versions: {'; '.join(versions)}. Commits: {', '.join(shown)}."]
        if done
        else []
    )
    return tuple(parts)


def _versions(record: CellRecord) -> str:
    return ", ".join(
        [f"thanos {record.thanos_version}", *(f"{name} {value}" for name, value in record.versions.items())]
    )


def _failed(failed: Sequence[CellRecord]) -> Table:
    heads = columns("<Cell|cell", "<setting", "<reason")
    lines = [(text(short(record)), text(_setting(record)), text(record.reason or "")) for record in failed]
    return Table(
        "failed",
        "Cells that failed",
        heads,
        tuple(lines),
        note=(count(failed), " cells; the next run tries them again."),
    )


def _cells(done: Sequence[CellRecord]) -> Table:
    heads = columns(
        "<Cell|cell",
        "<setting",
        "sparsity (%)|sparsity",
        "of all parameters (%)|sparsity_all",
        "perplexity",
        "KL (nats/token)|kl_divergence",
        "zero-shot (%)|zero_shot",
        "pruning (s)|seconds",
        "peak memory above what is held (GiB)|peak_bytes",
        "<date",
        "<commit",
        "<device",
    )
    fields = ("sparsity", "sparsity_all", "perplexity", "kl_divergence", "zero_shot", "seconds", "peak_bytes")
    lines = []
    for record in done:
        numbers = [number(setting(record, field)) for field in fields]
        words = (record.date[:19], (record.commit or "unknown")[:12], record.machine["device"])
        lines.append((text(short(record)), text(_setting(record)), *numbers, *(text(word) for word in words)))
    return Table("cells", "Every cell", heads, tuple(lines), note=(count(done), " cells."), folded=True)


def _setting(record: CellRecord) -> str:
    row = row_of([record])
    if row.method == "dense":
        return f"{row.model}, dense"
    return f"{row.model}, {row.setting}, seed {record.cell['seed']}"
