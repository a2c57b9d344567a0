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
    steps: int = 100,
    shrink: float = 0.2,
    norm: float = 2.4,
) -> Range:
    """Shrink the min-max range to the one of least rounding error.

    The search of GPTQ's reference quantizer (Frantar et al., 2023): ranges ``p * (lo, hi)`` for
    ``p`` from 1 down to ``shrink`` in ``steps`` parts of 1, error ``sum |w - q|**norm``.

    Args:
        groups: float [m, G, g].
        quantize: rounds groups to the grid of a range.
        importance: weight of each column's error, [G, g], or None for equal weights.
        steps: resolution of the search.
        shrink: the smallest range that is tried, as a share of the full one.
        norm: exponent of the error.
    """
    lo, hi = minmax(groups)
    best_lo, best_hi = lo.clone(), hi.clone()
    best = torch.full_like(lo, torch.inf)
    for step in range(round((1 - shrink) * steps) + 1):
        p = 1 - step / steps
        error = (quantize(groups, (p * lo, p * hi)) - groups).abs_().pow_(norm)
        total = (error if importance is None else error * importance).sum(-1)
        better = total < best
        best = torch.where(better, total, best)
        best_lo = torch.where(better, p * lo, best_lo)
        best_hi = torch.where(better, p * hi, best_hi)
    return best_lo, best_hi
