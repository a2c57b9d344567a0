"""Shortened LLaMA: remove the block whose absence the model notices least, by its perplexity.

Paper: Kim et al., *Shortened LLaMA: Depth Pruning for Large Language Models with Comparison of
Retraining Methods*, arXiv 2402.02834.

    PPL_l = exp(mean loss of the model without block l)      the block of lowest PPL is removed

Symbols: l index of a block; the loss is that of the next token on the calibration rows.

Where we differ, and why:
 * after every removal the blocks that are left are scored anew, because blocks that do the same
   work are each dispensable but not together; the paper scores once;
 * the first and the last block are protected by default;
 * the rows are the calibration text's, by default as many as the paper's code takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.surgery.base import SURGERIES, DepthSurgery, Removal, Stack


@SURGERIES.register(
    "shortened-llama",
    family="pruning",
    paper="Kim et al., Shortened LLaMA, 2024",
    arxiv="2402.02834",
)
@dataclass(frozen=True)
class ShortenedLlama(DepthSurgery):
    """Perplexity without the block, scored anew after each removal.

    Attributes:
        blocks: number of blocks to remove. protect: blocks at either end that stay.
        samples: calibration rows. length: tokens of each.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"losses"})

    blocks: int = 1
    protect: int = 1
    samples: int = 10
    length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1 or self.length < 2:
            raise ValueError("samples must be at least 1 and length at least 2")

    def choose(self, stack: Stack) -> Removal:
        """The blocks in order of removal; the scores are PPL after each removal, [blocks]."""
        assert stack.losses is not None
        left, candidates = list(range(stack.count)), self.candidates(stack.count)
        removed: list[int] = []
        perplexities: list[float] = []
        for _ in range(self.blocks):
            perplexity = dict(zip(left, stack.losses(left).exp().tolist(), strict=True))
            best = min((i for i in left if i in candidates), key=perplexity.__getitem__)
            removed.append(best)
            perplexities.append(perplexity[best])
            left.remove(best)
        return Removal(tuple(removed), torch.tensor(perplexities))
