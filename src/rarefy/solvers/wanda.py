"""Wanda: keep the weights of largest |w| times the norm of their input; change none of them.

Paper: Sun, Liu, Bair, Kolter, *A Simple and Effective Pruning Approach for Large Language Models*,
ICLR 2024, arXiv 2306.11695.

    score_ij = |W_ij| ||X_j||_2            compared within each output row (or N:M pattern)

This is the nearest member of a sparse set when column j's squared error counts ``E[x_j^2]`` times:
the metric of the layer's output error without the correlations between inputs. So the solver is a
projection in that metric, and an integer format may be given to it just as well.

Where we differ, and why: nothing but exact counts, floor(s n) zeros in every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rarefy.solvers.base import SOLVERS, Problem, Solution, Solver

if TYPE_CHECKING:
    from rarefy.formats.base import Format


@SOLVERS.register(
    "wanda",
    family="pruning",
    paper="Sun et al., Wanda, ICLR 2024",
    arxiv="2306.11695",
)
@dataclass(frozen=True)
class Wanda(Solver):
    """Nearest member with columns weighted by the second moment of their input."""

    needs: ClassVar[frozenset[str]] = frozenset({"moments"})

    def solve(self, problem: Problem, fmt: Format) -> Solution:
        """Project in the metric ``diag(E[x^2])``."""
        assert problem.moments is not None
        grid = fmt.fit(problem.weight, problem.moments.square, problem.support)
        return Solution(grid.round(problem.weight), grid)
