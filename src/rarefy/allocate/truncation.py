"""Ranks where they lower the error most: each matrix's next singular value, per parameter.

Source: after the dynamic ratios of Wang et al., *SVD-LLM V2*, NAACL 2025, arXiv 2503.12340, which
also share a parameter budget out by the truncation loss; here greedily, value by value.

    sigma: singular values of W L, H = E[x x^T] = L L^T in the dense model
    loss of rank k:  sum_{i > k} sigma_i^2 / sum_i sigma_i^2       (relative output error)
    one more rank costs m + n parameters and gains  sigma_{k+1}^2 / sum sigma^2

Gains fall along each matrix, so taking the largest gain per parameter until the budget is spent is
best possible up to the last unit.

Symbols: W [m, n], k rank, mn / (m + n) the rank at which two factors save nothing.

From ranks to densities: rank k is the density ``k (m + n) / mn``, of which a format keeps
``floor(density mn / (m + n))``. What is left of the budget is less than one unit of any matrix
that could still grow; it is spread over all of them as fractions of a unit, which change no rank,
so that the densities add up to the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor
from typing import TYPE_CHECKING, ClassVar

import torch

from rarefy.allocate.base import ALLOCATORS, DensityAllocator, Matrix, Share
from rarefy.allocate.budget import budget_of
from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@ALLOCATORS.register(
    "truncation",
    family="low-rank",
    paper="Wang et al., SVD-LLM V2, NAACL 2025",
    arxiv="2503.12340",
)
@dataclass(frozen=True)
class Truncation(DensityAllocator):
    """Ranks by truncation loss per parameter.

    Attributes:
        least: no matrix gets less than this share of the rank that it would have if all were
            treated alike.

    Raises:
        ValueError: ``least`` outside [0, 1].
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    least: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.least <= 1:
            raise ValueError(f"least must lie in [0, 1], and {self.least} does not")

    def measure(self, block: Mapping[str, Matrix]) -> dict[str, torch.Tensor]:
        """Relative squared singular values in the metric of the output, descending."""
        return {path: _energies(matrix).cpu() for path, matrix in block.items()}

    def spread(
        self,
        measures: Sequence[Mapping[str, torch.Tensor]],
        shares: Sequence[Mapping[str, Share]],
    ) -> list[dict[str, float]]:
        """Take units of rank by falling gain per parameter."""
        keys = [(b, path) for b, block in enumerate(shares) for path in block]
        table = [shares[b][path] for b, path in keys]
        gains = [measures[b][path].double() for b, path in keys]
        ranks, left = self._ranks(gains, table, budget_of(shares))
        room = [_room(share, rank) for share, rank in zip(table, ranks, strict=True)]
        part = left / sum(room)
        out: list[dict[str, float]] = [{} for _ in shares]
        for (b, path), share, rank, free in zip(keys, table, ranks, room, strict=True):
            spent = rank * (share.rows + share.columns) + part * free
            out[b][path] = spent / share.weights
        return out

    def _ranks(
        self, gains: list[torch.Tensor], table: list[Share], budget: float
    ) -> tuple[list[int], float]:
        """The rank of each matrix, and what is left of the budget.

        Raises:
            RarefyError: not even one rank for each matrix is within the budget.
        """
        costs = [share.rows + share.columns for share in table]
        caps = [_cap(share) for share in table]
        ranks = [
            min(cap, max(1, floor(self.least * _uniform(share))))
            for cap, share in zip(caps, table, strict=True)
        ]
        left = budget - sum(r * c for r, c in zip(ranks, costs, strict=True))
        if left < -1e-6 * budget:
            raise RarefyError(
                "the recipe leaves less than one rank for each matrix; give a larger ratio"
            )
        units = [
            (-float(gain) / costs[i], i)
            for i, values in enumerate(gains)
            for gain in values[ranks[i] : caps[i]]
        ]
        for _, i in sorted(units):
            # A matrix whose next unit is too dear has no cheaper one: its ranks stay a prefix.
            if costs[i] <= left + 1e-6:
                ranks[i] += 1
                left -= costs[i]
        return ranks, max(0.0, left)


def _uniform(share: Share) -> int:
    """The rank at the share's own density."""
    weights = share.rows * share.columns
    return max(1, floor(share.density * weights / (share.rows + share.columns) + 1e-9))


def _cap(share: Share) -> int:
    """The largest rank that saves parameters."""
    return max(1, ceil(share.weights / (share.rows + share.columns)) - 1)


def _room(share: Share, rank: int) -> float:
    """Parameters that may be added without a further rank, and without saving nothing."""
    unit = share.rows + share.columns
    return min(unit, share.weights - rank * unit)


def _energies(matrix: Matrix) -> torch.Tensor:
    """``sigma^2 / sum sigma^2`` of ``W L``, descending, float64 [min(m, n)]."""
    assert matrix.gram is not None
    W, H = matrix.weight.double(), matrix.gram.double()
    if W.shape[0] <= W.shape[1]:
        product = W @ H @ W.T
    else:
        values, vectors = torch.linalg.eigh(H)  # any L with L L^T = H has the same spectrum
        A = W @ (vectors * values.clamp(min=0).sqrt())
        product = A.T @ A
    energies: torch.Tensor = torch.linalg.eigvalsh(product).clamp(min=0).flip(0)
    return energies / energies.sum().clamp(min=torch.finfo(energies.dtype).tiny)
