"""Round to nearest (RTN): every weight goes to the closest value of its grid. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rarefy.solvers.base import SOLVERS, Problem, Solution, Solver

if TYPE_CHECKING:
    from rarefy.formats.base import Format


@SOLVERS.register("nearest", family="quantization")
@dataclass(frozen=True)
class Nearest(Solver):
    """Plain rounding, the baseline of every table."""

    def solve(self, problem: Problem, fmt: Format) -> Solution:
        """Fit the grid on the weights and round."""
        grid = fmt.fit(problem.weight)
        return Solution(grid.round(problem.weight), grid)
