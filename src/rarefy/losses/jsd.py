"""Generalized Jensen-Shannon divergence: between forward and reverse KL, and bounded.

    M = beta P + (1 - beta) Q
    JSD = beta KL(P || M) + (1 - beta) KL(Q || M),      h = (1 - beta) q log(q / m)

Paper: Agarwal et al., *On-Policy Distillation of Language Models*, ICLR 2024, arXiv 2306.13649.
P the teacher, Q the student. JSD / beta -> KL(P || Q) as beta -> 0, JSD / (1 - beta) ->
KL(Q || P) as beta -> 1, and JSD <= H(beta), the entropy of a coin.

Where we differ, and why: beta = 0 and 1, where the formula is 0 for all P and Q, are refused
instead of standing for the two KL divergences, which have names of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

import torch

from rarefy.losses.base import LOSSES
from rarefy.losses.divergence import Divergence

if TYPE_CHECKING:
    from torch import Tensor


@LOSSES.register(
    "jsd",
    family="distillation",
    paper="Agarwal et al., On-Policy Distillation of Language Models, ICLR 2024",
    arxiv="2306.13649",
)
@dataclass(frozen=True)
class JSD(Divergence):
    """Generalized JSD.

    Attributes:
        beta: weight of the teacher in the mixture, within (0, 1).
        rescale: divide by min(beta, 1 - beta), so that gradients are about as large as those of
            the KL divergence at the nearer end and learning rates carry over.
    """

    beta: float = 0.5
    rescale: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta must lie strictly between 0 and 1, and {self.beta} does not; "
                "use forward-kl or reverse-kl for the ends"
            )

    def compare(self, log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """See the module's formula."""
        log_m = torch.logaddexp(log_p + log(self.beta), log_q + log(1 - self.beta))
        scale = 1 / min(self.beta, 1 - self.beta) if self.rescale else 1.0
        h = (log_q - log_m).mul_(q).mul_(scale * (1 - self.beta))
        teacher = (log_p - log_m).mul_(log_p.exp()).sum(-1)
        return h.sum(-1).add_(teacher, alpha=scale * self.beta), h
