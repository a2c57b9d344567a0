"""Nearest member in the metric of the layer's output: with a low-rank format, SVD-LLM.

Paper: Wang, Zheng, Wan, Zhang, *SVD-LLM: Truncation-aware Singular Value Decomposition for Large
Language Model Compression*, ICLR 2025, arXiv 2403.07378.

    H = E[x x^T] = L L^T (Cholesky, fp64)     W L = U S V^T      W' = U_k S_k V_k^T L^-1
    E |W x - W' x|^2 = sum of the dropped s_i^2

Where we differ, and why: ``L`` is applied by a triangular solve, not inverted; real shapes are
used for grouped-query attention; the metric belongs to the solver and the truncation to the
format, so the same solver serves any format that can use a full metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rarefy.solvers.base import SOLVERS, Problem, Solution, Solver

if TYPE_CHECKING:
    from rarefy.formats.base import Format


@SOLVERS.register(
    "svd-llm",
    family="low-rank",
    paper="Wang et al., SVD-LLM, ICLR 2025",
    arxiv="2403.07378",
)
@dataclass(frozen=True)
class Whitened(Solver):
    """Projection in the metric ``E[x x^T]``."""

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def solve(self, problem: Problem, fmt: Format) -> Solution:
        """Project in the full metric."""
        grid = fmt.fit(problem.weight, problem.gram, problem.support)
        return Solution(grid.round(problem.weight), grid)
