"""The sections of a report. Each is a pure function from results to tables, figures and text."""

from thanos.study.report.sections.alpha import alpha
from thanos.study.report.sections.blocks import blocks
from thanos.study.report.sections.claims import claims
from thanos.study.report.sections.common import Section
from thanos.study.report.sections.cost import cost
from thanos.study.report.sections.curves import curves
from thanos.study.report.sections.data import data, variations
from thanos.study.report.sections.fairness import fairness
from thanos.study.report.sections.noise import noise
from thanos.study.report.sections.outliers import outliers
from thanos.study.report.sections.paper import perplexity_table, zero_shot_table
from thanos.study.report.sections.repair import repair
from thanos.study.report.sections.scope import scope
from thanos.study.report.sections.summary import summary
from thanos.study.report.sections.where import where

MODEL_SECTIONS = (
    summary,
    claims,
    fairness,
    outliers,
    scope,
    repair,
    alpha,
    blocks,
    cost,
    curves,
    zero_shot_table,
    noise,
    where,
    variations,
)
"""Sections about each evaluated model, in reading order."""

COST_SECTIONS = (cost, blocks, variations)
"""Sections about a model that was pruned but not evaluated (``cost_only``)."""

__all__ = ["COST_SECTIONS", "MODEL_SECTIONS", "Section", "data", "perplexity_table", "variations"]
