"""Which way to compensate removed columns is right: the paper prints its structured step in three ways.

With the same set P removed from every row and K the columns that stay, each way sets Ŵ_:P = 0 and

    Eq. 13, Algorithm 2     Ŵ = W − W_:P ((H⁻¹)_PP)⁻¹ (H⁻¹)_P:        the inverse of a sub-block of the inverse
    least squares           Ŵ_:K = W_:K + W_:P H_PK (H_KK)⁻¹          the optimum by definition
    no compensation         Ŵ_:K = W_:K
    Eq. 72 (appendix G.4.2) Ŵ = W − W_:P (H_PP)⁻¹ H_P:
    Algorithm 7             Ŵ = W − W_:P (H⁻¹)_PP H_P:

The relative error of each is tr(Δ H Δᵀ) / tr(W H Wᵀ), Δ = Ŵ − W.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thanos.calibration.statistics import check_finite, gather
from thanos.errors import ModelError
from thanos.model.layers import linear_layers
from thanos.recipe import DEFAULT_DAMPING, matches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMULAS = ("eq13", "least_squares", "none", "eq72", "algorithm7")
"""The ways, as the store names them."""

DEFAULT_SHARE = 0.25
"""Share of columns removed: 64 of 256, as in the measurement that first told the formulas apart."""


def cheapest_columns(weight: Tensor, hessian: Tensor, share: float = DEFAULT_SHARE) -> Tensor:
    """Return the columns that structured Thanos would remove: smallest ‖W_:j‖² ‖X_j‖².

    Args:
        weight: (c, b).
        hessian: XᵀX up to a positive factor, (b, b).
        share: of the columns, 0 < share < 1; at least one goes and one stays.

    Returns:
        Their indices in rising order, int64.
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
        damping: share of the mean diagonal added to the diagonal.

    Returns:
        A number for each of :data:`FORMULAS`.

    Raises:
        ValueError: the shapes do not fit, or no column would go or stay.
    """
    columns = weight.shape[1]
    if hessian.shape != (columns, columns) or not 0 < removed.numel() < columns:
        raise ValueError(
            f"weight {tuple(weight.shape)} needs a Hessian of {(columns, columns)}, not {tuple(hessian.shape)}, and between 1 "
            f"and {columns - 1} removed columns, not {removed.numel()}"
        )
    W, H = weight.double(), hessian.double()
    energy = ((W @ H) * W).sum()
    found = {}
    for name in FORMULAS:
        change = _compensated(name, W, H, removed, damping) - W
        found[name] = float(((change @ H) * change).sum() / energy)
    return found


def _compensated(name: str, W: Tensor, H: Tensor, removed: Tensor, damping: float) -> Tensor:
    """Return Ŵ by one way, exact zeros in the removed columns."""
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
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare the formulas on one layer of a model, on the inputs that the dense model gives it.

    Args:
        model: in memory, on any device.
        windows: calibration tokens, (samples, length) int64.
        name: of the layer, full or its end from a dot on.
        share: of the columns removed, the cheapest.
        damping: share of the mean diagonal added to the diagonal.
        on_progress: is told how many windows were run, of how many.

    Returns:
        ``layer``, ``shape``, ``removed``, ``tokens``, ``damping`` and ``errors``, as the store holds them.

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
            if on_progress is not None:
                on_progress(index + 1, len(windows))
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
