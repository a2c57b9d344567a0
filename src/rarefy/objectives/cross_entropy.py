"""Plain language-model training: no teacher.

Paper: Jha et al., *How To Train Your (Compressed) Large Language Model*, arXiv 2305.14864: a model
initialised by dropping layers of a larger one is trained on plain text, and no teacher is kept in
memory. It is also the control beside every distillation, at equal tokens.

    L = -sum_t log q(y_t | y_<t)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rarefy.losses.cross_entropy import cross_entropy
from rarefy.objectives.base import OBJECTIVES, Objective, Tally

if TYPE_CHECKING:
    from rarefy.objectives.base import Step


@OBJECTIVES.register(
    "cross-entropy",
    family="distillation",
    paper="Jha et al., How To Train Your (Compressed) LLM, 2023",
    arxiv="2305.14864",
)
@dataclass(frozen=True)
class LanguageModelling(Objective):
    """Cross entropy of every counted token."""

    def loss(self, step: Step) -> Tally:
        """See :meth:`Objective.loss`."""
        reading = step.student.read(step.rows)
        total = cross_entropy(reading.logits, step.rows.labels).sum()
        return Tally(total, step.rows.tokens, {"cross-entropy": float(total.detach())})
