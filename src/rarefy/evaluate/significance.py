"""How sure a mean is, and whether a difference is more than chance.

Clusters (passages, articles) are the independent draws, never items that share one. Many
comparisons at once need a correction: of twenty, one is "significant" by chance.

Sources: Wilson, Probable Inference, 1927; McNemar, Sampling Error of the Difference between
Correlated Proportions, 1947; Holm, A Simple Sequentially Rejective Test, 1979.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from rarefy.evaluate.bootstrap import Estimate, cluster_bootstrap, cluster_sums

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

HEADROOM = 3  # standard errors
_NORMAL = 1.959963984540054  # of a two-sided 95 % interval


def codes(names: Sequence[str]) -> list[int]:
    """Numbers for names, the same for the same set of names."""
    numbers = {name: i for i, name in enumerate(sorted(set(names)))}
    return [numbers[name] for name in names]


def mean(values: NDArray[np.float64], clusters: Sequence[int]) -> Estimate:
    """Mean of values [N] with a bootstrap interval over clusters [N]."""
    rows = np.stack([np.ones_like(values), values], axis=1)
    return cluster_bootstrap(cluster_sums(rows, clusters), lambda s: s[:, 1] / s[:, 0])


def score(values: NDArray[np.float64], clusters: Sequence[int]) -> Estimate:
    """Mean of single scores; Wilson's interval where items are right or wrong and independent."""
    count = len(values)
    if not np.isin(values, (0, 1)).all() or len(set(clusters)) < count:
        return mean(values, clusters)
    p, z = float(values.mean()), _NORMAL**2 / count
    centre = (p + z / 2) / (1 + z)
    half = math.sqrt(z * p * (1 - p) + z * z / 4) / (1 + z)
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def has_headroom(values: NDArray[np.float64], clusters: Sequence[int], chance: float) -> bool:
    """Whether the mean is above chance by enough standard errors, clusters being the draws."""
    count = len(set(clusters))
    headroom = float(values.mean()) - chance
    if count < 2 or headroom <= 0:
        return False
    residuals = cluster_sums((values - values.mean())[:, None], clusters)
    variance = float(np.square(residuals).sum()) * count / (count - 1)
    return headroom >= HEADROOM * math.sqrt(variance) / len(values)


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p-value that lost and won answers are equally likely.

    ``p = min(1, 2 sum_{i <= min(lost, won)} C(lost + won, i) / 2^(lost + won))``
    """
    flipped = lost + won
    tail = sum(math.comb(flipped, i) for i in range(min(lost, won) + 1))
    p: float = 2 * tail / 2**flipped
    return min(1.0, p)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that hold for all comparisons together.

    Args:
        p: p-values in [0, 1].

    Returns:
        Corrected values in the order given: the i-th smallest times the number not yet rejected,
        never less than a smaller one's, and at most 1.
    """
    corrected, least = [0.0] * len(p), 0.0
    for done, at in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, (len(p) - done) * p[at]))
        corrected[at] = least
    return corrected
