"""The column sweep of Optimal Brain Surgeon, shared by GPTQ and SparseGPT.

    H^-1 = U^T U,  U upper triangular
    for column j:   q = member(w_j)    e = (w_j - q) / U_jj    W_{j+1:} -= e U_{j,j+1:}

At the end ``W - Q = E U`` and ``tr((W - Q) H (W - Q)^T) = sum E**2``, whatever ``member`` does.

Symbols: W [m, n] weights, Q the result, U [n, n], E [m, n] scaled errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rarefy.resources import single_threaded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rarefy.formats.base import Format, Grid


@dataclass(frozen=True)
class Plan:
    """How the sweep visits the columns.

    Attributes:
        order: storage index of each visited column, [n].
        importance: weight of each column's rounding error for grid rules, in storage order, [n].
        block: columns per lazy update; changes speed, not the result. A multiple or a divisor of
            the chunk where a support is chosen, so that all of the chunk is live by then.
        fixed: grid fitted beforehand, or None to fit each span on the live weights.
        support: bool [m, n], imposed by an earlier stage.
        pivots: weight of each column's squared weight when the support is chosen chunk by chunk on
            the live weights, [n]; None when it is not to be chosen. Needs ``fixed`` and the
            columns in storage order.
    """

    order: torch.Tensor
    importance: torch.Tensor
    block: int
    fixed: Grid | None = None
    support: torch.Tensor | None = None
    pivots: torch.Tensor | None = None

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


@dataclass(frozen=True)
class Swept:
    """What a sweep leaves.

    Attributes:
        weight: Q [m, n]. grid: that every value of it lies on.
        energy: ``sum E**2``, the loss in the damped metric.
    """

    weight: torch.Tensor
    grid: Grid
    energy: float


class _Columns:
    """Rounds one column after the other: on grids fitted before or on the way, and on a support."""

    def __init__(self, R: torch.Tensor, fmt: Format, plan: Plan) -> None:
        self.R, self.fmt, self.plan = R, fmt, plan
        self.span = fmt.span or R.shape[0]
        self.storage = plan.order.tolist()
        self.fitted: dict[int, Grid] = {}
        choosing = plan.pivots is not None
        self.mask = torch.zeros_like(R, dtype=torch.bool).T if choosing else None  # [m, n]
        self.chunk = fmt.chunk or 1
        self.kept = torch.empty(0)  # the current chunk's mask as numbers, [chunk, m]

    def enter_group(self, position: int) -> None:
        """Fit the grid of the group that starts at a sweep position, on the live weights."""
        if self.plan.fixed is not None:
            return
        column = self.storage[position]
        first = column // self.span * self.span
        size = min(self.span, len(self.storage) - first)
        inside = self.plan.order[position : position + size] - first
        live = torch.empty_like(self.R[:size])
        live[inside] = self.R[position : position + size]
        spanned = slice(first, first + size)
        support = None if self.plan.support is None else self.plan.support[:, spanned]
        self.fitted[first] = self.fmt.fit(live.T, self.plan.importance[spanned], support)

    def round(self, position: int) -> torch.Tensor:
        """The member nearest to the live column at a sweep position, [m]."""
        column = self.storage[position]
        grid, first = self.plan.fixed, 0
        if grid is None:
            first = column // self.span * self.span
            grid = self.fitted[first]
        q = grid.round(self.R[position].unsqueeze(1), column - first).squeeze(1)
        if self.mask is None:
            return q
        place = column % self.chunk
        if place == 0:
            self._choose(column, min(column + self.chunk, len(self.storage)))
        # A product takes a fifth of the time of masking; the swept values are finite.
        return q * self.kept[place]

    def _choose(self, first: int, past: int) -> None:
        assert self.mask is not None and self.plan.pivots is not None
        live, pivots = self.R[first:past].T, self.plan.pivots[first:past]
        chosen = self.fmt.choose(live, first, pivots)
        self.mask[:, first:past] = chosen
        self.kept = chosen.T.to(self.R.dtype, memory_format=torch.contiguous_format)

    def grid(self) -> Grid:
        """The grid of the whole matrix."""
        if self.plan.fixed is not None:
            return (
                self.plan.fixed
                if self.mask is None
                else self.plan.fixed.within(self.mask.contiguous())
            )
        parts = [self.fitted[first] for first in sorted(self.fitted)]
        return type(parts[0]).join(parts)


def sweep(W: torch.Tensor, U: torch.Tensor, fmt: Format, plan: Plan) -> Swept:
    """Round the columns of W [m, n] in the plan's order, each making up for those before it.

    W is overwritten by the result: for a wide layer every copy saved is a large part of the peak.
    """
    n = W.shape[1]
    # Live weights by sweep position: rows are columns of W. A visited row holds its result.
    R = W.T[plan.order].contiguous()
    columns = _Columns(R, fmt, plan)
    pivots = U.diagonal().tolist()
    energy = 0.0
    for a, b, starts in plan.blocks(fmt.span):
        if starts:
            columns.enter_group(a)
        E = torch.empty_like(R[a:b])
        with single_threaded():
            for j in range(a, b):
                q = columns.round(j)
                e = torch.sub(R[j], q, out=E[j - a]).div_(pivots[j])
                R[j] = q
                if j + 1 < b:
                    R[j + 1 : b].addr_(U[j, j + 1 : b], e, alpha=-1)
            energy += float(E.square().sum())
        if b < n:
            R[b:].addmm_(U[a:b, b:].T, E, alpha=-1)
    W[:, plan.order] = R.T
    return Swept(W, columns.grid(), energy)
