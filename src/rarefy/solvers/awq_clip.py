"""AWQ's clipping: cut the largest weights of a group when its finer grid is worth more.

Paper: Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han, *AWQ: Activation-aware Weight
Quantization for LLM Compression and Acceleration*, MLSys 2024, arXiv 2306.00978 (in its reference
code; the scaling itself is ``transforms/awq.py``).

    for every row and group g:   c = p max|w_g|                    p in {1, 0.95, ..., 0.55}
        p* = argmin  e H_gg e^T       e = w_g - Q(clamp(w_g, -c, c))

Symbols: w_g [1, k] the weights of a row in a group of columns, H_gg [k, k] that block of
``H = E[x x^T]``: the objective is the squared error of the group's partial product, per token.

Where we differ, and why:
 * The error is exact over all calibration tokens, by way of H; the reference code runs over at
   most 512 tokens, for the sake of its memory.
 * Inputs are those of the model as compressed so far. The reference code takes the dense model's.
 * The reference code does not clip query and key projections. A solver cannot see names: a recipe
   that wants this gives them to the solver ``nearest`` in a stage of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from rarefy.errors import RarefyError
from rarefy.solvers.base import SOLVERS, Problem, Solution, Solver

if TYPE_CHECKING:
    from rarefy.formats.base import Format

_SHRINKS = tuple(1 - i / 20 for i in range(10))


@SOLVERS.register(
    "awq-clip",
    family="quantization",
    paper="Lin et al., AWQ, MLSys 2024",
    arxiv="2306.00978",
)
@dataclass(frozen=True)
class AWQClip(Solver):
    """Round to nearest after clipping each group where it lowers the group's output error."""

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def solve(self, problem: Problem, fmt: Format) -> Solution:
        """Search the clip of every row and group, then fit and round.

        Raises:
            RarefyError: the format's groups are not independent of one another.
        """
        if not (fmt.rows_independent and fmt.spans_independent):
            raise RarefyError(
                f"awq-clip shrinks the range of every group, and {fmt.label()} has no such ranges; "
                "give it an integer format, or choose another solver"
            )
        assert problem.gram is not None
        W, H = problem.weight, problem.gram
        clipped = torch.empty_like(W)
        span = fmt.span or W.shape[1]
        for a in range(0, W.shape[1], span):
            g = slice(a, a + span)
            support = None if problem.support is None else problem.support[:, g]
            clipped[:, g] = _clip(W[:, g], H[g, g], fmt, support)
        grid = fmt.fit(clipped, support=problem.support)
        return Solution(grid.round(clipped), grid)


def _clip(
    w: torch.Tensor, H: torch.Tensor, fmt: Format, support: torch.Tensor | None
) -> torch.Tensor:
    """The weights of one group [m, k], each row clamped to the range of least error."""
    peak = w.abs().amax(1, keepdim=True)
    best = w.clone()
    least = torch.full_like(peak, torch.inf)
    for p in _SHRINKS:
        trial = w.clamp(-p * peak, p * peak)
        e = w - fmt.fit(trial, support=support).round(trial)
        error = ((e @ H) * e).sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, trial, best)
    return best
