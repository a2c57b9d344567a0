"""Cross entropy of the tokens themselves: the plain language-model loss, ``-log q(y)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from rarefy.losses.base import LOSSES, Loss, Reading, Target, kinds, refuse_unfit
from rarefy.losses.divergence import log_softmax
from rarefy.losses.rowwise import rowwise

if TYPE_CHECKING:
    from torch import Tensor


@LOSSES.register("cross-entropy", family="baseline")
@dataclass(frozen=True)
class CrossEntropy(Loss):
    """``-log softmax(z)[label]``; the temperature is ignored."""

    accepts: ClassVar[frozenset[str]] = frozenset({"labels"})

    def per_token(self, reading: Reading, target: Target, temperature: float = 1.0) -> Tensor:
        """See :meth:`Loss.per_token`."""
        refuse_unfit(self, kinds(target))
        assert target.labels is not None
        return cross_entropy(reading.logits, target.labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``-log softmax(logits)[label]`` of every row.

    Args:
        logits: float [N, V]. labels: int64 [N].

    Returns:
        Float [N], differentiable once in the logits.
    """

    def rule(z: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        at = labels[part, None]
        log_q = log_softmax(z)
        loss = -log_q.gather(1, at)[:, 0]
        return loss, log_q.exp_().scatter_add_(1, at, z.new_full(at.shape, -1.0))

    return rowwise(logits, rule)


@torch.no_grad()
def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """``log softmax(logits)[label]`` of every row, float [N], without a gradient."""
    return -cross_entropy(logits, labels)
