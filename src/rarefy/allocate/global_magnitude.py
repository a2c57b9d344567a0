"""One threshold for the whole model: each matrix keeps what is larger in size.

Paper: Han, Pool, Tran, Dally, *Learning both Weights and Connections for Efficient Neural
Networks*, NeurIPS 2015, arXiv 1506.02626 (the scope "global" of magnitude pruning).

    density_i = share of |W_i| above tau         tau: such that the model keeps its budget

Precision: sizes are counted by the upper bits of their float32 pattern, in 1024 bins an octave.
For weights stored in 16 bits a bin holds one value, and densities are exact up to ties; for fp32
each is right up to the share of its matrix's weights that lie within 0.1 % of the threshold.
Whatever lies in the threshold's bin is kept in the same proportion everywhere, so the budget is
met.

A matrix that would keep less than 1 % of its weights keeps 1 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rarefy.allocate.base import ALLOCATORS, DensityAllocator, Matrix, Share
from rarefy.allocate.budget import budget_of, meet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_DROPPED = 13  # lower bits of a float32 pattern; ten of the mantissa remain
_BINS = 1 << (31 - _DROPPED)


@ALLOCATORS.register(
    "global-magnitude",
    family="pruning",
    paper="Han et al., Learning both Weights and Connections, NeurIPS 2015",
    arxiv="1506.02626",
)
@dataclass(frozen=True)
class GlobalMagnitude(DensityAllocator):
    """Densities of one magnitude threshold over all matrices; needs no data."""

    def measure(self, block: Mapping[str, Matrix]) -> dict[str, torch.Tensor]:
        """Occupied bins of each matrix and how many weights they hold, int32 [2, bins]."""
        return {path: _histogram(matrix.weight) for path, matrix in block.items()}

    def spread(
        self,
        measures: Sequence[Mapping[str, torch.Tensor]],
        shares: Sequence[Mapping[str, Share]],
    ) -> list[dict[str, float]]:
        """Lower the threshold until the budget is spent."""
        keys = [(b, path) for b, block in enumerate(shares) for path in block]
        sizes = torch.tensor([shares[b][path].weights for b, path in keys], dtype=torch.float64)
        kept = _Kept([measures[b][path] for b, path in keys])
        met = meet(sizes, budget_of(shares), lambda t: kept(t) / sizes, 0.0, float(sizes.sum()))
        out: list[dict[str, float]] = [{} for _ in shares]
        for (b, path), density in zip(keys, met.tolist(), strict=True):
            out[b][path] = density
        return out


class _Kept:
    """How many weights of each matrix are among the t largest of all.

    Bins are taken from the largest sizes on, the last of them in part.

    Args:
        histograms: as measured.
    """

    def __init__(self, histograms: list[torch.Tensor]) -> None:
        bins = torch.cat([h[0] for h in histograms]).unique().flip(0)  # type: ignore[no-untyped-call]
        counts = torch.zeros(len(histograms), len(bins) + 1, dtype=torch.float64)
        for row, (where, many) in zip(counts, histograms, strict=True):
            row[1 + torch.searchsorted(-bins, -where)] = many.double()
        self._above = counts.cumsum(1)  # column i: weights in the first i bins
        self._total = self._above.sum(0)

    def __call__(self, t: float) -> torch.Tensor:
        bins = len(self._total) - 1
        t_ = torch.tensor(t, dtype=torch.float64)
        i = min(int(torch.searchsorted(self._total[1:], t_)), bins - 1)
        share = float((t_ - self._total[i]) / (self._total[i + 1] - self._total[i]))
        return torch.lerp(self._above[:, i], self._above[:, i + 1], min(1.0, share))


def _histogram(weight: torch.Tensor) -> torch.Tensor:
    """Occupied bins, ascending, and their contents: int32 [2, bins]."""
    # The pattern of a non-negative float, read as an integer, grows with the number.
    pattern = weight.float().abs().contiguous().view(torch.int32) >> _DROPPED
    counts = torch.bincount(pattern.flatten(), minlength=_BINS).cpu()
    occupied = counts.nonzero().flatten()
    return torch.stack([occupied, counts[occupied]]).to(torch.int32)
