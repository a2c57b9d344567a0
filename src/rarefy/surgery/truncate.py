"""Truncation: a student of fewer blocks, which begins with the teacher's own.

Paper: Jha et al., *How To Train Your (Compressed) Large Language Model*, arXiv 2305.14864 (first
version: *LLM Distillation Doesn't Need a Teacher*), section 3.

    uniform        blocks at even distances, the first and the last among them
    first, last    one end of the stack
    drop-middle    both ends, as many blocks of either

What is kept is kept bit for bit; only the numbering changes. Truncation alone leaves a model that
writes nonsense: a tuner is meant to follow, with plain text or with the dense model as teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rarefy.surgery.base import SURGERIES, DepthSurgery, Removal, Stack

_STRATEGIES = ("uniform", "first", "last", "drop-middle")


@SURGERIES.register(
    "truncate",
    family="distillation",
    paper="Jha et al., How To Train Your (Compressed) Large Language Model, 2023",
    arxiv="2305.14864",
)
@dataclass(frozen=True)
class Truncate(DepthSurgery):
    """Chooses blocks by their place alone.

    Attributes:
        blocks: number of blocks to remove.
        strategy: "uniform", "first", "last" or "drop-middle"; says what stays.
        protect: not used; places decide.

    Raises:
        ValueError: no such strategy.
    """

    blocks: int = 1
    strategy: str = "uniform"
    protect: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy not in _STRATEGIES:
            known = ", ".join(_STRATEGIES)
            raise ValueError(f"strategy must be one of {known}, not {self.strategy!r}")

    def choose(self, stack: Stack) -> Removal:
        """All blocks but those that the strategy keeps; the scores are 1 where a block stays."""
        stays = torch.zeros(stack.count)
        stays[self.kept(stack.count)] = 1
        return Removal(tuple(i for i in range(stack.count) if not stays[i]), stays)

    def kept(self, count: int) -> list[int]:
        """Blocks of a stack of ``count`` that stay, ascending."""
        left = count - self.blocks
        if self.strategy == "first":
            return list(range(left))
        if self.strategy == "last":
            return list(range(count - left, count))
        if self.strategy == "drop-middle":
            head = (left + 1) // 2
            return [*range(head), *range(count - left + head, count)]
        if left == 1:
            return [0]
        return [round(i * (count - 1) / (left - 1)) for i in range(left)]
