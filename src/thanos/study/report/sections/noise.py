"""Noise: the spread over calibration seeds, and the differences that exceed it."""

from __future__ import annotations

from itertools import combinations

from thanos.study.report.numbers import count
from thanos.study.report.ranking import change_of, comparable, larger_noise, one_seed, verdict
from thanos.study.report.results import Results, Row
from thanos.study.report.sections.common import SIGNS, Section, headline_patterns, headline_rows, note
from thanos.study.report.tables import Line, Table, table

SEEDS = 3
"""Least number of seeds of a headline row in a complete study."""


def noise(results: Results) -> Section:
    """Return mean and spread of the headline rows, and every pair's difference with the larger of the two spreads."""
    section = Section("noise", "Noise")
    section.prose.append(
        (
            "Each seed draws another calibration text. A difference is a tie (=) if it is not larger than the larger of the "
            "two rows' spreads (sample standard deviations).",
        )
    )
    groups = [rows for pattern in headline_patterns(results) if (rows := headline_rows(results, pattern))]
    few = [row for rows in groups for row in rows if len(row.draws) < SEEDS]
    section.missing += [f"{row.setting}: {SEEDS} seeds with distinct windows, not {len(row.draws)}" for row in few]
    if not groups:
        section.missing.append(f"headline rows with {SEEDS} seeds each")
    if not any(row.spread("perplexity") for rows in groups for row in rows):
        return section
    section.tables += [_spreads(groups), _pairs(groups)]
    return section


def _spreads(groups: list[list[Row]]) -> Table:
    fields = ("perplexity", "kl_divergence", "zero_shot", "layer_error")
    heads = (
        "<Method|method; seeds; perplexity, mean|perplexity; spread|perplexity_spread; KL, mean (nats/token)|kl_divergence; "
        "spread|kl_divergence_spread; zero-shot, mean (%)|zero_shot; spread|zero_shot_spread; "
        "layer error, mean|layer_error; spread|layer_error_spread"
    )
    lines: dict[str, list[Line]] = {
        rows[0].pattern_label: [
            (row.name, count(row.draws), *(value for field in fields for value in (row.mean(field), row.spread(field))))
            for row in rows
        ]
        for rows in groups
    }
    used = [row for rows in groups for row in rows]
    return table("noise", "Mean and spread over seeds", heads, lines, note(used))


def _pairs(groups: list[list[Row]]) -> Table:
    lines: dict[str, list[Line]] = {}
    for rows in groups:
        known = [row for row in rows if row.mean("perplexity") is not None]
        lines[rows[0].pattern_label] = [
            (
                row.name,
                SIGNS[verdict(row, other)] + one_seed(row, other),
                other.name,
                change_of(row, other),
                larger_noise(row, other),
            )
            for row, other in combinations(known, 2)
            if comparable(row, other)
        ]
    used = [row for rows in groups for row in rows]
    about = note(used, "Perplexity over the seeds that both rows have: < lower, > higher, = a tie, ° only one seed.")
    heads = "<Method|first; <verdict|verdict; <against|second; difference; larger spread|spread"
    return table("differences", "Differences between methods, and the noise", heads, lines, about, folded=True)
