"""Meet a budget exactly: one number that shifts or scales every density, found by bisection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rarefy.allocate.base import Share

LEAST = 0.01
"""Density below which no matrix falls: one without weights would cut the model in two."""

_STEPS = 200


def meet(
    sizes: torch.Tensor,
    budget: float,
    at: Callable[[float], torch.Tensor],
    low: float,
    high: float,
) -> torch.Tensor:
    """Densities ``at(t)``, clamped to [LEAST, 1], whose weighted sum is the budget.

    Clamping and looking for another t is water-filling: what one entry cannot take, the others
    share.

    Args:
        sizes: weights of each entry, float64 [k].
        budget: wanted ``sum(sizes * density)``.
        at: t -> densities [k] before clamping; none falls as t grows.
        low, high: where to look for t.

    Raises:
        RarefyError: no t will do.
    """

    def spent(t: float) -> float:
        return float((sizes * at(t).clamp(LEAST, 1)).sum())

    if not spent(low) <= budget * (1 + 1e-9) or not spent(high) >= budget * (1 - 1e-9):
        raise RarefyError(
            f"the recipe keeps {100 * budget / float(sizes.sum()):.3g}% of the weights, which "
            f"leaves nothing to share out; keep between {100 * LEAST:g}% and 100%"
        )
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) < budget else (low, middle)
    return at(high).clamp(LEAST, 1)


def block_sizes(shares: Sequence[Mapping[str, Share]]) -> torch.Tensor:
    """Number of weights of each block, float64 [blocks]; 0 for one that is left alone."""
    sizes = [sum(share.weights for share in block.values()) for block in shares]
    return torch.tensor(sizes, dtype=torch.float64)


def budget_of(shares: Sequence[Mapping[str, Share]]) -> float:
    """Number of weights that the whole may keep."""
    return sum(share.weights * share.density for block in shares for share in block.values())


def by_block(
    densities: torch.Tensor, shares: Sequence[Mapping[str, Share]]
) -> list[dict[str, float]]:
    """Give every matrix its block's density, [blocks with matrices in them]."""
    values = iter(densities.tolist())
    out = []
    for block in shares:
        value = next(values) if block else 0.0
        out.append(dict.fromkeys(block, value))
    return out
