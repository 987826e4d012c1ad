"""The output of finished commands."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thanos.cli.shrunk_output import show_shrinkage
from thanos.cli.tables import (
    cost,
    number,
    phase_rows,
    print_table,
    room,
    score,
    share,
    show_rows,
    to_stdout,
    write_json,
)
from thanos.run.cut_words import cut_rows, plan_rows
from thanos.run.recovery_card import held_out_by_kind

if TYPE_CHECKING:
    from thanos.bench.layer import LayerTime
    from thanos.bench.model import ModelTime
    from thanos.evaluation.inspect import Inspection, NotFinite
    from thanos.evaluation.perplexity import Evaluation
    from thanos.evaluation.tasks import ZeroShot
    from thanos.planning.plan import Plan
    from thanos.recovery.report import RecoveryReport
    from thanos.run.report import PruningReport
    from thanos.study.report.build import Report

_SHOWN_WARNINGS = 5

_BOS = {
    "window": "at the start of each window",
    "text": "at the start of the text only",
    "none": "none: the tokenizer adds none",
}


def show_report(report: PruningReport, out: Path, *, complete: bool = False, said: Collection[str] = ()) -> None:
    """Print the results of a pruning run, its time and memory, and the output folder.

    ``complete`` is true if an earlier run had already finished ``out``; the report is then that run's. ``said``: warnings that
    the command already printed as notes.
    """
    totals, recipe = report.totals, report.recipe
    errors = [
        ("mean layer error, before compensation", number(totals["mean_error_before_compensation"])),
        (f"mean layer error, {_last_step(report)}", number(totals["mean_error_after_compensation"])),
    ]
    rows = [
        ("method, pattern", f"{recipe['method']}, {recipe['pattern']}"),
        *(cut_rows(report.cut) or _sparsity_rows(totals, "pruned")),
        *(errors if report.layers_lose else []),
        *_repair_rows(report),
        *phase_rows(report.phases),
        ("total", cost(report.seconds, report.host_peak_bytes, report.device_peak_bytes)),
        ("already complete, in" if complete else "written to", str(out)),
    ]
    print_table(("", ""), rows)
    show_warnings(report, said)


def _sparsity_rows(totals: Mapping[str, Any], which: str) -> list[tuple[str, str]]:
    return [
        (f"sparsity of the {which} layers", share(totals["zeros_targeted"], totals["targeted_parameters"])),
        ("sparsity of all parameters", share(totals["zeros_all"], totals["parameters"])),
    ]


def _last_step(report: PruningReport) -> str:
    """Return in words when a layer's last error was measured: it is not measured again after training."""
    changed = any(layer.changed_by for layer in report.layers)
    return "before tuning" if changed else "as written"


def _repair_rows(report: PruningReport) -> list[tuple[str, str]]:
    """Return the row with the last block's error after each stage; none without a dense stream."""
    if not report.block_errors:
        return []
    last = report.block_errors[-1]
    stages = ", ".join(f"{error:.5f} ({stage})" for stage, error in last.errors.items())
    return [(f"error of block {last.block + 1}, after each stage", stages)]


def show_recovery(
    report: RecoveryReport,
    out: Path,
    json_file: Path | None,
    *,
    complete: bool = False,
    said: Collection[str] = (),
) -> None:
    """Print the results of a recovery, and write them as JSON if a file is given.

    ``complete`` is true if an earlier run had already finished ``out``; the report is then that run's. ``said``: warnings that
    the command already printed as notes.
    """
    sequences = report.sequences
    before, after = report.held_out_before, report.held_out_after
    kinds = held_out_by_kind(report.to_dict())
    rows = [
        ("held-out KL divergence to the dense model", f"{before:.5f} → {after:.5f} nats a token"),
        *[(f"  on {kind}", f"{old:.5f} → {new:.5f}") for kind, (old, new) in kinds.items()],
        ("sequences trained, held out", f"{sequences['trained']}, {sequences['held_out']}"),
        (
            "weights written",
            f"of step {report.best_step} of {report.steps}" if report.best_step else "the original ones",
        ),
        *([("layers with fixed zeros, zeros", f"{report.masked_layers}, {report.zeros:,}")] if report.zeros else []),
        *phase_rows(report.phases),
        ("already complete, in" if complete else "written to", str(out)),
    ]
    show_rows(rows, report.to_dict(), json_file)
    for line in report.warnings:
        if line not in said:
            print(f"warning: {line}", file=sys.stderr)


def show_plan(plan: Plan, json_file: Path | None) -> None:
    """Print the plan of a run, and on the standard error the resources that are too small."""
    rows = [
        ("blocks, layers to prune", f"{plan.blocks}, {plan.layers}"),
        *plan_rows(plan.cut),
        ("hidden states", f"{plan.activations_bytes / 2**30:.2f} GiB, kept on: {plan.activations}"),
        ("sequences in a batch", str(plan.batch)),
        *phase_rows(plan.phases),
        ("total", cost(plan.seconds, plan.host_peak_bytes, plan.device_peak_bytes)),
        ("disk", room(plan.disk_bytes + plan.disk_besides_bytes, plan.disk_free_bytes)),
        ("additional host memory", room(plan.host_peak_bytes - plan.host_base_bytes, plan.host_free_bytes)),
    ]
    if plan.device_peak_bytes is not None and plan.device_free_bytes is not None:
        rows.append(("device memory", room(plan.device_peak_bytes, plan.device_free_bytes)))
    show_rows(rows, plan.to_dict(), json_file)
    for line in plan.does_not_fit:
        print(f"warning: {line}", file=sys.stderr)


def show_warnings(report: PruningReport, said: Collection[str] = ()) -> None:
    """Print the first warnings on the standard error, and the file with all of them; none of those in ``said``."""
    from thanos.engine.layer_warnings import warning_lines

    lines = [line for line in (*report.warnings, *warning_lines(report.layers)) if line not in said]
    for line in lines[:_SHOWN_WARNINGS]:
        print(f"warning: {line}", file=sys.stderr)
    if len(lines) > _SHOWN_WARNINGS:
        print(f"warning: {len(lines) - _SHOWN_WARNINGS} more are in pruning.json", file=sys.stderr)


def show_evaluation(result: Evaluation, json_file: Path | None) -> None:
    """Print an evaluation, and write it as JSON if a file is given."""
    rows = [
        ("perplexity", f"{result.perplexity:.4f}"),
        ("tokens scored", f"{result.tokens:,} in {result.windows} windows of {result.sequence_length}"),
        ("beginning-of-text token", _BOS[result.bos] + _several(result.bos_ids)),
        ("speed", f"{result.tokens_per_second:,.0f} tokens/s on {result.device}, {result.dtype}"),
    ]
    if result.kl_divergence is not None and result.top1_agreement is not None:
        rows[1:1] = [
            ("perplexity of the dense model", number(result.dense_perplexity, 4)),
            ("KL divergence to it, nats a token", f"{result.kl_divergence:.5f}"),
            ("same most probable token", f"{100 * result.top1_agreement:.2f} %"),
        ]
    show_rows(rows, result.to_dict(), json_file)


def _several(bos_ids: list[int]) -> str:
    """Return the end of a line that names the tokens with which a tokenizer begins a text, if there are several."""
    return f" (the {len(bos_ids)} tokens {', '.join(map(str, bos_ids))})" if len(bos_ids) > 1 else ""


def show_zero_shot(result: ZeroShot, json_file: Path | None) -> None:
    """Print accuracies with their standard errors, and write them as JSON if a file is given."""
    head = ("task", "accuracy", "±", "normalised", "±", "documents")
    keys = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    rows = [(name, *(score(task[key]) for key in keys), f"{task['samples']:,}") for name, task in result.tasks.items()]
    rows.append(("average", *(score(result.average[key]) for key in keys), ""))
    write_json(result.to_dict(), json_file)
    if not to_stdout(json_file):
        begin = "with BOS" if result.bos == "window" else "as the tokenizer begins a text"
        print_table(
            head,
            rows,
            title=f"{Path(result.model).name}, zero-shot (lm_eval {result.versions['lm_eval']}); requests begin {begin}",
        )


def show_inspection(found: Inspection, json_file: Path | None) -> None:
    """Print the inspection of a checkpoint, and write it as JSON if a file is given."""
    if not to_stdout(json_file):
        rows = [
            (
                layer.name,
                f"{layer.shape[0]} × {layer.shape[1]}",
                f"{100 * layer.sparsity:.2f} %",
                ", ".join(layer.patterns) or "-",
                str(layer.outlier_rows or "-"),
            )
            for layer in found.layers
        ]
        print_table(("layer", "shape", "zeros", "patterns", "outlier rows"), rows)
        groups: dict[str, list[int]] = {}
        for record in found.dense:
            groups.setdefault(record.reason, []).append(record.parameters)
        print_table(
            ("left dense because", "tensors", "parameters"),
            [(reason, str(len(sizes)), f"{sum(sizes):,}") for reason, sizes in groups.items()],
        )
        if found.smaller is not None:
            show_shrinkage(found.smaller)
    rows = _sparsity_rows(found.totals, "targeted")
    if found.require:
        rows.append(
            (f"pattern {found.require}", "violated" if found.violations else "satisfied by every targeted layer")
        )
    damaged, others = found.damaged, [tensor for tensor in found.not_finite if not tensor.parameter]
    rows.append(("NaN, infinity in parameters", _not_finite(damaged)))
    if others:
        rows.append(("NaN, infinity in other tensors", f"{_not_finite(others)}; this is allowed"))
    show_rows(rows, found.to_dict(), json_file)
    for tensor in damaged:
        print(
            f"{tensor.name}: {tensor.nan:,} NaN and {tensor.infinite:,} infinite entries; the checkpoint is damaged: "
            "download or save it again",
            file=sys.stderr,
        )
    for violation in found.violations:
        print(f"{violation.name}: {violation.reason}", file=sys.stderr)


def _not_finite(tensors: Sequence[NotFinite]) -> str:
    if not tensors:
        return "none"
    where = f"in {len(tensors)} {'tensor' if len(tensors) == 1 else 'tensors'}"
    return f"{sum(t.nan for t in tensors):,} NaN, {sum(t.infinite for t in tensors):,} infinite {where}"


def show_study_report(report: Report, out: Path, warnings: Sequence[str], readme: Path | None) -> None:
    """Print the contents of a report, and warnings about its store."""
    folder = out if out.is_dir() else out.parent
    rows = [
        ("page", str(folder / "report.html")),
        ("tables", f"{len(report.tables)} in {folder / 'tables'}"),
        ("figures", f"{len(report.figures)} in {folder / 'figures'}"),
        *([("headline", f"in {readme}")] if readme else []),
    ]
    print_table(("", ""), rows)
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)


def show_model_time(result: ModelTime) -> None:
    """Print the results of ``thanos bench model``."""
    rows = []
    for name, phase in result.phases.items():
        floor = result.floor_seconds.get(name)
        device = "" if phase.device_peak_bytes is None else f"{phase.device_peak_bytes / 2**30:.2f} GiB"
        known = () if floor is None else (f"{floor:.2f}", f"{phase.seconds / floor:.1f} ×" if floor else "")
        cells = (name, f"{phase.seconds:.2f}", *(known or ("", "")), f"{phase.host_peak_bytes / 2**30:.2f} GiB", device)
        rows.append(cells)
    floor = sum(result.floor_seconds.values())
    rows.append(("total", f"{result.seconds:.2f}", f"{floor:.2f}", f"{result.seconds / floor:.1f} ×", "", ""))
    print_table((f"{result.blocks} blocks", "seconds", "floor", "× floor", "host peak", "device peak"), rows)
    print_table(("solve", "seconds"), [(kind, f"{seconds:.2f}") for kind, seconds in result.solve_seconds.items()])
    rates = ", ".join(f"{name} {value:.3g}/s" for name, value in result.rates.to_dict().items())
    estimated = "" if result.blocks == result.shape.blocks else f", estimated from {result.blocks}"
    print(
        f"all {result.shape.blocks} blocks{estimated}: {result.whole_seconds:.1f} s on {result.machine['device']}; {rates}"
    )


def show_layer_times(results: Sequence[LayerTime]) -> None:
    """Print the results of ``thanos bench layer``."""
    rows = [
        (
            f"{r.rows} × {r.columns}",
            f"{r.method} (reference)" if r.implementation == "reference" else r.method,
            r.pattern,
            str(r.block_size),
            f"{r.seconds:.4f}",
            f"{r.seconds / r.floor_seconds:.1f}",
            "" if r.modelled_seconds is None else f"{100 * r.modelled_seconds / r.seconds:.0f}",
            f"{r.error:.6f}",
            f"{100 * r.sparsity:.3f} %",
            f"{r.peak_bytes / 2**30:.2f} GiB",
        )
        for r in results
    ]
    times = ("seconds", "× factorisation", "% of peak rate")
    head = ("layer", "method", "pattern", "B", *times, "error", "sparsity", "peak memory")
    print_table(head, rows)
