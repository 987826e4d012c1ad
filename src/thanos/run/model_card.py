"""The model card of a pruned model, made only from its report."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from thanos import registry
from thanos.engine.layer_warnings import warning_lines
from thanos.engine.records import LayerRecord
from thanos.engine.tuning_record import tuning_line
from thanos.errors import RecipeError
from thanos.run.cut_words import cut_rows, cut_words
from thanos.run.names import public_name
from thanos.run.recovery_card import recovery_sentence
from thanos.run.report import PruningReport

_LICENCE = ("license", "license_name", "license_link")
_WORDS_OF_YAML = ("y", "yes", "n", "no", "true", "false", "on", "off", "null")
_WORST = 5
_BEGUN = ", each window begins with the beginning-of-text token"
_BEGUN_BY = ", each window begins with the tokens {}, as the tokenizer begins a text"
_KEPT = ", more removed from the other rows"

PLAIN_USE = """This is a plain Hugging Face checkpoint; Thanos is not needed to load it:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```"""
"""How to load an output, in the cards that this module makes."""

PLAIN_ZEROS = (
    "The zeros are stored like any other number: the files are as large as before, and a program that does not look for zeros "
    "runs as fast as before."
)
"""Sentence about the size and speed of an output that has zeros, in these cards."""


def model_card(report: PruningReport) -> str:
    """Return the text of ``README.md`` for the output folder."""
    name = public_name(str(report.model["name"]))
    trained = "" if report.tuning or report.recovery else ", without retraining"
    # The recipe has only the names of local texts.
    paths = " --calibration PATH" if report.calibration.get("text_sha256") is not None else ""
    paths += " --prompts PATH" if report.recipe.get("prompts") else ""
    sections = [
        _front_matter(report),
        f"# {name}, pruned",
        f"This is {name} ({report.model['architecture']}) with {_what(report)}{trained}, by "
        f"[Thanos](https://arxiv.org/abs/2504.05346) {report.thanos_version} "
        f"({report.made_by}).",
        _tuning(report),
        _totals_table(report),
        "## Use",
        PLAIN_USE,
        _size(report),
        "## How it was made",
        _recipe_table(report),
        f"Run it again with `thanos prune {name} OUT --recipe recipe.toml{paths}`. Everything "
        "that was measured is in `pruning.json`.",
        *(["## Recovery", recovery_sentence(report.recovery)] if report.recovery else []),
        *(["## Layers with the largest error", _worst_table(report.layers)] if report.layers_lose else []),
        *_warnings(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _what(report: PruningReport) -> str:
    if report.cut:
        return cut_words(report.cut)
    share = _percent(report.totals["sparsity_targeted"])
    return f"{share} of the weights of its {len(report.layers)} pruned layers set to zero"


def _size(report: PruningReport) -> str:
    if report.cut:
        return (
            "The removed parts are not in the files: `config.json` states the smaller sizes, and every program runs a smaller "
            "model. `pruning.json` lists the removed parts (`cut`, and `removed_units` of the layers)."
        )
    return PLAIN_ZEROS


def _front_matter(report: PruningReport) -> str:
    name = str(report.model["name"])
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    stated: Mapping[str, Any] = report.model.get("stated", {})
    lines += [f"{key}: {_yaml(stated[key])}" for key in _LICENCE if key in stated]
    lines += _yaml_list("language", stated.get("language", []))
    lines += _yaml_list("base_model", [name] if report.model.get("origin") == "hub" else stated.get("base_model", []))
    sparse = [] if report.cut else ["- sparse"]
    return "\n".join([*lines, "tags:", "- pruned", *sparse, "- thanos", "---"])


def _yaml_list(key: str, values: Sequence[str]) -> list[str]:
    """Return a key of the front matter: one value on its line, several below it; nothing for none."""
    if len(values) == 1:
        return [f"{key}: {_yaml(values[0])}"]
    return [f"{key}:", *(f"- {_yaml(value)}" for value in values)] if values else []


def _yaml(value: str) -> str:
    """Return a string as YAML reads it back: with quotes if it could be read as something else, as the language ``no``."""
    plain = re.fullmatch(r"[A-Za-z][\w.\-/]*", value) and value.lower() not in _WORDS_OF_YAML
    return value if plain else json.dumps(value, ensure_ascii=False)


def _tuning(report: PruningReport) -> str:
    line = tuning_line(report.tuning, has_zeros=not report.cut)
    changed = report.layers_lose and any(one.kept_epoch for one in report.tuning)
    return (
        f"{line}.{' The errors of the layers below were measured before that step.' if changed else ''}" if line else ""
    )


def _totals_table(report: PruningReport) -> str:
    totals = report.totals
    errors = [
        ("mean relative layer error, before compensation", _number(totals["mean_error_before_compensation"])),
        ("mean relative layer error, after compensation", _number(totals["mean_error_after_compensation"])),
    ]
    if report.cut:
        return _table(("", ""), [*cut_rows(report.cut), *(errors if report.layers_lose else [])])
    return _table(
        ("", ""),
        [
            ("parameters", f"{totals['parameters']:,}"),
            ("zeros among the pruned layers", f"{totals['zeros_targeted']:,} of {totals['targeted_parameters']:,}"),
            ("sparsity of the pruned layers", _percent(totals["sparsity_targeted"])),
            ("sparsity of all parameters", _percent(totals["sparsity_all"])),
            *errors,
        ],
    )


def _outliers(recipe: Mapping[str, Any]) -> str:
    return _percent(recipe["outlier_rows"]) + (_KEPT if recipe["outlier_rows"] and recipe.get("keep_budget") else "")


def _recipe_table(report: PruningReport) -> str:
    recipe, calibration, versions = report.recipe, report.calibration, report.versions
    source = public_name(str(calibration["source"]))
    damped = any(layer.damping is not None for layer in report.layers)
    return _table(
        ("setting", "value"),
        [
            *([("units left are a multiple of", str(multiple))] if (multiple := recipe.get("multiple_of")) else []),
            *([] if report.cut else [("outlier rows left dense", _outliers(recipe))]),
            *([("scope of the budget", f"one for every {scope}")] if (scope := _scope(recipe)) else []),
            *(
                [("allocation of the zeros", _allocated(chosen))]
                if (chosen := report.execution.get("allocation"))
                else []
            ),
            *_repair_rows(report),
            *_precision_rows(report),
            *([("damping", f"{recipe['damping']:g}")] if damped else []),
            (
                "calibration",
                f"{source}: {calibration['samples']} × {calibration['sequence_length']} tokens, {calibration['rule']}, "
                f"{_continued(calibration, recipe)}seed {recipe['seed']}{_begun(calibration)}",
            ),
            ("hash of the calibration tokens", f"`{calibration['sha256']}`"),
            *([("hash of the calibration text", f"`{text}`")] if (text := calibration.get("text_sha256")) else []),
            ("device", versions["device"]),
            ("versions", ", ".join(f"{key} {versions[key]}" for key in ("torch", "transformers", "python"))),
        ],
    )


def _continued(calibration: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """Return words for the sequences that the dense model generated; empty if there are none."""
    count = calibration.get("generated", 0)
    begun = f"the prompts in {recipe['prompts']}" if recipe.get("prompts") else "pieces of them"
    return f"{count} more in which the dense model continues {begun}, " if count else ""


def _begun(calibration: dict[str, Any]) -> str:
    older = calibration.get("bos")  # what versions before bos_ids wrote: one id or null
    bos = calibration.get("bos_ids", [] if older is None else [older])
    return _BEGUN_BY.format(", ".join(map(str, bos))) if len(bos) > 1 else _BEGUN if bos else ""


def _allocated(chosen: dict[str, Any]) -> str:
    """Return the sparsities that an allocation chose, in words."""
    sparsities = [layer["sparsity"] for layer in chosen["layers"].values()] or [0.0]
    return f"by error: {len(chosen['layers'])} layers with {_percent(min(sparsities))} to {_percent(max(sparsities))}"


def _repair_rows(report: PruningReport) -> list[tuple[str, str]]:
    """Return the rows about the repair; none if no part of it was on."""
    rows = [("effort", report.recipe["effort"])] if "effort" in report.recipe else []
    shares = Counter(layer.dense_target for layer in report.layers if layer.dense_target is not None)
    if shares:
        counts = ", ".join(f"{share:g} in {shares[share]}" for share in sorted(shares))
        rows.append(("fraction of the dense model's outputs in the target, by layers", counts))
    if report.block_errors:
        last = report.block_errors[-1]
        where = "held-out sequences" if last.held_out else "calibration sequences"
        stages = ", ".join(f"{_number(error)} ({stage})" for stage, error in last.errors.items())
        rows.append((f"relative error of block {last.block + 1} on {where}, after each stage", stages))
    return rows


def _scope(recipe: Mapping[str, Any]) -> str | None:
    """Return the scope of the budget that the recipe or its effort chose; None if it is the method's own."""
    try:
        fixed = not registry.parse_pattern(recipe["pattern"]).any_entries
    except RecipeError:  # a pattern of another version, or of a file that is not loaded
        fixed = True
    if recipe.get("scope") or fixed:
        return recipe.get("scope")
    return next((row.scope for row in registry.efforts() if row.name == recipe.get("effort")), None)


def _precision_rows(report: PruningReport) -> list[tuple[str, str]]:
    """Return the rows about lost precision: the residual after the refit, and the rounding of tuned weights."""
    left = [layer.residual for layer in report.layers if layer.residual is not None]
    rows = [("largest relative residual of a row's best weights", f"{max(left):.1e}")] if left else []
    pairs = [(one.held_out_unrounded, one.held_out_after) for one in report.tuning]
    changes = [after / exact - 1 for exact, after in pairs if exact and after is not None]
    if changes:
        largest = max(changes, key=abs)
        rows.append(("largest change of a tuned block's held-out error by rounding", f"{100 * largest:+.2g} %"))
    return rows


def _worst_table(layers: list[LayerRecord]) -> str:
    known = [layer for layer in layers if _is_known(layer.error_after_compensation)]
    worst = sorted(known, key=lambda layer: -(layer.error_after_compensation or 0.0))[:_WORST]
    rows = [(f"`{w.name}`", _percent(w.sparsity), _number(w.error_after_compensation)) for w in worst]
    return _table(("layer", "sparsity", "relative error"), rows)


def _warnings(report: PruningReport) -> list[str]:
    lines = [f"- {line}" for line in (*report.warnings, *warning_lines(report.layers, quote="`"))]
    return ["## Warnings", "\n".join(lines)] if lines else []


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _number(value: float | None) -> str:
    return f"{value:.5f}" if _is_known(value) else "not measured"


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
