"""Distances between hidden states of mapped layers, averaged over the layers.

They help where depth was cut hard: the teacher's logits alone say little about what the layers in
between should do (Muralidharan et al., *Minitron*, arXiv 2407.14679). Student and teacher must
have the same hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import cosine_similarity

from rarefy.errors import RarefyError
from rarefy.losses.base import LOSSES, Loss, Reading, Target, kinds, refuse_unfit

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def _over_layers(
    loss: Loss, reading: Reading, target: Target, distance: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    refuse_unfit(loss, kinds(target))
    mine, theirs = reading.states, target.states
    if [s.shape for s in mine] != [t.shape for t in theirs]:
        ours, other = ([list(state.shape) for state in side] for side in (mine, theirs))
        raise RarefyError(
            f"the loss {LOSSES.name_of(loss)!r} compares hidden states of one shape, and the "
            f"student's are {ours}, the teacher's {other}; "
            "map as many layers of the same width, or use a loss of the logits"
        )
    return torch.stack([distance(s, t) for s, t in zip(mine, theirs, strict=True)]).mean(0)


@LOSSES.register("hidden-mse", family="distillation")
@dataclass(frozen=True)
class HiddenMSE(Loss):
    """Mean squared difference of the channels.

    Attributes:
        relative: divide by the teacher's mean square of the token. Without it the few tokens with
            enormous states decide everything.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"states"})

    relative: bool = True

    def per_token(self, reading: Reading, target: Target, temperature: float = 1.0) -> Tensor:
        """See :meth:`Loss.per_token`."""

        def distance(s: Tensor, t: Tensor) -> Tensor:
            error = (s - t).square().mean(-1)
            return error / t.square().mean(-1).clamp(min=1e-12) if self.relative else error

        return _over_layers(self, reading, target, distance)


@LOSSES.register("hidden-cosine", family="distillation")
@dataclass(frozen=True)
class HiddenCosine(Loss):
    """One minus the cosine of the angle between the states."""

    accepts: ClassVar[frozenset[str]] = frozenset({"states"})

    def per_token(self, reading: Reading, target: Target, temperature: float = 1.0) -> Tensor:
        """See :meth:`Loss.per_token`."""
        return _over_layers(self, reading, target, lambda s, t: 1 - cosine_similarity(s, t, dim=-1))
