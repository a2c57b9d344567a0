"""Magnitude: the units with the smallest weights go. The baseline that reads no data.

    importance of a unit = sqrt(sum of w^2 over all of its weights, in all of its matrices)

Source: Li, Kadav, Durdanovic, Samet, Graf, *Pruning Filters for Efficient ConvNets*, ICLR 2017,
arXiv 1608.08710, whose filters are here the closed groups of coupled weights.

Where we differ, and why: the L2 norm instead of L1, as the later work that compares with it does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rarefy.surgery.base import SURGERIES, Units, WidthSurgery


@SURGERIES.register(
    "l2",
    family="pruning",
    paper="Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017",
    arxiv="1608.08710",
)
@dataclass(frozen=True)
class L2(WidthSurgery):
    """Norm of a unit's weights.

    Attributes:
        heads: share of the key/value groups to remove. neurons: share of the neurons.
    """

    heads: float = 0.25
    neurons: float = 0.25

    def score(self, units: Units) -> torch.Tensor:
        """Norm over everything that a unit owns."""
        squares = [member.weight.square().sum((1, 2, 3)) for member in units.members]
        return torch.stack(squares).sum(0).sqrt()
