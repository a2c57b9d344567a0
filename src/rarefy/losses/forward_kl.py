"""Forward KL: the student must cover whatever the teacher finds possible.

    KL(P || Q) = sum_v p_v log(p_v / q_v),      h = -p

Paper: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, arXiv 1503.02531,
with its temperature T and factor T². P the teacher, Q the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rarefy.losses.base import LOSSES
from rarefy.losses.divergence import Divergence

if TYPE_CHECKING:
    import torch


@LOSSES.register(
    "forward-kl",
    family="distillation",
    paper="Hinton et al., Distilling the Knowledge in a Neural Network, 2015",
    arxiv="1503.02531",
)
@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(P || Q). A shortened target without its tail is read as the whole distribution."""

    accepts: ClassVar[frozenset[str]] = frozenset({"logits", "top-k", "top-k without tail"})

    def compare(
        self, log_p: torch.Tensor, log_q: torch.Tensor, q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the module's formula."""
        p = log_p.exp()
        return ((log_p - log_q).mul_(p)).sum(-1), p.neg_()
