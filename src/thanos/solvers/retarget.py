"""Dense targets: fit a layer to outputs of the dense model, by any method with any pattern (docs/math.md, equation D).

X̂, (a, b), are the layer's inputs in the model pruned so far, and X* its inputs in the dense model, for the same tokens. If the
layer writes into the residual stream, r̂ and r*, (a, c), are the residual stream that its outputs are added to. The wanted
output is a mixture of the dense weights' output on the present input and of the dense model's output:

    Y = X̂ Wᵀ + α (X* Wᵀ + r* − r̂ − X̂ Wᵀ).

For every Ŵ, ‖Y − X̂ Ŵᵀ‖² + λ‖Ŵ − W‖² and tr((Ŵ − W̃) H (Ŵ − W̃)ᵀ) differ by a constant. So a method that gets W̃ in place of W,
and the same H, fits the layer to Y.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from thanos.solvers.hessian import Factor
from thanos.solvers.problem import Problem


def dense_target(
    weight: Tensor, hessian: Tensor, cross: Tensor, residual: Tensor | None, factor: Factor, alpha: float
) -> Tensor:
    """Return the shifted weight W̃ = W + α (W (C − X̂ᵀX̂) + R) H⁻¹, (c, b).

    All products must have the same positive factor.

    Args:
        weight: W, (c, b).
        hessian: X̂ᵀX̂, (b, b), without damping.
        cross: C = X*ᵀX̂, (b, b): C_ij = Σ x*_i x̂_j over the tokens.
        residual: R = (r* − r̂)ᵀX̂, (c, b); None if the layer does not write into the residual stream.
        factor: the factor of the damped Hessian: H⁻¹ = UᵀU.
        alpha: α, the fraction of the dense model's outputs.
    """
    pull = weight @ (cross - hessian)
    if residual is not None:
        pull += residual
    return weight + (pull @ factor.upper.T @ factor.upper).mul_(alpha)


@dataclass(frozen=True)
class DenseTarget:
    """A retarget: replaces the problem's weight by :func:`dense_target`. Zeros of the original weight stay zeros.

    Attributes:
        alpha: α in [0, 1]; with 0 the problem is returned as it is.
        cross: C = X*ᵀX̂, (b, b), with the positive factor that the Hessian was given with.
        residual: R = (r* − r̂)ᵀX̂, (c, b), of all rows of the layer, with the same factor; None for a layer that does not write
            into the residual stream.
    """

    alpha: float
    cross: Tensor
    residual: Tensor | None = None

    def __call__(self, problem: Problem) -> Problem:
        """See :data:`~thanos.solvers.problem.Retarget`."""
        if self.alpha == 0:
            return problem
        inputs, factor = problem.inputs, problem.factor
        assert inputs is not None
        assert factor is not None
        residual = self.residual
        if residual is not None:
            residual = inputs.scaled(residual if problem.rows is None else residual[problem.rows])
            residual = residual if problem.unit == 1 else residual / problem.unit
        cross = inputs.scaled(self.cross)
        weight = dense_target(problem.weight, inputs.matrix, cross, residual, factor, self.alpha)
        count = len(weight) if problem.all_rows is None else len(problem.all_rows)
        return replace(problem, weight=weight, all_rows=problem.row_shards.gather(weight, count))
