"""What a token is worth: the rewards of the tokens behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rarefy.objectives.rows import Rows


@dataclass(frozen=True)
class Returns:
    """How rewards are added up.

    Attributes:
        gamma: discount for each token in between.
        normalise: divide by the sum of the discounts, the number of summands at ``gamma`` 1; a
            long text then gains nothing by its length.
        own: count the token's own reward too.
    """

    gamma: float = 1.0
    normalise: bool = True
    own: bool = False


def returns(rows: Rows, reward: Tensor, weight: Tensor, kind: Returns) -> Tensor:
    """Sum of later rewards, 0 where nothing is later.

    Args:
        rows: whose counted tokens follow each other in every row.
        reward: r, float [N]. weight: w, multiplies what comes with a token and behind it, [N].
        kind: how to add.

    Returns:
        ``R_t = sum_{j>t} gamma^(j-t-1) r_j w_{t+1} ... w_j``, float [N], without a gradient.
    """
    r, w = rows.spread(reward.detach()), rows.spread(weight.detach())
    there = rows.counted.to(r.dtype)
    R, summands = torch.zeros_like(r), torch.zeros_like(r)
    worth, count = torch.zeros_like(r[:, 0]), torch.zeros_like(r[:, 0])
    for t in range(r.shape[1] - 1, -1, -1):
        R[:, t], summands[:, t] = worth, count
        worth = w[:, t] * (r[:, t] + kind.gamma * worth)
        count = there[:, t] * (1 + kind.gamma * count)
        if kind.own:
            R[:, t], summands[:, t] = worth, count
    if kind.normalise:
        R = R / summands.clamp(min=1)
    return R[rows.counted]


def prefix_products(rows: Rows, weight: Tensor) -> Tensor:
    """``w_1 ... w_{t-1}`` of each counted token of its row, float [N], without a gradient."""
    before = torch.where(rows.counted, rows.spread(weight.detach()), 1.0).cumprod(1)
    shifted = torch.ones_like(before)
    shifted[:, 1:] = before[:, :-1]
    return shifted[rows.counted]
