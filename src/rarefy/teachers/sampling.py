"""Drawing tokens from logits, each row from its own stream of random numbers.

A row's draws depend on its seed alone, not on the rows that happen to share its batch.
"""

from __future__ import annotations

import torch


def probabilities(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """Return the distribution that is drawn from.

    Args:
        logits: float [B, V].
        temperature: positive, divides the logits.
        top_k: keep this many most probable tokens; 0 keeps all.
        top_p: then keep the smallest set with at least this much probability; 1 keeps all.

    Returns:
        float64 [B, V], rows of sum 1.
    """
    scaled = logits.double() / temperature
    if not top_k and top_p >= 1:
        return scaled.softmax(-1)
    kept, order = scaled.topk(min(top_k or scaled.shape[-1], scaled.shape[-1]))
    p = kept.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    return torch.zeros_like(scaled).scatter(-1, order, p / p.sum(-1, keepdim=True))


def draw(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Invert the cumulative distribution.

    Args:
        p: float64 [B, V], rows of sum 1.
        u: float64 [B], uniform in [0, 1).

    Returns:
        int64 [B]; never a token of probability 0.
    """
    total = p.cumsum(-1)
    at = torch.searchsorted(total, (u * total[:, -1])[:, None], right=True)[:, 0]
    last = p.shape[-1] - 1 - (p > 0).flip(-1).int().argmax(-1)
    return torch.minimum(at, last)


class Streams:
    """One stream of uniform numbers for each row of a batch."""

    def __init__(self, seeds: list[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self) -> torch.Tensor:
        """The next number of every row, float64 [B], on the CPU."""
        draws = [torch.rand(1, generator=g, dtype=torch.float64) for g in self._generators]
        return torch.cat(draws)
