"""OWL: blocks with more outliers keep more weights.

Paper: Yin, Wu, Zhang, Hsieh, Wang, Jia, Li, Liang, Pechenizkiy, Wang, Liu, *Outlier Weighed
Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity*, ICML 2024,
arXiv 2310.05175.

    A = |W_ij| ||X_j|| of all matrices of block b         D_b = share of A above M mean(A)
    density_b = 2 lambda (D_b - D_min) / (D_max - D_min) + t

t meets the budget. Every matrix of a block gets the block's density, and the densest block keeps
2 lambda more than the sparsest one.

Symbols: W [m, n], X inputs in the dense model, M times the mean makes an outlier.

Where we differ, and why: the mean density is weighted by the sizes of the blocks, so that the
budget is met for unequal ones, too; densities are cut at 0.01 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from rarefy.allocate.base import ALLOCATORS, DensityAllocator, Matrix, Share
from rarefy.allocate.budget import block_sizes, budget_of, by_block, meet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@ALLOCATORS.register(
    "owl",
    family="pruning",
    paper="Yin et al., OWL, ICML 2024",
    arxiv="2310.05175",
)
@dataclass(frozen=True)
class OWL(DensityAllocator):
    """Density by the share of outliers.

    Attributes:
        outlier: M, how many times the block's mean score makes an outlier.
        lam: lambda, half the difference between the densest and the sparsest block.

    Raises:
        ValueError: a field that is not positive.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"moments"})

    outlier: float = 5.0
    lam: float = 0.08

    def __post_init__(self) -> None:
        if self.outlier <= 0 or not 0 < self.lam <= 0.5:
            raise ValueError("outlier must be positive, and lam must lie in (0, 0.5]")

    def measure(self, block: Mapping[str, Matrix]) -> dict[str, torch.Tensor]:
        """Number of outliers of each matrix; what an outlier is depends on the whole block."""
        scores = {path: _scores(matrix) for path, matrix in block.items()}
        total = sum(float(A.sum(dtype=torch.float64)) for A in scores.values())
        mean = total / max(1, sum(A.numel() for A in scores.values()))
        return {path: A.gt(self.outlier * mean).sum().cpu() for path, A in scores.items()}

    def spread(
        self,
        measures: Sequence[Mapping[str, torch.Tensor]],
        shares: Sequence[Mapping[str, Share]],
    ) -> list[dict[str, float]]:
        """Density in proportion to the share of outliers; see the module's formula."""
        sizes = block_sizes(shares)
        used = sizes > 0
        counts = [float(sum(int(count) for count in block.values())) for block in measures]
        D = torch.tensor(counts, dtype=torch.float64)[used] / sizes[used]
        low, high = D.min(), D.max()
        offset = torch.zeros_like(D)
        if high > low:
            offset = 2 * self.lam * (D - low) / (high - low)
        met = meet(sizes[used], budget_of(shares), lambda t: offset + t, -1.0, 1.0)
        return by_block(met, shares)


def _scores(matrix: Matrix) -> torch.Tensor:
    """``|W_ij| ||X_j||`` up to a factor that all matrices share, [m, n]."""
    assert matrix.moments is not None
    return matrix.weight.abs() * matrix.moments.square.sqrt()
