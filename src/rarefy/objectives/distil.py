"""Distillation on given text: match a teacher's distribution, hidden states, or both.

Papers: Hinton et al., arXiv 1503.02531 (temperature, factor T²); Jha et al., arXiv 2305.14864 (its
task-free baseline); Liu et al., *LLM-QAT*, arXiv 2305.17888, and Muralidharan et al., *Minitron*,
arXiv 2407.14679 (a model compressed, then taught by what it was).

    L = T² D(P || Q) + c CE + h d(states)          summed over the counted tokens

Symbols: P the teacher, Q the student, D a divergence, T the temperature of both, CE the cross
entropy of the text itself, d a distance of hidden states.

All terms are per token of the same rows, so one division by the tokens is each term's mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rarefy.losses.base import refuse_unfit
from rarefy.losses.cross_entropy import cross_entropy
from rarefy.losses.forward_kl import ForwardKL
from rarefy.losses.hidden import HiddenMSE
from rarefy.objectives.base import OBJECTIVES, Objective, Tally
from rarefy.signals.teacher import Teacher

if TYPE_CHECKING:
    from rarefy.losses.base import Loss
    from rarefy.objectives.base import Step
    from rarefy.objectives.rows import Rows
    from rarefy.signals.base import Signal


@OBJECTIVES.register(
    "distil",
    family="distillation",
    paper="Hinton et al., Distilling the Knowledge in a Neural Network, 2015",
    arxiv="1503.02531",
)
@dataclass(frozen=True)
class Distil(Objective):
    """A signal compared by a distance, with two optional terms beside it.

    Attributes:
        signal: what the teacher says. distance: how far the student is from it.
        temperature: T.
        cross_entropy: c, weight of the text's own cross entropy; 0 to 0.5 is usual.
        hidden: h, weight of the hidden states' distance; needs the signal ``hidden``.
        hidden_distance: d.
    """

    signal: Signal = field(default_factory=Teacher)
    distance: Loss = field(default_factory=ForwardKL)
    temperature: float = 1.0
    cross_entropy: float = 0.0
    hidden: float = 0.0
    hidden_distance: Loss = field(default_factory=HiddenMSE)

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        if self.cross_entropy < 0 or self.hidden < 0:
            raise ValueError("cross_entropy and hidden are weights and must not be negative")
        refuse_unfit(self.distance, self.signal.gives)
        if self.hidden > 0:
            refuse_unfit(self.hidden_distance, self.signal.gives)

    @property
    def level(self) -> int:
        """The signal's."""
        return self.signal.level

    def loss(self, step: Step) -> Tally:
        """See :meth:`Objective.loss`."""
        return self.on(step, step.rows)

    def on(self, step: Step, rows: Rows) -> Tally:
        """The same loss on other rows than the step's."""
        target = self.signal.target(step.teacher, rows, self.temperature)
        reading = step.student.read(rows, self.signal.student_layers)
        total = self.distance.per_token(reading, target, self.temperature).sum()
        parts = {"distance": float(total.detach())}
        if self.cross_entropy > 0:
            plain = cross_entropy(reading.logits, rows.labels).sum()
            parts["cross-entropy"] = float(plain.detach())
            total = total + self.cross_entropy * plain
        if self.hidden > 0:
            apart = self.hidden_distance.per_token(reading, target).sum()
            parts["hidden"] = float(apart.detach())
            total = total + self.hidden * apart
        return Tally(total, rows.tokens, parts)
