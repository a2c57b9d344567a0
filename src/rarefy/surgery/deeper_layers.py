"""The unreasonable ineffectiveness of the deeper layers: drop the run of blocks that turns least.

Paper: Gromov, Tirumala, Shapourian, Glorioso, Roberts, *The Unreasonable Ineffectiveness of the
Deeper Layers*, ICLR 2025, arXiv 2403.17887.

    d(x_l, x_{l+k}) = E_rows arccos(cos(x_l, x_{l+k})) / pi
    blocks l* ... l* + k - 1 are removed, where l* minimizes d

Symbols: x_l hidden state of a row's last token before block l, k number of blocks to remove.

Where we differ, and why: the first and the last block are protected by default (the paper finds
the same of the last one); the healing that the paper ends with is a stage of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.surgery.base import SURGERIES, DepthSurgery, Removal, Stack


@SURGERIES.register(
    "deeper-layers",
    family="pruning",
    paper="Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, ICLR 2025",
    arxiv="2403.17887",
)
@dataclass(frozen=True)
class DeeperLayers(DepthSurgery):
    """Angular distance across contiguous blocks.

    Attributes:
        blocks: number of contiguous blocks to remove. protect: blocks at either end that stay.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"last"})

    blocks: int = 1
    protect: int = 1

    def choose(self, stack: Stack) -> Removal:
        """The run of least distance; the scores are d for every first block l, [L - k + 1]."""
        assert stack.last is not None
        k = self.blocks
        before, after = stack.last[:, :-k].double(), stack.last[:, k:].double()
        cosine = torch.cosine_similarity(before, after, dim=-1).clamp(-1, 1)
        distance = (cosine.arccos() / math.pi).mean(0)
        candidates = self.candidates(stack.count)
        starts = range(candidates.start, candidates.stop - k + 1)
        best = min(starts, key=lambda start: float(distance[start]))
        return Removal(tuple(range(best, best + k)), distance)
