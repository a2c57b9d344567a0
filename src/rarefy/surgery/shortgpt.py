"""ShortGPT: blocks that hardly turn the hidden state are redundant.

Paper: Men et al., *ShortGPT: Layers in Large Language Models are More Redundant Than You Expect*,
arXiv 2403.03853.

    BI_l = 1 - E_t cos(x_l, x_{l+1})        the blocks of lowest influence are removed, all at once

Symbols: x_l hidden state of a token before block l, E_t mean over all tokens.

Where we differ, and why: the first and the last block are protected by default, as removing either
costs far more than its BI tells; the last x is the block's output before the final norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rarefy.surgery.base import SURGERIES, DepthSurgery, Removal, Stack


@SURGERIES.register(
    "shortgpt",
    family="pruning",
    paper="Men et al., ShortGPT, 2024",
    arxiv="2403.03853",
)
@dataclass(frozen=True)
class ShortGPT(DepthSurgery):
    """Block influence.

    Attributes:
        blocks: number of blocks to remove. protect: blocks at either end that stay.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"cosine"})

    blocks: int = 1
    protect: int = 1

    def choose(self, stack: Stack) -> Removal:
        """The candidates of lowest influence; the scores are BI of every block, [L]."""
        assert stack.cosine is not None
        influence = 1 - stack.cosine
        lowest = sorted(self.candidates(stack.count), key=lambda i: float(influence[i]))
        return Removal(tuple(lowest[: self.blocks]), influence)
