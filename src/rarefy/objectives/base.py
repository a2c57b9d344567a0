"""The objective role: the number that the training of a whole model lowers.

The engine owns models, optimizer, masks, files and the loop. For every micro-batch it calls
``objective.loss(step)``, adds up totals and tokens over the optimizer step, and divides once:

    loss of the step = sum of Tally.total / sum of Tally.tokens

so a token weighs the same whichever micro-batch it is in, and on-policy tokens are counted after
they were drawn. An objective with a second branch (plain text beside completions) must not pool
the branches, or the longer texts would drown the shorter ones: each branch is a mean over its own
tokens, and ``at_the_rate_of`` brings the second mean into the first branch's sum. With gradient
accumulation the second branch is then a mean of the micro-batches' means, each weighed by the
first branch's tokens; the first branch stays exact.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rarefy.registry import Registry

if TYPE_CHECKING:
    import torch

    from rarefy.objectives.policy import Policy
    from rarefy.objectives.rows import Rows


@dataclass(frozen=True)
class Step:
    """One micro-batch.

    Attributes:
        student: in training mode, without dropout.
        teacher: in evaluation mode, or None.
        rows: the data.
        generator: for what is drawn; its state should follow from the step, so that a resumed run
            draws the same.
        index: of the optimizer step, the same for all of its micro-batches.
        seed: of the run.
        text: plain text for objectives with a language-model term; None means ``rows``.
    """

    student: Policy
    teacher: Policy | None
    rows: Rows
    generator: torch.Generator
    index: int = 0
    seed: int = 0
    text: Rows | None = None

    def coin(self, share: float) -> bool:
        """True in ``share`` of the optimizer steps; a function of seed and index alone."""
        digest = hashlib.sha256(f"coin {self.seed} {self.index}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < share


@dataclass(frozen=True)
class Tally:
    """The loss of a micro-batch, not yet divided.

    Attributes:
        total: sum over the counted tokens, a scalar with a gradient.
        tokens: how many they are.
        parts: what the total is made of, for the log: sums over the same tokens, so that dividing
            by ``tokens`` gives means.
    """

    total: torch.Tensor
    tokens: int
    parts: dict[str, float] = field(default_factory=dict)


def at_the_rate_of(tokens: int, total: torch.Tensor, own: int) -> torch.Tensor:
    """A branch's sum over its ``own`` tokens as if it had another branch's number of ``tokens``."""
    return total * (tokens / max(1, own))


class Objective(ABC):
    """A loss of a micro-batch; subclasses are frozen dataclasses whose fields are the options."""

    @property
    def level(self) -> int:
        """Capability that the teacher must have, 0 (no teacher) to 5; see ``teachers/base.py``."""
        return 0

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher must be loaded."""
        return self.level > 0

    @abstractmethod
    def loss(self, step: Step) -> Tally:
        """Loss of a micro-batch.

        Raises:
            RarefyError: there is no teacher.
            TeacherCapabilityError: its level is too low.
        """


OBJECTIVES: Registry[Objective] = Registry("objective", Objective, "rarefy.objectives")  # type: ignore[type-abstract]
