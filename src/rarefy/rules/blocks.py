"""Scales of small blocks: the scale, or scale and minimum, of least weighted error.

    minimise over d, m and units u_j:   sum_j w_j (x_j - d u_j - m)^2

For given units the best d and m are a least-squares solution, and so is the share of the energy
that they explain; for given d and m the best units are the nearest ones. So a block tries many
ranges, asks of each only how much its units could explain, and alternates from the best.

Blocks are float [..., k], weights broadcast against them, and results have shape [...].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

_ALTERNATIONS = 4
_SHARES = (0.86, 0.91, 0.95, 0.98, 1.0, 1.03, 1.07, 1.12, 1.18, 1.25, 1.33, 1.42)
_CUTS = (-0.03, 0.0, 0.04, 0.09, 0.16)
_TINY = 1e-30


@dataclass(frozen=True)
class Levels:
    """The values that a code stands for, in units of the scale.

    Attributes:
        low, high: the smallest and the largest.
        table: all of them, ascending, if they are not the integers in between.
    """

    low: int
    high: int
    table: tuple[int, ...] = ()

    @cached_property
    def _values(self) -> torch.Tensor:
        return torch.tensor(self.table, dtype=torch.float32)

    @cached_property
    def _nearest(self) -> torch.Tensor:
        """Code of every half step of the units from ``low``: borders lie on half steps."""
        halves = torch.arange(2 * self.low, 2 * self.high + 1) / 2 + 0.25
        return torch.bucketize(halves, (self._values[1:] + self._values[:-1]) / 2)

    def codes(self, units: torch.Tensor) -> torch.Tensor:
        """Codes of the nearest values, int64, from 0."""
        if not self.table:
            return units.round().clamp_(self.low, self.high).sub_(self.low).to(torch.int64)
        halves = (2 * units).floor().clamp_(2 * self.low, 2 * self.high).sub_(2 * self.low)
        return (
            self._nearest.to(units.device)
            .index_select(0, halves.long().flatten())
            .reshape(units.shape)
        )

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """float32 values of codes."""
        if not self.table:
            return codes.float().add_(self.low)
        values = self._values.to(codes.device)
        return values.index_select(0, codes.long().flatten()).reshape(codes.shape)

    def nearest(self, units: torch.Tensor) -> torch.Tensor:
        """The nearest values."""
        if not self.table:
            return units.round().clamp_(self.low, self.high)
        return self.values(self.codes(units)).to(units.dtype)


def weights_of(importance: torch.Tensor | None, blocks: torch.Tensor) -> torch.Tensor:
    """Weights of a block's errors with mean one; equal ones where all are zero or unknown.

    Args:
        importance: non-negative, broadcasts against the blocks; None for equal weights.
        blocks: float [..., k].
    """
    if importance is None:
        return torch.ones(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    mean = importance.mean(-1, keepdim=True)
    safe = torch.where(mean > 0, mean, torch.ones_like(mean))
    return torch.where(mean > 0, importance / safe, torch.ones_like(importance)).to(blocks.dtype)


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """``1 / scale``, and 0 where the scale is 0."""
    return torch.where(scale == 0, scale, 1 / torch.where(scale == 0, 1.0, scale))


def symmetric(x: torch.Tensor, w: torch.Tensor, levels: Levels) -> torch.Tensor:
    """The scale of each block, of either sign, without a minimum.

    Args:
        x: blocks. w: weights, see :func:`weights_of`. levels: what codes stand for.
    """
    wx = w * x
    peak = x.abs().amax(-1, keepdim=True)
    most = max(-levels.low, levels.high)
    best = torch.zeros_like(peak.squeeze(-1))
    scale = torch.zeros_like(best)
    shares = _SHARES if most < 64 else (0.99, 0.995, 1.0)
    for reach in (sign * share * most for sign in (1, -1) for share in shares):
        u = levels.nearest(x * (reach * inverse(peak)))
        a, b = (wx * u).sum(-1), (w * u * u).sum(-1).clamp_(min=_TINY)
        gain = a * a / b
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, a / b, scale)
    for _ in range(_ALTERNATIONS):
        u = levels.nearest(x * inverse(scale).unsqueeze(-1))
        a, b = (wx * u).sum(-1), (w * u * u).sum(-1)
        scale = torch.where(b > 0, a / b.clamp(min=_TINY), scale)
    return scale


@dataclass(frozen=True)
class _Sums:
    """What least squares needs to know of a block beside its units."""

    w: torch.Tensor
    wx: torch.Tensor
    below: bool  # the minimum may not be positive

    @cached_property
    def total(self) -> torch.Tensor:
        return self.w.sum(-1).expand(self.wx.shape[:-1])

    @cached_property
    def first(self) -> torch.Tensor:
        return self.wx.sum(-1)

    def solve(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Best scale and minimum for units, and the energy that they explain."""
        wu = self.w * u
        a, b, c = (self.wx * u).sum(-1), (wu * u).sum(-1), wu.sum(-1)
        det = self.total * b - c * c
        flat = det <= 1e-9 * self.total * b
        scale = (self.total * a - self.first * c) / torch.where(flat, 1.0, det)
        alone = a / b.clamp(min=_TINY)  # the best scale without a minimum
        scale = torch.where(flat, torch.zeros_like(scale), scale)
        minimum = (self.first - scale * c) / self.total
        if self.below:
            scale = torch.where(minimum > 0, alone, scale)
            minimum = minimum.clamp(max=0)
        scale = scale.clamp(min=0)
        return scale, minimum, scale * a + minimum * self.first


def affine(
    x: torch.Tensor, w: torch.Tensor, top: int, *, below: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the minimum of each block, for codes ``0 .. top``.

    Args:
        x: blocks. w: weights, see :func:`weights_of`. top: the largest code.
        below: the minimum may not be positive.
    """
    sums = _Sums(w, w * x, below)
    lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if below:
        lo = lo.clamp(max=0)
    best = torch.full_like(lo.squeeze(-1), -torch.inf)
    scale, minimum = torch.zeros_like(best), torch.zeros_like(best)
    for cut_lo, cut_hi in ((a, b) for a in _CUTS for b in _CUTS):
        width = (hi - lo) * (1 - cut_lo - cut_hi)
        start = lo + cut_lo * (hi - lo)
        u = ((x - start) * (top * inverse(width))).round_().clamp_(0, top)
        d, m, gain = sums.solve(u)
        better = gain > best
        best = torch.where(better, gain, best)
        scale, minimum = torch.where(better, d, scale), torch.where(better, m, minimum)
    for _ in range(_ALTERNATIONS):
        d, m = scale.unsqueeze(-1), minimum.unsqueeze(-1)
        scale, minimum, _ = sums.solve(((x - m) * inverse(d)).round_().clamp_(0, top))
    return scale, minimum
