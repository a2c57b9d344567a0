"""Reverse KL from the drawn tokens alone, for teachers that score tokens but show no logits.

    y ~ Q,   r_t = log P(y_t) / Q(y_t),   R_t = sum_{j>=t} r_j / (T - t + 1)
    L = -sum_t rho_t R_t,   rho_t = Q(y_t) / Q_drawn(y_t)

MiniLLM (arXiv 2306.08543) without mixing and without its exact single-step term: the same expected
gradient up to the normalisation of R, and far more noise. It is not that method, and has a name of
its own for that reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rarefy.losses.cross_entropy import cross_entropy
from rarefy.objectives.base import OBJECTIVES, Objective, Step, Tally
from rarefy.objectives.returns import Returns, returns
from rarefy.objectives.sampling import Draw
from rarefy.signals.base import require_teacher


@OBJECTIVES.register("single-sample-rkl", family="distillation")
@dataclass(frozen=True)
class SingleSampleRKL(Objective):
    """Policy gradient with one teacher score for each token.

    Attributes:
        tokens: the most that are drawn for a row.
        prompt: how many first tokens of a row are the prompt; 0 for all before the completion.
        normalise: divide returns by the number of their summands.
    """

    tokens: int = 256
    prompt: int = 0
    normalise: bool = True

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.prompt < 0:
            raise ValueError("tokens must be at least 1 and prompt at least 0")

    @property
    def level(self) -> int:
        """Log-probabilities at given tokens."""
        return 2

    def loss(self, step: Step) -> Tally:
        """See :meth:`Objective.loss`."""
        teacher = require_teacher(step.teacher, self.level, "the objective 'single-sample-rkl'")
        prompts = step.rows.prompts(self.prompt)
        drawn = step.student.sample(prompts, Draw(self.tokens), step.generator)
        log_q = -cross_entropy(step.student.read(drawn.rows).logits, drawn.rows.labels)
        reward = teacher.score(drawn.rows) - log_q.detach()
        R = returns(
            drawn.rows, reward, torch.ones_like(reward), Returns(1.0, self.normalise, own=True)
        )
        total = -((log_q - drawn.log_prob).exp() * R).sum()
        parts = {"log-ratio": -float(reward.sum())}
        return Tally(total, drawn.rows.tokens, parts)
