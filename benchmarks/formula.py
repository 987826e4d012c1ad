"""Compare the formulas for the compensation of removed columns. The paper has three formulas for its structured step.

The same set P of columns is removed from every row, and K are the kept columns. Each formula sets Ŵ_:P = 0 and

    Eq. 13, Algorithm 2     Ŵ = W − W_:P ((H⁻¹)_PP)⁻¹ (H⁻¹)_P:        the inverse of a sub-block of the inverse
    least squares           Ŵ_:K = W_:K + W_:P H_PK (H_KK)⁻¹          the optimum by definition
    no compensation         Ŵ_:K = W_:K
    Eq. 72 (appendix G.4.2) Ŵ = W − W_:P (H_PP)⁻¹ H_P:
    Algorithm 7             Ŵ = W − W_:P (H⁻¹)_PP H_P:

The relative error of each is tr(Δ H Δᵀ) / tr(W H Wᵀ), Δ = Ŵ − W.

    python benchmarks/formula.py MODEL LAYER --calibration FILE --json docs/results/formula.json
    python benchmarks/formula.py --show docs/results/formula.json

The first command measures one layer of a model and writes the result. Both print the result as a Markdown table.
"""

from __future__ import annotations

import argparse
import difflib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thanos.calibration.making import make_calibration
from thanos.calibration.statistics import check_finite, gather
from thanos.errors import ModelError
from thanos.model.fingerprint import source_commit
from thanos.model.layers import linear_layers
from thanos.model.loading import load_model
from thanos.model.source import resolve_model
from thanos.recipe import Recipe, matches
from thanos.recipe.layer import DEFAULT_DAMPING
from thanos.system.device import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMULAS = {
    "eq13": ("Eq. 13, Algorithm 2", "W[:,P] · (H⁻¹[P,P])⁻¹ · H⁻¹[P,:]"),
    "least_squares": ("Least squares on the support", "H[P,K] · H[K,K]⁻¹"),
    "none": ("No compensation", ""),
    "eq72": ("Appendix G.4.2, Eq. 72", "W[:,P] · H[P,P]⁻¹ · H[P,:]"),
    "algorithm7": ("Algorithm 7", "W[:,P] · H⁻¹[P,P] · H[P,:]"),
}
"""Name in the JSON → where the paper prints it, and how it reads."""

DEFAULT_SHARE = 0.25
"""Fraction of the columns to remove: 64 of 256, as in the first measurement in which the formulas differed."""


def cheapest_columns(weight: Tensor, hessian: Tensor, share: float = DEFAULT_SHARE) -> Tensor:
    """Return the columns that structured Thanos would remove: smallest ‖W_:j‖² ‖X_j‖².

    Args:
        weight: (c, b).
        hessian: XᵀX up to a positive factor, (b, b).
        share: fraction of the columns to remove, 0 < share < 1; at least one is removed and one is kept.

    Returns:
        Their indices, ascending, int64.
    """
    columns = weight.shape[1]
    if not 0 < share < 1 or columns < 2:
        raise ValueError(f"share must lie between 0 and 1 and leave a column; got {share!r} of {columns} columns")
    number = min(columns - 1, max(1, round(share * columns)))
    losses = weight.double().square().sum(0) * hessian.diagonal().double()
    return losses.argsort(stable=True)[:number].sort().values


def formula_errors(
    weight: Tensor, hessian: Tensor, removed: Tensor, damping: float = DEFAULT_DAMPING
) -> dict[str, float]:
    """Return the relative error of each way to compensate, in float64.

    Args:
        weight: (c, b), any floating dtype.
        hessian: XᵀX up to a positive factor, (b, b), symmetric. Damped for the compensation, not for the error.
        removed: distinct column indices, (s,), 0 < s < b.
        damping: fraction of the mean diagonal that is added to the diagonal.

    Returns:
        A number for each of :data:`FORMULAS`.

    Raises:
        ValueError: the shapes do not fit, or no column would be removed or kept.
    """
    columns = weight.shape[1]
    if hessian.shape != (columns, columns) or not 0 < removed.numel() < columns:
        raise ValueError(
            f"weight {tuple(weight.shape)} needs a Hessian of {(columns, columns)}, not {tuple(hessian.shape)}, and between 1 "
            f"and {columns - 1} removed columns, not {removed.numel()}"
        )
    W, H = weight.double(), hessian.double()
    total = ((W @ H) * W).sum()
    errors = {}
    for name in FORMULAS:
        change = _compensated(name, W, H, removed, damping) - W
        errors[name] = float(((change @ H) * change).sum() / total)
    return errors


def _compensated(name: str, W: Tensor, H: Tensor, removed: Tensor, damping: float) -> Tensor:
    """Return Ŵ by one formula, with exact zeros in the removed columns."""
    damped = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
    inverse = torch.linalg.inv(damped)
    P = removed
    result = W.clone()
    if name == "least_squares":
        kept = torch.ones(len(H), dtype=torch.bool, device=H.device)
        kept[P] = False
        result[:, kept] += W[:, P] @ torch.linalg.solve(damped[kept][:, kept], damped[P][:, kept], left=False)
    elif name == "eq13":
        result -= W[:, P] @ torch.linalg.solve(inverse[P][:, P], inverse[P])
    elif name == "eq72":
        result -= W[:, P] @ torch.linalg.solve(damped[P][:, P], damped[P])
    elif name == "algorithm7":
        result -= W[:, P] @ inverse[P][:, P] @ damped[P]
    result[:, P] = 0.0
    return result


def measure_layer(
    model: PreTrainedModel,
    windows: Tensor,
    name: str,
    *,
    share: float = DEFAULT_SHARE,
    damping: float = DEFAULT_DAMPING,
) -> dict[str, Any]:
    """Compare the formulas on one layer of a model, on the inputs that the dense model gives it.

    Args:
        model: a loaded model, on any device.
        windows: calibration tokens, (samples, length) int64.
        name: full name of the layer, or the end of it after a dot.
        share: fraction of the columns to remove, the cheapest ones.
        damping: fraction of the mean diagonal that is added to the diagonal.

    Returns:
        ``layer`` (full name), ``shape``, ``removed`` (number of columns), ``tokens``, ``damping`` and ``errors``.

    Raises:
        ModelError: the model has no such layer, or several.
    """
    layers = linear_layers(model)
    found = [layer for layer in layers if matches(layer.name, name)]
    if len(found) != 1:
        near = difflib.get_close_matches(name, [layer.name for layer in layers], 3, 0.0)
        which = ", ".join(layer.name for layer in found[:3]) if found else f"the nearest are {', '.join(near)}"
        raise ModelError(f"formula layer {name!r} matches {len(found)} layers ({which}); name exactly one")
    layer = found[0]
    with torch.inference_mode(), gather([layer]) as groups:
        for index in range(len(windows)):
            model(input_ids=windows[index : index + 1].to(model.device), use_cache=False)
    if not groups:
        raise ModelError(f"formula layer {layer.name} was not reached by any token; name another one")
    check_finite(groups[:1])
    hessian = groups[0].hessian.double()
    weight = layer.oriented(model.get_parameter(layer.weight_name).detach()).double()
    removed = cheapest_columns(weight, hessian, share)
    return {
        "layer": layer.name,
        "shape": list(layer.shape),
        "removed": removed.numel(),
        "tokens": groups[0].tokens,
        "damping": damping,
        "errors": formula_errors(weight, hessian, removed, damping),
    }


def table(result: dict[str, Any]) -> str:
    """Return a result of :func:`measure_layer` as a Markdown table."""
    rows, columns = result["shape"]
    title = f"{result['layer']} ({rows} × {columns}), {result['removed']} columns removed, {result['tokens']:,} tokens"
    lines = [f"| {title} | read literally | relative error |", "|---|---|---:|"]
    for name, error in result["errors"].items():
        printed, formula = FORMULAS[name]
        lines.append(f"| {printed} | {formula} | {error:.4g} |")
    return "\n".join(lines)


def main() -> None:
    """Measure one layer, or show an earlier result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("layer", nargs="?", help="full name, or the end of it after a dot")
    parser.add_argument("--calibration", default=Recipe().calibration)
    parser.add_argument("--share", type=float, default=DEFAULT_SHARE, help="fraction of the columns to remove")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--show", type=Path, help="print the table of an earlier result")
    arguments = parser.parse_args()
    if arguments.show is not None:
        print(table(json.loads(arguments.show.read_text(encoding="utf-8"))))
        return
    if arguments.layer is None:
        parser.error("give MODEL and LAYER, or --show FILE")
    recipe = Recipe(calibration=arguments.calibration, device=arguments.device, dtype="float32")
    source, device = resolve_model(arguments.model), choose_device(arguments.device)
    made = make_calibration(source, recipe, device, lambda event: None)
    model = load_model(source, dtype=recipe.dtype, device=device)
    result = {
        "model": Path(arguments.model).name,
        "calibration": {
            "source": Path(arguments.calibration).name,
            "samples": recipe.samples,
            "sequence_length": recipe.sequence_length,
            "seed": recipe.seed,
        },
        **measure_layer(model, made.ids, arguments.layer, share=arguments.share, damping=recipe.damping),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "commit": source_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    print(table(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
