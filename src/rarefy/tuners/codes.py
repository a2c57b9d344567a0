"""Codes and scales of a quantized model, learned together from the dense model's outputs.

    W = s (1 + d) (clip(round(u), lo, hi))        dL/du = s (1 + d) dL/dW     (straight through)
                                                  dL/dd = s sum over the group of dL/dW * code

Solvers and block tuners lower the error of a matrix or of a block. What counts is the error of the
whole model's output, and its gradient says for every weight which of its two neighbours on the grid
is the better one. Gradients pass through the rounding as in LLM-QAT (Liu et al., 2023, arXiv
2305.17888); first block by block, then only what is stored, is the order of EfficientQAT (Chen et
al., 2024, arXiv 2407.11062).

    u   position of a weight in codes, [out, in]; its code is the nearest
    d   change of a scale as a share of it, [out, G]
    lo, hi   least and largest code of a group, less its zero point

Where we differ, and why:
 * u begins in the middle of its code's interval and can travel ``reach`` in the whole run, a little
   more than half a code. Codes that a solver has chosen belong together; only a gradient that
   points the same way almost all the time carries one over the border. Begun where the dense weight
   lies, close to a border as often as not, noise alone undid what the solver had done.
 * Zero points stay, so that the file keeps its size and its kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rarefy.tuners.adapters import Recomputed, Training, straight_through
from rarefy.tuners.base import TUNERS, Adapter, MatrixView, Outcome

if TYPE_CHECKING:
    from rarefy.formats.base import Grid

_LEAST = torch.finfo(torch.float16).tiny  # of a scale; smaller ones cannot be stored well


@TUNERS.register("codes", family="quantization")
@dataclass(frozen=True)
class Codes(Training):
    """Codes and scales of matrices that lie on a grid of integers; all else is frozen.

    Attributes:
        reach: how far a position can travel in the whole run, in codes; 0 for scales alone.
        norms: whether the norms' weights move, too.

    Raises:
        ValueError: a field outside its values.
    """

    learning_rate: float = 5e-4
    reach: float = 0.7
    norms: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reach < 0:
            raise ValueError(f"reach must be at least 0, not {self.reach}")

    @property
    def travel(self) -> float:
        """Codes that a position moves where a scale moves by its whole size."""
        path = self.learning_rate * sum(self.loop.factor(step) for step in range(self.steps))
        return self.reach / path if path else 0.0

    def adapt(self, matrix: MatrixView) -> Adapter | None:
        """The matrix as codes times scales; None where its grid has no ranges."""
        grid = matrix.grid
        if grid is None or not (grid.form.learnable and grid.form.scaled):
            return None
        return _Codes(matrix, grid, self)

    def moves(self, name: str, norm: bool) -> bool:
        """As the option says."""
        return norm and self.norms


class _Codes(Recomputed):
    start: torch.Tensor
    begin: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    pitch: torch.Tensor

    def __init__(self, matrix: MatrixView, grid: Grid, tuner: Codes) -> None:
        super().__init__()
        self.grid, self.travel = grid, tuner.travel
        self.columns = matrix.weight.shape[1]
        low, high = grid.limits()
        self.register_buffer("start", grid.scales.detach())
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("pitch", grid.pitch)
        self.register_buffer(
            "begin", grid.units(matrix.weight.detach()) / grid.spread(grid.pitch, self.columns)
        )
        self.moved = nn.Parameter(torch.zeros_like(self.begin), requires_grad=self.travel > 0)
        self.share = nn.Parameter(torch.zeros_like(self.start))

    def _position(self) -> torch.Tensor:
        return self.begin + self.travel * self.moved

    def _units(self, position: torch.Tensor) -> torch.Tensor:
        low, high = (self.grid.spread(end, self.columns) for end in (self.low, self.high))
        units = torch.clamp(low + (position - low).round(), low, high)
        return units if self.grid.support is None else units * self.grid.support

    def _times(self, units: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return units * self.grid.spread(scales * self.pitch, self.columns)

    def matrix(self) -> torch.Tensor:
        """See :meth:`Adapter.matrix`."""
        position = self._position()
        units = straight_through(position, self._units(position.detach()))
        return self._times(units, self.start * (1 + self.share))

    @torch.no_grad()
    def constrain(self) -> None:
        """Positions stay within half a code of the range, and scales large enough to be stored."""
        size = self.start.abs()
        self.share.clamp_(min=size.clamp(max=_LEAST) / size - 1)
        if self.moved.requires_grad:
            low, high = (self.grid.spread(end, self.columns) for end in (self.low, self.high))
            bounded = torch.clamp(self._position(), low - 0.5, high + 0.5)
            self.moved.copy_((bounded - self.begin) / self.travel)

    @torch.no_grad()
    def finish(self) -> Outcome:
        """Codes and scales, in the form that is stored."""
        grid = self.grid.rescaled(self.start * (1 + self.share))
        return Outcome(self._times(self._units(self._position()), grid.scales), grid)
