"""GKD: a teacher's advice on what the student itself says.

Paper: Agarwal et al., *On-Policy Distillation of Language Models: Learning from Self-Generated
Mistakes*, ICLR 2024, arXiv 2306.13649.

    u ~ U(0, 1);  u <= share:  x from the data, y ~ Q(. | x)        else: (x, y) from the data
    L = sum_t D(P || Q)(. | x, y_<t)                                no gradient through drawing y

Symbols: P the teacher, Q the student, D a divergence, x prompt, y response.

Where we differ, and why:
 * divergences go by name, because papers and libraries disagree about which end of beta is which;
 * u is drawn once for an optimizer step, so that its micro-batches are of one kind and the mean
   over its tokens, counted after drawing, is that of one distribution;
 * the reinforcement term is left out.
The student must already write sensible text: the teacher's advice on nonsense is of no use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rarefy.losses.jsd import JSD
from rarefy.objectives.base import OBJECTIVES, Objective, Tally
from rarefy.objectives.distil import Distil
from rarefy.objectives.sampling import Draw
from rarefy.signals.base import require_teacher
from rarefy.signals.teacher import Teacher

if TYPE_CHECKING:
    from rarefy.losses.base import Loss
    from rarefy.objectives.base import Step
    from rarefy.signals.base import Signal


@OBJECTIVES.register(
    "gkd",
    family="distillation",
    paper="Agarwal et al., On-Policy Distillation of Language Models, ICLR 2024",
    arxiv="2306.13649",
)
@dataclass(frozen=True)
class GKD(Objective):
    """Generalized knowledge distillation.

    Attributes:
        distance: D, between the teacher's and the student's distributions.
        share: of the optimizer steps that use the student's own text, 0 to 1.
        tokens: the most that are drawn for a row.
        prompt: how many first tokens of a row are the prompt; 0 for all before the completion.
        temperature: of the comparison; text is drawn at 1.
        signal: where the teacher's distributions come from.
    """

    distance: Loss = field(default_factory=JSD)
    share: float = 0.5
    tokens: int = 128
    prompt: int = 0
    temperature: float = 1.0
    signal: Signal = field(default_factory=Teacher)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in 0..1, and {self.share} does not")
        if self.tokens < 1 or self.prompt < 0:
            raise ValueError("tokens must be at least 1 and prompt at least 0")
        if self.share > 0 and not self.signal.on_policy:
            raise ValueError(
                "the signal holds stored distributions, which cannot speak about text that the "
                "student has yet to write; use the signal 'teacher', or share: 0"
            )
        self._distil()

    def _distil(self) -> Distil:
        return Distil(self.signal, self.distance, self.temperature)

    @property
    def level(self) -> int:
        """The signal's."""
        return self.signal.level

    def loss(self, step: Step) -> Tally:
        """See :meth:`Objective.loss`."""
        if self.level:
            require_teacher(step.teacher, self.level, "the objective 'gkd'")
        fresh = step.coin(self.share)
        rows = step.rows
        if fresh:
            prompts = rows.prompts(self.prompt)
            rows = step.student.sample(prompts, Draw(self.tokens), step.generator).rows
        tally = self._distil().on(step, rows)
        parts = tally.parts | {"on-policy": float(tally.tokens * fresh)}
        return Tally(tally.total, tally.tokens, parts)
