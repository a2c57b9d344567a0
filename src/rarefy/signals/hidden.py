"""The teacher's hidden states at mapped layers, and its logits, from one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rarefy.losses.base import Target
from rarefy.signals.base import SIGNALS, Signal, require_teacher

if TYPE_CHECKING:
    from rarefy.objectives.policy import Policy
    from rarefy.objectives.rows import Rows


@SIGNALS.register("hidden", family="distillation")
@dataclass(frozen=True)
class Hidden(Signal):
    """Hidden states of layers that the user maps.

    Attributes:
        layers: student:teacher pairs, "4:8,8:16,-1:-1". 0 is the embedding, i the output of block
            i, and -1 the last state, behind the final norm.
    """

    layers: str = "-1:-1"

    def __post_init__(self) -> None:
        try:
            sizes = {len([int(end) for end in pair.split(":")]) for pair in self.layers.split(",")}
        except ValueError:
            sizes = set()
        if sizes != {2}:
            raise ValueError(
                f"layers must be student:teacher pairs such as 4:8,-1:-1, not {self.layers!r}"
            )

    def _ends(self, side: int) -> tuple[int, ...]:
        return tuple(int(pair.split(":")[side]) for pair in self.layers.split(","))

    @property
    def gives(self) -> frozenset[str]:
        """States and logits."""
        return frozenset({"states", "logits"})

    @property
    def level(self) -> int:
        """Hidden states."""
        return 5

    @property
    def student_layers(self) -> tuple[int, ...]:
        """The pairs' first halves."""
        return self._ends(0)

    @torch.no_grad()
    def target(self, teacher: Policy | None, rows: Rows, temperature: float = 1.0) -> Target:
        """States [N, d] of each pair and logits [N, V]; see :meth:`Signal.target`."""
        model = require_teacher(teacher, self.level, "the signal 'hidden'")
        reading = model.read(rows, self._ends(1))
        return Target(logits=reading.logits, states=reading.states)
