"""The rows of the patterns of this package."""

from __future__ import annotations

from thanos.registry.rows import PatternRow

PATTERNS: tuple[PatternRow, ...] = (
    PatternRow(
        name="unstructured",
        title="unstructured",
        help="any weights",
        source="thanos.patterns.unstructured:Unstructured",
        examples=("unstructured",),
    ),
    PatternRow(
        name="N:M",
        title="n:m",
        help="at most N of M weights are kept",
        source="thanos.patterns.nm:NM",
        examples=("2:4", "4:8"),
        other_names=("nm", "n:m", "semi-structured", "semistructured", "semi"),
    ),
    PatternRow(
        name="columns",
        title="whole columns",
        help="whole input columns are removed",
        source="thanos.patterns.columns:Columns",
        examples=("columns",),
        other_names=("structured", "column", "col", "cols", "input-columns"),
    ),
    PatternRow(
        name="neurons",
        title="neurons",
        help="whole MLP neurons are removed: a smaller model",
        source="thanos.patterns.neurons:Neurons",
        examples=("neurons",),
        other_names=("neuron", "mlp", "channels", "intermediate"),
    ),
    PatternRow(
        name="heads",
        title="heads",
        help="whole attention heads are removed: a smaller model",
        source="thanos.patterns.heads:Heads",
        examples=("heads",),
        other_names=("head", "attention-heads", "kv-heads"),
        matrix_name="heads:N",
    ),
    PatternRow(
        name="width",
        title="neurons and heads",
        help="neurons and heads, in the better proportion: a smaller model",
        source="thanos.patterns.width:Width",
        examples=("width",),
        other_names=("widths", "neurons-and-heads"),
        matrix_name=None,
    ),
    PatternRow(
        name="blocks",
        title="decoder blocks",
        help="whole decoder blocks are removed: a smaller model",
        source="thanos.patterns.blocks:Blocks",
        examples=("blocks",),
        other_names=("block", "layers", "depth"),
        matrix_name=None,
    ),
)
"""The patterns of this package; the first is the default."""
