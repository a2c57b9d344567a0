"""GPTQ: round column by column, let the columns that follow make up for the error.

Paper: Frantar, Ashkboos, Hoefler, Alistarh, *GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers*, ICLR 2023, arXiv 2210.17323 (the sweep is Optimal Brain
Surgeon's, Hassibi and Stork 1993, in a fixed order).

    minimise  tr((W - Q) H (W - Q)^T)          H = E[x x^T] + damping
    H^-1 = U^T U,  U upper triangular
    for column j:   q = round(w_j)    e = (w_j - q) / U_jj    W_{j+1:} -= e U_{j,j+1:}

Symbols: W [m, n] weights, Q the result, H [n, n], U [n, n], E [m, n] scaled errors, O/I output and
input axes. At the end ``W - Q = E U`` and the loss is ``sum E**2``.

Where we differ, and why:
 * U comes from one Cholesky factor of H taken backwards; see ``solvers/factor.py``.
 * Grids are fitted on the live weights at the start of each group, also when a group is smaller
   than a block (the reference code reads stale ones there).
 * Activation order keeps groups together: groups by falling mean of diag(H), columns by falling
   diag(H) inside each. Storage order is untouched, so no ``g_idx`` is needed, and grids are still
   fitted live. ``static_groups`` gives the paper's free order over grids fitted beforehand.
 * When H is not positive definite the damping climbs a ladder; past its end the matrix is rounded
   to nearest, and the solution says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from rarefy.solvers.base import SOLVERS, Problem, Solution, Solver
from rarefy.solvers.factor import damped_factor
from rarefy.solvers.sweep import Plan, sweep

if TYPE_CHECKING:
    from rarefy.formats.base import Format


@SOLVERS.register(
    "gptq",
    family="quantization",
    paper="Frantar et al., GPTQ, ICLR 2023",
    arxiv="2210.17323",
)
@dataclass(frozen=True)
class GPTQ(Solver):
    """The OBS column sweep.

    Attributes:
        damping: share of mean(diag(H)) added to the diagonal.
        activation_order: visit columns of large inputs first.
        static_groups: fit every grid on the original weights before the sweep; the order of the
            columns is then free of the groups.
        block: columns per lazy update; changes speed, not the result.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    damping: float = 0.01
    activation_order: bool = True
    static_groups: bool = False
    block: int = 32

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(f"damping must not be negative, and {self.damping} is")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, not {self.block}")

    def solve(self, problem: Problem, fmt: Format) -> Solution:
        """Sweep the columns; see the module's formula."""
        assert problem.gram is not None
        W, H = problem.weight.clone(), problem.gram
        scores = H.diagonal()
        dead = scores == 0
        W[:, dead] = 0  # an input that never fires can carry no weight
        # Where a span cannot be fitted alone, all grids are fitted beforehand.
        static = self.static_groups or not fmt.spans_independent
        order = self._order(scores, None if static else fmt.span)
        factor, notes = damped_factor(problem, dead, order, self.damping)
        if factor is None:
            grid = fmt.fit(W, support=problem.support)
            return Solution(grid.round(W), grid, notes)
        # The inputs' RMS: diag(H) itself would fit the grid to outlier columns alone, whose errors
        # the sweep makes up for anyway.
        importance = scores.sqrt()
        fixed = fmt.fit(W, importance, problem.support) if static else None
        plan = Plan(order, importance, self.block, fixed, problem.support)
        done = sweep(W, factor, fmt, plan)
        return Solution(done.weight, done.grid, notes)

    def _order(self, scores: torch.Tensor, span: int | None) -> torch.Tensor:
        """Column order [n] of the sweep, as indices into storage order."""
        n = scores.numel()
        if not self.activation_order:
            return torch.arange(n, device=scores.device)
        if span is None:
            return scores.argsort(descending=True, stable=True)
        groups = [
            torch.arange(a, min(a + span, n), device=scores.device) for a in range(0, n, span)
        ]
        groups.sort(key=lambda group: -float(scores[group].mean()))
        inside = [group[scores[group].argsort(descending=True, stable=True)] for group in groups]
        return torch.cat(inside)
