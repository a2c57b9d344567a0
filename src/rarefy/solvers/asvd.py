"""ASVD: truncate the decomposition of a matrix whose columns are scaled by their inputs' size.

Paper: Yuan, Shang, Song, Wu, Yan, Sun, *ASVD: Activation-aware Singular Value Decomposition for
Compressing Large Language Models*, arXiv 2312.05821.

    D_j = (mean_t |x_tj|)^alpha + 1e-6        W D = U S V^T        W' = U_k S_k V_k^T D^-1

This is the nearest member in the metric ``D^2``.

Where we differ, and why: the decomposition is exact, where the reference code's randomised one is
inaccurate at these ranks; means run over all tokens, not over one sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rarefy.solvers.base import SOLVERS, Problem, Solution, Solver

if TYPE_CHECKING:
    from rarefy.formats.base import Format


@SOLVERS.register(
    "asvd",
    family="low-rank",
    paper="Yuan et al., ASVD, 2023",
    arxiv="2312.05821",
)
@dataclass(frozen=True)
class ASVD(Solver):
    """Projection with columns weighted by a power of their inputs' mean size.

    Attributes:
        alpha: the power; the paper's 0.5.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"moments"})

    alpha: float = 0.5

    def solve(self, problem: Problem, fmt: Format) -> Solution:
        """Project in the metric ``D^2``."""
        assert problem.moments is not None
        D = problem.moments.size**self.alpha + 1e-6
        grid = fmt.fit(problem.weight, D.square(), problem.support)
        return Solution(grid.round(problem.weight), grid)
