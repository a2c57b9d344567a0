"""PEQA: train the scales of a quantized model; its codes and zero points stay.

    W = (s + ds) * (C - z)          dL/ds = sum over the group of dL/dW * (C - z)

Kim, Lee, Kim, Park, Yoo, Kwon, Lee, Memory-Efficient Fine-Tuning of Compressed Large Language
Models via sub-4-bit Integer Quantization, NeurIPS 2023 (arXiv 2305.14152).

Symbols: C codes, z zero points, s one scale a row or a group of columns. Nothing is rounded in
training, so the gradient is exact. What tells one task from another is the scales alone.

With ``relative`` the numbers that move are shares, ``s (1 + d)``, so that Adam's steps, which are
all of one size, fit large and small scales alike; the paper moves s itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import nn

from rarefy.tuners.adapters import Recomputed, Training
from rarefy.tuners.base import TUNERS, Adapter, MatrixView, Outcome

if TYPE_CHECKING:
    from rarefy.formats.base import Format, Grid

_LEAST = torch.finfo(torch.float16).tiny  # of a scale; smaller ones cannot be stored well


@TUNERS.register(
    "scales",
    family="quantization",
    paper="Kim et al., PEQA, NeurIPS 2023",
    arxiv="2305.14152",
)
@dataclass(frozen=True)
class Scales(Training):
    """The scales of matrices that lie on a grid; all others are frozen.

    Attributes:
        relative: move shares of the scales instead of the scales.
    """

    learning_rate: float = 2e-5
    relative: bool = False

    def adapt(self, matrix: MatrixView) -> Adapter | None:
        """The matrix as its scales times its codes; None for a matrix without scales."""
        grid = matrix.grid
        if grid is None or not grid.form.scaled:
            return None
        return _Scales(matrix, grid, self.relative)

    def moving(self, shape: tuple[int, int], form: Format | None) -> int:
        """One number for each stored scale."""
        stored = form.layout(*shape) if form is not None and form.scaled else {}
        return prod(stored["weight_scale"][0]) if "weight_scale" in stored else 0


class _Scales(Recomputed):
    units: torch.Tensor
    start: torch.Tensor

    def __init__(self, matrix: MatrixView, grid: Grid, relative: bool) -> None:
        super().__init__()
        self.grid, self.relative = grid, relative
        # Eight bits and a sign at most; kept small, because this is most of the memory.
        self.register_buffer("units", units_of(matrix, grid).to(torch.int16))
        self.register_buffer("start", grid.scales.detach())
        self.moving = nn.Parameter(torch.zeros_like(self.start) if relative else self.start.clone())

    def scales(self) -> torch.Tensor:
        return self.start * (1 + self.moving) if self.relative else self.moving

    def _times(self, scales: torch.Tensor) -> torch.Tensor:
        return self.units.float() * self.grid.spread(scales, self.units.shape[1])

    def matrix(self) -> torch.Tensor:
        return self._times(self.scales())

    @torch.no_grad()
    def constrain(self) -> None:
        """Scales keep their sign, and stay large enough to be stored."""
        sign, size = self.start.sign(), self.start.abs()
        least = size.clamp(max=_LEAST)
        if self.relative:
            self.moving.clamp_(min=(least - size) / size.clamp(min=1e-30))
        else:
            self.moving.copy_((self.moving * sign).clamp_(min=least) * sign)

    @torch.no_grad()
    def finish(self) -> Outcome:
        grid = self.grid.rescaled(self.scales())
        return Outcome(self._times(grid.scales), grid)


def units_of(matrix: MatrixView, grid: Grid) -> torch.Tensor:
    """What the codes stand for, [out, in]: what is decoded if all scales are one."""
    if matrix.packed is None:
        return grid.units(matrix.weight.detach())
    ones = {"weight_scale": torch.ones_like(matrix.packed["weight_scale"])}
    return grid.form.decode(matrix.packed | ones)
