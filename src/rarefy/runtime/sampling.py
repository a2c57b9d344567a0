"""How the next token is chosen from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rarefy.errors import RarefyError
from rarefy.resources import single_threaded

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_FIRST = 64  # candidates that are sorted first; sorting a whole vocabulary takes milliseconds


@dataclass(frozen=True)
class Sampling:
    """Rules of one answer.

    Attributes:
        max_tokens: at most so many tokens.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: draw from the smallest set of tokens whose probability reaches this.
        seed: of the draws; the same answer for the same seed.
        stops: token ids that end the answer.

    Raises:
        RarefyError: a value outside its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.temperature < 0 or not math.isfinite(self.temperature):
            raise RarefyError(f"the temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise RarefyError(f"top-p must lie above 0 and at most at 1, not {self.top_p}")

    def chooser(self) -> Callable[[Tensor], int]:
        """A function from logits [vocabulary] to a token; each call of it is the next draw."""
        if self.temperature == 0:
            # Not torch's: on several threads it wakes workers that then spin beside the decoder's.
            return lambda logits: int(logits.float().numpy(force=True).argmax())
        generator = torch.Generator().manual_seed(self.seed)

        def draw(logits: Tensor) -> int:
            with single_threaded():
                probabilities = torch.softmax(logits.float().cpu() / self.temperature, -1)
                if self.top_p == 1:
                    return int(torch.multinomial(probabilities, 1, generator=generator))
                values, tokens = nucleus(probabilities, self.top_p)
                return int(tokens[torch.multinomial(values, 1, generator=generator)])

        return draw


def nucleus(probabilities: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The most likely tokens that together reach a share, at least one.

    Args:
        probabilities: [vocabulary], summing to one.
        share: in (0, 1].

    Returns:
        Their probabilities, in falling order, and their ids.
    """
    count = min(_FIRST, len(probabilities))
    while True:
        values, tokens = probabilities.topk(count)
        reached = values.cumsum(0)
        if reached[-1] >= share or count == len(probabilities):
            break
        count = min(8 * count, len(probabilities))
    keep = int((reached - values < share).sum())
    return values[:keep], tokens[:keep]
