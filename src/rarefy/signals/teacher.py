"""The teacher's logits, computed when they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rarefy.losses.base import Target
from rarefy.signals.base import SIGNALS, Signal, require_teacher

if TYPE_CHECKING:
    from rarefy.objectives.policy import Policy
    from rarefy.objectives.rows import Rows


@SIGNALS.register("teacher", family="distillation")
@dataclass(frozen=True)
class Teacher(Signal):
    """One forward pass of the teacher for every batch; any text will do."""

    @property
    def gives(self) -> frozenset[str]:
        """Dense logits."""
        return frozenset({"logits"})

    @property
    def level(self) -> int:
        """Logits over the whole vocabulary."""
        return 3

    @torch.no_grad()
    def target(self, teacher: Policy | None, rows: Rows, temperature: float = 1.0) -> Target:
        """Logits [N, V]; see :meth:`Signal.target`."""
        model = require_teacher(teacher, self.level, "the signal 'teacher'")
        return Target(logits=model.read(rows).logits)
