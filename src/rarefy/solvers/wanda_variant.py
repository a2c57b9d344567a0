"""Wanda's variant: every row gives up the same share of its score, not of its weights.

Paper: Sun, Liu, Bair, Kolter, *A Simple and Effective Pruning Approach for Large Language Models*,
ICLR 2024, arXiv 2306.11695; the variant is in the authors' code.

    S_ij = |W_ij| ||X_j||_2, each row sorted from the smallest on
    prune the longest prefix whose sum is at most  alpha * sum_j S_ij
    alpha: one number a matrix, by bisection, such that the matrix has the wanted sparsity

Symbols: W [m, n], S [m, n], alpha in [0, 1].

Where we differ, and why:
 * alpha is sought in [0, 1] instead of [0, 0.8], which cannot reach very sparse matrices;
 * a row whose smallest weight exceeds its allowance loses nothing, where the reference code's
   index -1 would take the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from rarefy.errors import RarefyError
from rarefy.solvers.base import SOLVERS, Problem, Solution, Solver

if TYPE_CHECKING:
    from rarefy.formats.base import Format


@SOLVERS.register(
    "wanda-variant",
    family="pruning",
    paper="Sun et al., Wanda, ICLR 2024",
    arxiv="2306.11695",
)
@dataclass(frozen=True)
class WandaVariant(Solver):
    """Prune each row by its cumulative Wanda score; rows keep different numbers of weights.

    Attributes:
        tolerance: how far the sparsity of a matrix may be from the wanted one.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"moments"})

    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must lie in (0, 1), and {self.tolerance} does not")

    def solve(self, problem: Problem, fmt: Format) -> Solution:
        """Find alpha and keep what is beyond each row's prefix.

        Raises:
            RarefyError: the format fixes how many weights a row or a matrix keeps.
        """
        assert problem.moments is not None
        W, square = problem.weight, problem.moments.square
        scores = W.abs() * square.sqrt()
        if problem.support is not None:
            scores = scores.masked_fill(~problem.support, 0)
        mask = _kept(scores, 1 - fmt.density, self.tolerance)
        grid = fmt.fit(W, square, mask)
        if grid.support is None or not torch.equal(grid.support, mask):
            raise RarefyError(
                f"wanda-variant keeps another number of weights in every row, which "
                f"{fmt.label()} cannot hold; give a sparse format of scope 'free'"
            )
        return Solution(grid.round(W), grid)


def _kept(scores: torch.Tensor, sparsity: float, tolerance: float) -> torch.Tensor:
    """Mask [m, n] of the weights beyond each row's prefix, at about the given sparsity."""
    ascending, order = scores.double().sort(dim=1, stable=True)
    mass = ascending.cumsum(1)
    mass /= mass[:, -1:].clamp(min=torch.finfo(mass.dtype).tiny)
    low, high, alpha = 0.0, 1.0, 0.5
    while True:
        at = torch.full_like(mass[:, :1], alpha)
        length = torch.searchsorted(mass, at, right=True)  # [m, 1]
        reached = float(length.sum()) / scores.numel()
        if abs(reached - sparsity) < tolerance or high - low < 1e-9:
            break
        low, high = (alpha, high) if reached < sparsity else (low, alpha)
        alpha = (low + high) / 2
    beyond = torch.arange(scores.shape[1], device=scores.device) >= length
    return torch.zeros_like(beyond).scatter_(1, order, beyond)
