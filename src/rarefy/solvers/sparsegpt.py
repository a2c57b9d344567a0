"""SparseGPT: one sweep that chooses the zeros on the way and makes up for each of them.

Paper: Frantar, Alistarh, *SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot*,
ICML 2023, arXiv 2301.00774.

    H = E[x x^T] + damping,   H^-1 = U^T U
    at the start of each chunk of columns:   prune the lowest  w_ij^2 / U_jj^2  of the live weights
    for column j:   q = w_j, zeroed where pruned (and rounded)    e = (w_j - q) / U_jj
                    W_{j+1:} -= e U_{j,j+1:}

A chunk is 128 columns with one threshold for all rows (or for each row, by the format's scope), or
the pattern's width for N:M. When the values are quantized, too, it happens in the same pass: e then
holds both errors.

Symbols: W [m, n], U [n, n] upper triangular, e [m].

Where we differ, and why:
 * ``refit`` goes on where the sweep stops: a column can make up only for those before it, so the
   kept weights are not the best ones for the final mask. A few preconditioned conjugate-gradient
   steps on ``tr((W - Q) H (W - Q)^T)``, all rows at once, come close to them for the price of as
   many products with H. (Boza, *Fast and Effective Weight Update for Pruned Large Language Models*,
   TMLR 2024, solves the same problem by ADMM.)
 * counts are exact, not off by one or by ties;
 * when H is not positive definite the damping is raised, and past the end of the ladder the matrix
   is pruned by the diagonal of H; the solution says so, it is never silent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from rarefy.solvers.base import SOLVERS, Problem, Solution, Solver
from rarefy.solvers.factor import damped_factor
from rarefy.solvers.sweep import Plan, sweep

if TYPE_CHECKING:
    from rarefy.formats.base import Format, Grid

_BLOCK = 32  # columns per lazy update


@SOLVERS.register(
    "sparsegpt",
    family="pruning",
    paper="Frantar, Alistarh, SparseGPT, ICML 2023",
    arxiv="2301.00774",
)
@dataclass(frozen=True)
class SparseGPT(Solver):
    """The OBS sweep with adaptive mask selection.

    Attributes:
        damping: share of mean(diag(H)) added to the diagonal.
        refit: steps of conjugate gradients on the kept weights after the sweep; 0 for the paper's
            algorithm.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    damping: float = 0.01
    refit: int = 0

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(f"damping must not be negative, and {self.damping} is")
        if self.refit < 0:
            raise ValueError(f"refit must not be negative, and {self.refit} is")

    def solve(self, problem: Problem, fmt: Format) -> Solution:
        """Sweep the columns in storage order; see the module's formula."""
        assert problem.gram is not None
        W, scores = problem.weight.clone(), problem.gram.diagonal()
        dead = scores == 0
        W[:, dead] = 0
        order = torch.arange(W.shape[1], device=W.device)
        U, notes = damped_factor(problem, dead, order, self.damping)
        if U is None:
            grid = fmt.fit(W, scores, problem.support)
            return Solution(grid.round(W), grid, notes)
        grid = fmt.fit(W, scores.sqrt(), problem.support)
        pivots = None
        if grid.support is not None and problem.support is None:
            # The grids of the values come from the dense weights; the sweep finds the support.
            grid = grid.within(None)
            pivots = U.diagonal().square().reciprocal()
        block = _aligned(fmt.chunk or _BLOCK)
        plan = Plan(order, scores.sqrt(), block, grid, problem.support, pivots)
        done = sweep(W, U, fmt, plan)
        if not self.refit or done.grid.support is None:
            return Solution(done.weight, done.grid, notes)
        refitted = self._refit(problem, done.weight, done.grid)
        return Solution(refitted, done.grid, notes)

    def _refit(self, problem: Problem, swept: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Lower ``tr((W - Q) H (W - Q)^T)`` over the values on the support, all rows at once.

        Values that are rounded coarsely may lose by it what the steps have won; then the sweep's
        result stays.
        """
        W, H, support = problem.weight, problem.gram, grid.support
        assert H is not None and support is not None
        H = H.clone()
        H.diagonal().add_(self.damping * H.diagonal().mean())
        tiny = torch.finfo(H.dtype).tiny
        inverse = H.diagonal().clamp(min=tiny).reciprocal()
        R = (W - swept) @ H
        before = float(torch.linalg.vecdot(W - swept, R).sum(dtype=torch.float64))
        R.mul_(support)
        Q, P = swept.clone(), R * inverse
        rho = torch.linalg.vecdot(R, P).unsqueeze(1)
        for _ in range(self.refit):
            A = (P @ H).mul_(support)
            step = rho / torch.linalg.vecdot(P, A).unsqueeze(1).clamp(min=tiny)
            Q.addcmul_(P, step)
            R.addcmul_(A, step, value=-1)
            Z = torch.mul(R, inverse, out=A)
            last, rho = rho, torch.linalg.vecdot(R, Z).unsqueeze(1)
            P.mul_(rho / last.clamp(min=tiny)).add_(Z)
        Q = grid.round(Q)
        D = W - Q
        after = float(torch.linalg.vecdot(D, D @ H).sum(dtype=torch.float64))
        return Q if after < before else swept


def _aligned(chunk: int) -> int:
    """Columns per lazy update, so that every chunk is up to date when it is chosen."""
    if chunk >= _BLOCK:
        return _BLOCK if chunk % _BLOCK == 0 else chunk
    return -(-_BLOCK // chunk) * chunk
