"""Reverse KL: the student must not say what the teacher finds impossible.

    KL(Q || P) = sum_v q_v log(q_v / p_v),      h = q log(q / p)

Paper: Gu, Dong, Wei, Huang, *MiniLLM: Knowledge Distillation of Large Language Models*, ICLR 2024,
arXiv 2306.08543. P the teacher, Q the student. It seeks modes, so it follows forward KL when the
student is far away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rarefy.losses.base import LOSSES
from rarefy.losses.divergence import Divergence

if TYPE_CHECKING:
    import torch


@LOSSES.register(
    "reverse-kl",
    family="distillation",
    paper="Gu et al., MiniLLM, ICLR 2024",
    arxiv="2306.08543",
)
@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(Q || P)."""

    def compare(
        self, log_p: torch.Tensor, log_q: torch.Tensor, q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the module's formula."""
        h = (log_q - log_p).mul_(q)
        return h.sum(-1), h
