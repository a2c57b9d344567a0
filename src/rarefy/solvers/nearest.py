"""Nearest member of the set in plain weight error. Needs no data.

With an integer format this is round to nearest (RTN), with a sparse one magnitude pruning, with a
low-rank one the truncated SVD: the baseline of each family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rarefy.solvers.base import SOLVERS, Problem, Solution, Solver

if TYPE_CHECKING:
    from rarefy.formats.base import Format


@SOLVERS.register(
    "nearest",
    family="baseline",
    paper="Han et al., Learning both Weights and Connections, NeurIPS 2015 (magnitude)",
    arxiv="1506.02626",
)
@dataclass(frozen=True)
class Nearest(Solver):
    """Fit the set on the weights, project onto it."""

    def solve(self, problem: Problem, fmt: Format) -> Solution:
        """The nearest member."""
        grid = fmt.fit(problem.weight, support=problem.support)
        return Solution(grid.round(problem.weight), grid)
