"""Policies small enough to be enumerated, for the tests of objectives and signals."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch

from rarefy.objectives.policy import Policy
from rarefy.objectives.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rarefy.losses.base import Reading

PROMPT = torch.tensor([0])


class Table(Policy):
    """A free distribution behind every prefix of at most ``length`` tokens; prompts have one token.

    Prefixes are numbered like the nodes of a heap with V children each.
    """

    level = 5

    def __init__(self, seed: int, vocabulary: int = 4, length: int = 3, scale: float = 1.0) -> None:
        g = torch.Generator().manual_seed(seed)
        nodes = sum(vocabulary**i for i in range(length))
        self.table = scale * torch.randn(nodes, vocabulary, generator=g, dtype=torch.float64)
        self.table.requires_grad_()
        self.seen: list[Rows] = []

    @property
    def fingerprint(self) -> str:
        return str(self.table.tolist())

    def logits(self, ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        nodes, width = self.table.shape
        at = torch.zeros_like(ids)
        for t in range(1, ids.shape[1]):
            at[:, t] = 1 + width * at[:, t - 1] + ids[:, t]
        return self.table[at.clamp(max=nodes - 1)]

    def hidden(self, ids: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = self.logits(ids, valid)
        return (states, 2 * states, states**2)

    def read(self, rows: Rows, layers: Sequence[int] = ()) -> Reading:
        self.seen.append(rows)
        return super().read(rows, layers)


class Constant(Table):
    """The same distribution everywhere; prompts may be of any length."""

    def __init__(self, logits: Sequence[float]) -> None:
        super().__init__(0, len(logits), 1)
        self.table = torch.tensor([list(logits)], dtype=torch.float64, requires_grad=True)

    def logits(self, ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return self.table[torch.zeros_like(ids)]


def every_text(vocabulary: int, length: int, stop: tuple[int, ...] = ()) -> Rows:
    """Each text of ``length`` tokens, or shorter where it ends with a stop token, once."""
    texts = {
        next((t[: i + 1] for i, token in enumerate(t) if token in stop), t)
        for t in product(range(vocabulary), repeat=length)
    }
    completions = [torch.tensor(text) for text in sorted(texts)]
    return Rows.join([PROMPT] * len(completions), completions, stop)
