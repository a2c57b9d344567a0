"""The solver role: given one matrix and statistics of its inputs, find a member of a format.

A solver is a frozen dataclass of hyper-parameters; ``solve`` is a pure function of its arguments
and names no format. The conformance suite checks for every registered solver that the result lies
in the format and that the quantity it claims to lower falls below that of plain rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rarefy.registry import Registry

if TYPE_CHECKING:
    from rarefy.formats.base import Format, Grid
    from rarefy.statistics import Moments


@dataclass(frozen=True)
class Problem:
    """One matrix to be solved.

    Attributes:
        name: for messages.
        weight: float [m, n]. Matrices that read the same input may be stacked by rows.
        gram: mean outer product of the inputs, ``E[x x^T]``, float [n, n], or None.
        moments: per-channel moments of the inputs, or None.
        support: where the result may differ from zero, bool [m, n], as an earlier stage imposed
            it; None when everywhere.
        shared: what was computed from the statistics alone, kept for the other matrices that read
            the same input.
    """

    name: str
    weight: torch.Tensor
    gram: torch.Tensor | None = None
    moments: Moments | None = None
    support: torch.Tensor | None = None
    shared: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Solution:
    """A member of the format.

    Attributes:
        weight: float [m, n], every value on the grid.
        grid: the grid.
        notes: fallbacks that were taken, one sentence each.
    """

    weight: torch.Tensor
    grid: Grid
    notes: tuple[str, ...] = ()


class Solver(ABC):
    """Finds a good member of a format; subclasses are frozen dataclasses.

    Attributes:
        needs: which of "gram" and "moments" ``Problem`` must carry; any of them needs calibration
            data.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def solve(self, problem: Problem, fmt: Format) -> Solution:
        """Return a member of ``fmt`` close to ``problem.weight``."""


def output_error(weight: torch.Tensor, other: torch.Tensor, gram: torch.Tensor) -> float:
    """Relative squared output error ``tr(D H D^T) / tr(W H W^T)``, ``D = W - other``.

    Args:
        weight: W, [m, n]. other: [m, n]. gram: H, [n, n].
    """
    delta = weight - other
    lost = float(((delta @ gram) * delta).sum(dtype=torch.float64))
    total = float(((weight @ gram) * weight).sum(dtype=torch.float64))
    return lost / total if total > 0 else 0.0


SOLVERS: Registry[Solver] = Registry("solver", Solver, "rarefy.solvers")  # type: ignore[type-abstract]
