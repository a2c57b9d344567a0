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

from rarefy.resources import single_threaded
from rarefy.solvers.base import SOLVERS, Problem, Solution, Solver
from rarefy.solvers.factor import inverse_factor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rarefy.formats.base import Format, Grid


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

    needs_gram: ClassVar[bool] = True

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
        order = self._order(scores, fmt.span)
        factor, notes = self._factor(H, dead, order, problem.name)
        if factor is None:
            grid = fmt.fit(W)
            return Solution(grid.round(W), grid, notes)
        # The inputs' RMS: diag(H) itself would fit the grid to outlier columns alone, whose errors
        # the sweep makes up for anyway.
        importance = scores.sqrt()
        fixed = fmt.fit(W, importance) if self.static_groups else None
        Q, grid = _sweep(W, factor, fmt, _Plan(order, importance, self.block, fixed))
        return Solution(Q, grid, notes)

    def _order(self, scores: torch.Tensor, span: int | None) -> torch.Tensor:
        """Column order [n] of the sweep, as indices into storage order."""
        n = scores.numel()
        if not self.activation_order:
            return torch.arange(n, device=scores.device)
        if self.static_groups or span is None:
            return scores.argsort(descending=True, stable=True)
        groups = [
            torch.arange(a, min(a + span, n), device=scores.device) for a in range(0, n, span)
        ]
        groups.sort(key=lambda group: -float(scores[group].mean()))
        inside = [group[scores[group].argsort(descending=True, stable=True)] for group in groups]
        return torch.cat(inside)

    def _factor(
        self, H: torch.Tensor, dead: torch.Tensor, order: torch.Tensor, name: str
    ) -> tuple[torch.Tensor | None, tuple[str, ...]]:
        """U [n, n] of the damped, permuted H, climbing the ladder of dampings."""
        mean = float(H.diagonal()[~dead].mean()) if not bool(dead.all()) else 1.0
        notes: tuple[str, ...] = ()
        for damping in sorted({self.damping, *(d for d in (0.1, 1.0) if d > self.damping)}):
            U = inverse_factor(H, dead, order, damping * mean)
            if U is not None:
                return U, notes
            notes = (
                f"the Hessian of {name} is not positive definite at damping {damping:g}; "
                "damping was raised",
            )
        return None, (
            f"the Hessian of {name} is not positive definite even at damping 1; "
            "the matrix was rounded to nearest",
        )


@dataclass(frozen=True)
class _Plan:
    """How the sweep visits the columns.

    Attributes:
        order: storage index of each visited column, [n].
        importance: weight of each column's rounding error for grid rules, in storage order, [n].
        block: columns per lazy update.
        fixed: grid fitted beforehand, or None to fit live.
    """

    order: torch.Tensor
    importance: torch.Tensor
    block: int
    fixed: Grid | None

    def blocks(self, span: int | None) -> Iterator[tuple[int, int, bool]]:
        """(first, past, starts a group) of each lazy block; blocks do not cross groups.

        Within one group the positions of the sweep are exactly the group's columns, because
        activation order keeps groups together (with a fixed grid any partition will do).
        """
        n = len(self.order)
        position = 0
        while position < n:
            storage = int(self.order[position])
            size = n if span is None or self.fixed is not None else span
            end = position + min(size, n - (storage // size) * size)
            starts = True
            while position < end:
                past = min(position + self.block, end)
                yield position, past, starts
                position, starts = past, False


def _sweep(W: torch.Tensor, U: torch.Tensor, fmt: Format, plan: _Plan) -> tuple[torch.Tensor, Grid]:
    """Round the columns of W [m, n] in the plan's order; return Q [m, n] and its grid."""
    n = W.shape[1]
    span = fmt.span or n
    R = W.T[plan.order].contiguous()  # live weights by sweep position: rows are columns of W
    Q = torch.empty_like(R)
    storage = plan.order.tolist()
    pivots = U.diagonal().tolist()
    fitted: dict[int, Grid] = {}
    for a, b, starts in plan.blocks(fmt.span):
        group = storage[a] // span
        if starts and plan.fixed is None:
            fitted[group] = _fit_live(R, storage[a], fmt, plan, a)
        E = torch.empty_like(R[a:b])
        grid, first = (fitted[group], group * span) if plan.fixed is None else (plan.fixed, 0)
        with single_threaded():
            for j in range(a, b):
                w = R[j]
                q = grid.round(w.unsqueeze(1), storage[j] - first).squeeze(1)
                Q[j] = q
                e = torch.sub(w, q, out=E[j - a]).div_(pivots[j])
                if j + 1 < b:
                    R[j + 1 : b].addr_(U[j, j + 1 : b], e, alpha=-1)
        if b < n:
            R[b:].addmm_(U[a:b, b:].T, E, alpha=-1)
    result = torch.empty_like(W)
    result[:, plan.order] = Q.T
    if plan.fixed is not None:
        return result, plan.fixed
    parts = [fitted[group] for group in sorted(fitted)]
    return result, type(parts[0]).join(parts)


def _fit_live(R: torch.Tensor, column: int, fmt: Format, plan: _Plan, position: int) -> Grid:
    """Fit the grid of the group that starts at a sweep position, on the live weights."""
    n = R.shape[0]
    span = fmt.span or n
    first = column // span * span
    size = min(span, n - first)
    inside = plan.order[position : position + size] - first
    live = torch.empty_like(R[:size])
    live[inside] = R[position : position + size]
    return fmt.fit(live.T, plan.importance[first : first + size])
