"""Random units: the floor that every importance score has to beat.

    importance of a unit ~ uniform on [0, 1), drawn anew for every block and kind from one seed

Where we differ, and why: no paper; a control.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from rarefy.surgery.base import SURGERIES, Units, WidthSurgery


@SURGERIES.register("random", family="pruning")
@dataclass(frozen=True)
class Random(WidthSurgery):
    """Units drawn by lot.

    Attributes:
        heads: share of the key/value groups to remove. neurons: share of the neurons.
        seed: of the lots.
    """

    heads: float = 0.25
    neurons: float = 0.25
    seed: int = 0

    def score(self, units: Units) -> torch.Tensor:
        """One lot a unit."""
        lots = random.Random(f"{self.seed} {units.block} {units.kind}")  # noqa: S311  (no secret)
        return torch.tensor([lots.random() for _ in range(units.count)])
