"""AlphaPruning: blocks whose weight spectra have light tails give up more weights.

Paper: Lu, Zhou, Liu, Wang, Mahoney, Yang, *AlphaPruning: Using Heavy-Tailed Self Regularization
Theory for Improved Layer-wise Pruning of Large Language Models*, NeurIPS 2024, arXiv 2410.10912.

    lambda: squared singular values of W, ascending          tail: the k values from lambda_i on
    alpha = 1 + k / sum_{j >= i} ln(lambda_j / lambda_i)      (Hill's estimate)
    q_b = mean alpha of the matrices of block b
    p_b = 1 - eps + 2 eps (q_b - q_min) / (q_max - q_min)     s_b = eta p_b

eta meets the budget. Every matrix of a block gets the block's sparsity s_b.

Where the tail begins: ``tail: mid`` takes the median; ``tail: peak`` looks at the values up to
half above the mode of the histogram of log10 lambda and takes the one from which on a power law
fits best, by the Kolmogorov-Smirnov distance.

Where we differ, and why:
 * Values below 0.95 of the mode are no candidates. The reference code means so, too, but compares
   the logarithm of that limit with plain values, so that it hardly ever binds.
 * Sparsities beyond 0.99 are cut there and the rest is shared out among the other blocks; the
   reference code may ask for more than all of the weights of a block.
 * "No eigenvalue" is relative to the largest, so that alpha does not depend on the unit of W.

Matrices of unequal sides have a larger alpha for their shape alone (arXiv 2506.06280); all blocks
of one model have the same shapes, so the comparison between blocks stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rarefy.allocate.base import ALLOCATORS, DensityAllocator, Matrix, Share
from rarefy.allocate.budget import LEAST, block_sizes, budget_of, by_block, meet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TAILS = ("peak", "mid")
_BINS = 100
_NOTHING = 1e-10  # of the largest eigenvalue: rounding of the decomposition


@ALLOCATORS.register(
    "alphapruning",
    family="pruning",
    paper="Lu et al., AlphaPruning, NeurIPS 2024",
    arxiv="2410.10912",
)
@dataclass(frozen=True)
class AlphaPruning(DensityAllocator):
    """Sparsity by the tail of the weights' spectrum; needs no data.

    Attributes:
        epsilon: half the spread of the sparsities, relative to their mean; the paper takes 0.2 to
            0.3 with Wanda and SparseGPT, 0.3 to 0.5 with magnitude pruning.
        tail: where the tail of a spectrum begins, "peak" or "mid".

    Raises:
        ValueError: a field outside these values.
    """

    epsilon: float = 0.3
    tail: str = "peak"

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon must lie in [0, 1), and {self.epsilon} does not")
        if self.tail not in _TAILS:
            raise ValueError(f"tail must be one of {', '.join(_TAILS)}, not {self.tail!r}")

    def measure(self, block: Mapping[str, Matrix]) -> dict[str, torch.Tensor]:
        """Alpha of each matrix."""
        return {
            path: torch.tensor(alpha(spectrum(matrix.weight), self.tail), dtype=torch.float64)
            for path, matrix in block.items()
        }

    def spread(
        self,
        measures: Sequence[Mapping[str, torch.Tensor]],
        shares: Sequence[Mapping[str, Share]],
    ) -> list[dict[str, float]]:
        """Sparsity in proportion to ``p_b``; see the module's formula."""
        sizes = block_sizes(shares)
        used = sizes > 0
        q = torch.stack([torch.stack([*block.values()]).mean() for block in measures if block])
        low, high = q.min(), q.max()
        p = torch.ones_like(q)
        if high > low:
            p = 1 - self.epsilon + 2 * self.epsilon * (q - low) / (high - low)

        def densities(minus_eta: float) -> torch.Tensor:
            return 1 + minus_eta * p

        most = (1 - LEAST) / float(p.min())
        met = meet(sizes[used], budget_of(shares), densities, -most, 0.0)
        return by_block(met, shares)


def spectrum(weight: torch.Tensor) -> torch.Tensor:
    """Squared singular values of a matrix [m, n] that differ from zero, ascending, in float64."""
    W = weight.double()
    values: torch.Tensor = torch.linalg.eigvalsh(W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W)
    return values[values > _NOTHING * values[-1]]


def alpha(values: torch.Tensor, tail: str = "peak") -> float:
    """Exponent of the power law that the tail of a spectrum follows.

    Args:
        values: positive, ascending, [n]. tail: where it begins, "peak" or "mid".
    """
    if len(values) < 2:
        return 1.0
    starts = [len(values) // 2] if tail == "mid" else _candidates(values)
    logs = values.log()
    best, found = torch.inf, 1.0
    for i in starts:
        k = len(values) - i
        # Equal values have no tail: a steep one stands for that.
        estimate = 1 + k / max(float((logs[i:] - logs[i]).sum()), 1e-6 * k)
        above = torch.arange(k, dtype=values.dtype, device=values.device) / k
        distance = float((1 - (values[i:] / values[i]) ** (1 - estimate) - above).abs().max())
        if distance < best:
            best, found = distance, estimate
    return found


def _candidates(values: torch.Tensor) -> list[int]:
    """Indices from 0.95 to 1.5 times the mode of the histogram of log10 values."""
    logs = values.log10()
    edges = torch.linspace(float(logs[0]), float(logs[-1]), _BINS + 1, dtype=logs.dtype)
    bins = torch.bucketize(logs, edges[1:-1].to(logs.device), right=True)
    mode = 10 ** float(edges[int(torch.bincount(bins, minlength=_BINS).argmax())])
    near = (values[:-1] >= 0.95 * mode) & (values[:-1] <= 1.5 * mode)
    return near.nonzero().flatten().tolist() or [len(values) // 2]
