"""Methods that rank the weights once and do not touch the survivors: magnitude and Wanda."""

from __future__ import annotations

import torch

from thanos.patterns.base import Pattern
from thanos.solvers.cost import Size
from thanos.solvers.problem import Problem, Solution


def magnitude(problem: Problem) -> Solution:
    """Remove the smallest |W| of the layer (Han et al., 2015); columns by their summed |W|."""
    return problem.without(problem.choose(torch.abs))


def wanda(problem: Problem) -> Solution:
    """Remove the smallest |W_ij|·‖X_j‖₂ of each output row (Sun et al., 2023); columns by their summed score."""
    return problem.without(problem.choose(lambda weight: weight.abs() * problem.norms, by_row=True))


def magnitude_bytes(pattern: Pattern, size: Size) -> int:
    """Return the bytes that choosing by magnitude holds: the result, its mask and the change of the weight."""
    del pattern
    return (4 + 1 + 4) * size.entries + size.image_bytes
