"""Grid rules: how the range of an integer grid is chosen from the weights of a group.

A rule sees groups of weights [m, G, g] and returns the range (lo, hi), both [m, G], that the
integer codes will span. Zero always lies in the range: the usual grids have an integer zero point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

Range = tuple[torch.Tensor, torch.Tensor]
Quantize = "Callable[[torch.Tensor, Range], torch.Tensor]"


def minmax(groups: torch.Tensor) -> Range:
    """Smallest and largest weight of each group, with zero forced into the range."""
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def mse(
    groups: torch.Tensor,
    quantize: Callable[[torch.Tensor, Range], torch.Tensor],
    importance: torch.Tensor | None,
    *,
    steps: int = 12,
    shrink: float = 0.64,
) -> Range:
    """Shrink the min-max range to the one of least squared rounding error.

    GPTQ's reference quantizer (Frantar et al., 2023) searches in the same way, in steps of 0.01
    down to 0.2 and with the exponent 2.4; below 0.64 no range ever won on trained weights, and the
    column weights do what the exponent is for.

    Args:
        groups: float [m, G, g].
        quantize: rounds groups to the grid of a range.
        importance: weight of each column's error, [G, g], or None for equal weights.
        steps: number of ranges tried below the full one.
        shrink: the smallest range that is tried, as a share of the full one.
    """
    lo, hi = minmax(groups)
    best_lo, best_hi = lo.clone(), hi.clone()
    best = torch.full_like(lo, torch.inf)
    for step in range(steps + 1):
        p = 1 - (1 - shrink) * step / steps
        error = (quantize(groups, (p * lo, p * hi)) - groups).square_()
        total = (error if importance is None else error.mul_(importance)).sum(-1)
        better = total < best
        best = torch.where(better, total, best)
        best_lo = torch.where(better, p * lo, best_lo)
        best_hi = torch.where(better, p * hi, best_hi)
    return best_lo, best_hi
