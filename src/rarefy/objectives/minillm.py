"""MiniLLM: sequence-level reverse KL by policy gradient.

Paper: Gu, Dong, Wei, Huang, *MiniLLM: Knowledge Distillation of Large Language Models*, ICLR 2024,
arXiv 2306.08543.

    y ~ M = alpha P + (1 - alpha) Q                 token by token
    r_t = log P(y_t) / Q(y_t),   w_t = Q(y_t) / M(y_t)
    L_S = sum_t KL(Q || P)(. | y_<t)                exact over the vocabulary
    R_t = sum_{j>t} g^(j-t-1) r_j / sum_{j>t} g^(j-t-1)
    L_long = -sum_t min(rho_t R_t, clip(rho_t, 1 - e, 1 + e) R_t),   rho_t = Q(y_t) / M(y_t)
    L = L_S + L_long + c L_PT

Symbols: P the teacher, Q the student, g ``gamma``, e ``clip``, L_PT the cross entropy of plain
text. rho carries the gradient; w, r and R are constants; rho = w when y was drawn by the student
as it is now.

Exact form: with g = 1, no clipping, no normalisation of R and w multiplied up (``product``) the
expected gradient is that of KL(Q || P) between whole texts. Leaving out L_long, or counting r_t in
R_t although L_S has it, is not.

Where we differ, and why:
 * R is divided by the number of its summands (their discounts' sum, which is that number at g = 1),
   never 0 where the sum is not empty; the paper's T - t - 1 is;
 * L_S carries no w_t: given the prefix its mean is 1, so that it only adds noise;
 * one update for each draw, where the authors make four epochs over 256 of them; ``draw`` and
   ``surrogate`` are apart, so that a caller may do the same;
 * ``lmops`` has the authors' code instead of their paper: r_t in R_t, rewards doubled and clipped
   at 100, R whitened over the tokens, half of L_PT forward KL. Set ``gamma: 0.95`` with it.
   Padding takes no part, where in their code it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rarefy.losses.base import Target
from rarefy.losses.cross_entropy import cross_entropy, log_likelihood
from rarefy.losses.forward_kl import ForwardKL
from rarefy.losses.reverse_kl import ReverseKL
from rarefy.objectives.base import OBJECTIVES, Objective, Tally, at_the_rate_of
from rarefy.objectives.returns import Returns, prefix_products, returns
from rarefy.objectives.sampling import Draw, Sample
from rarefy.signals.base import require_teacher

if TYPE_CHECKING:
    from torch import Tensor

    from rarefy.objectives.base import Step
    from rarefy.objectives.policy import Policy


@OBJECTIVES.register(
    "minillm",
    family="distillation",
    paper="Gu et al., MiniLLM, ICLR 2024",
    arxiv="2306.08543",
)
@dataclass(frozen=True)
class MiniLLM(Objective):
    """Policy gradient of the reverse KL between whole texts.

    Attributes:
        alpha: share of the teacher in what is drawn, 0 to below 1.
        tokens: the most that are drawn for a row.
        prompt: how many first tokens of a row are the prompt; 0 for all before the completion.
        gamma: discount of a later token's reward, for each token in between.
        clip: how far rho may move the surrogate from 1; None for any distance.
        normalise: divide returns by the number of their summands.
        product: importance weights of the whole prefix, not of one token: exact, and noisy.
        plain_text: c, weight of the language-model term.
        lmops: follow the authors' code where it differs from the paper.
    """

    alpha: float = 0.2
    tokens: int = 256
    prompt: int = 0
    gamma: float = 1.0
    clip: float | None = 0.2
    normalise: bool = True
    product: bool = False
    plain_text: float = 1.0
    lmops: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha must lie in [0, 1), and {self.alpha} does not")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], and {self.gamma} does not")
        if self.tokens < 1 or self.prompt < 0:
            raise ValueError("tokens must be at least 1 and prompt at least 0")

    @property
    def level(self) -> int:
        """Control of every step where the teacher takes part in drawing, else dense logits."""
        return 4 if self.alpha > 0 else 3

    def loss(self, step: Step) -> Tally:
        """See :meth:`Objective.loss`."""
        return self.surrogate(step, self.draw(step))

    def draw(self, step: Step) -> Sample:
        """Text from the mixture of teacher and student."""
        teacher = require_teacher(step.teacher, self.level, "the objective 'minillm'")
        how = Draw(self.tokens, alpha=self.alpha)
        return step.student.sample(step.rows.prompts(self.prompt), how, step.generator, teacher)

    def surrogate(self, step: Step, drawn: Sample) -> Tally:
        """The loss on drawn text, which an earlier state of the student may have drawn."""
        teacher = require_teacher(step.teacher, 3, "the objective 'minillm'")
        single, long = self.policy_terms(step.student, teacher, drawn)
        total, tokens = (single + long).sum(), drawn.rows.tokens
        parts = {
            "single-step": float(single.detach().sum()),
            "long-term": float(long.detach().sum()),
        }
        if self.plain_text > 0:
            text, own = self._plain(step, teacher)
            text = at_the_rate_of(tokens, text, own)
            parts["plain-text"] = float(text.detach())
            total = total + self.plain_text * text
        return Tally(total, tokens, parts)

    def policy_terms(
        self, student: Policy, teacher: Policy, drawn: Sample
    ) -> tuple[Tensor, Tensor]:
        """L_S and L_long of each drawn token, float [N] each."""
        rows, labels = drawn.rows, drawn.rows.labels
        with torch.no_grad():
            p = teacher.read(rows).logits
        reading = student.read(rows)
        single = ReverseKL().per_token(reading, Target(logits=p))
        log_q = -cross_entropy(reading.logits, labels)
        rho = (log_q - drawn.log_prob).exp()
        reward = log_likelihood(p, labels) - log_q.detach()
        weight = rho.detach() if self.product else torch.ones_like(reward)
        kind = Returns(self.gamma, normalise=self.normalise, own=self.lmops)
        if self.lmops:
            reward = (2 * reward).clamp(-100, 100)
        R = returns(rows, reward, weight, kind)
        if self.lmops:
            R = (R - R.mean()) / R.std(correction=0).clamp(min=1e-8)
        gain = rho * R
        if self.clip is not None:
            gain = torch.minimum(gain, rho.clamp(1 - self.clip, 1 + self.clip) * R)
        prefix = prefix_products(rows, weight)
        return prefix * single, -prefix * gain

    def _plain(self, step: Step, teacher: Policy) -> tuple[Tensor, int]:
        rows = step.text or step.rows
        reading = step.student.read(rows)
        total = cross_entropy(reading.logits, rows.labels).sum()
        if self.lmops:
            with torch.no_grad():
                target = Target(logits=teacher.read(rows).logits)
            total = 0.5 * total + 0.5 * ForwardKL().per_token(reading, target).sum()
        return total, rows.tokens
