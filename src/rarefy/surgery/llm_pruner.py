"""LLM-Pruner: what the loss would lose with a unit, by a Taylor expansion around the weights.

Paper: Ma, Fang, Wang, *LLM-Pruner: On the Structural Pruning of Large Language Models*,
NeurIPS 2023, arXiv 2305.11627.

    first:      sum_k |w_k g_k|                second:  sum_k w_k^2 F_k
    mix:        sum_k |w_k g_k - w_k^2 F_k/2|  vectorize:  |sum_k w_k g_k|
    importance of a unit = sum over its channels of  reduce over its matrices of  the channel's sum

The units are the closed groups of coupled weights: a key/value head with its query heads and its
columns of the output projection; a neuron's rows of gate and up and its column of down.

Symbols: w weights of one channel in one matrix, g gradient of the language-model loss, F diagonal
of the Fisher information (mean over samples of each sample's squared gradient), k entries.

Where we differ, and why:
 * query head i is credited to key/value head i // r, as the model uses them; the published code
   credits head i mod n_kv;
 * by default every block is cut alike and ranked by itself, so that the result is an ordinary
   model of uniform width; the paper leaves the first and last blocks whole and stores a pickled
   module. The paper's ranking over all blocks is there too, for each kind of unit by itself;
 * F comes from the gradients of single samples, not from the squared gradient of a batch;
 * biases are cut with their rows but not scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from rarefy.surgery.base import SURGERIES, Member, Units, WidthSurgery

if TYPE_CHECKING:
    from collections.abc import Callable

_CRITERIA: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "first": lambda w, g, F: (w * g).abs().sum(-1),
    "second": lambda w, g, F: (w.square() * F).sum(-1),
    "mix": lambda w, g, F: (w * g - w.square() * F / 2).abs().sum(-1),
    "vectorize": lambda w, g, F: (w * g).sum(-1).abs(),
}
_REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda scores: scores.sum(0),
    "mean": lambda scores: scores.mean(0),
    "max": lambda scores: scores.amax(0),
    "prod": lambda scores: scores.prod(0),
    "first": lambda scores: scores[0],
}


@SURGERIES.register(
    "llm-pruner",
    family="pruning",
    paper="Ma et al., LLM-Pruner, NeurIPS 2023",
    arxiv="2305.11627",
)
@dataclass(frozen=True)
class LLMPruner(WidthSurgery):
    """Taylor importance of coupled groups.

    Attributes:
        heads: share of the key/value groups to remove. neurons: share of the neurons.
        criterion: "first", "second", "mix" or "vectorize"; see the module's formulas.
        reduction: over a unit's matrices: "sum", "mean", "max", "prod" or "first".
        ranking: "block" ranks each block's units, "model" those of all blocks together.
        samples: calibration rows, one backward pass each. length: tokens of each.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    heads: float = 0.25
    neurons: float = 0.25
    criterion: str = "first"
    reduction: str = "sum"
    ranking: str = "block"
    samples: int = 10
    length: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for value, known in ((self.criterion, _CRITERIA), (self.reduction, _REDUCTIONS)):
            if value not in known:
                raise ValueError(f"{value!r} is none of {', '.join(known)}")
        if self.samples < 1 or self.length < 2:
            raise ValueError("samples must be at least 1 and length at least 2")

    def score(self, units: Units) -> torch.Tensor:
        """Importance of each unit; see the module's formula."""
        channels = torch.stack([self._channels(member) for member in units.members])
        return _REDUCTIONS[self.reduction](channels).sum(-1)

    def _channels(self, member: Member) -> torch.Tensor:
        """Importance of each channel in one matrix, [units, channels]."""
        assert member.first is not None
        assert member.second is not None
        # The product of several tiny scores leaves the range of fp32.
        w, g, F = (t.double() for t in (member.weight, member.first, member.second))
        return _CRITERIA[self.criterion](w, g, F).sum(1)
