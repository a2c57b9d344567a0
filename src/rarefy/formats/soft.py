"""Rounding to a grid with gradients: straight-through estimation, in closed form.

    u = w / s + v,   c = clip(round(u + z), 0, L),   w' = s (c - z)

with ``s = (H - Lo) / L`` and ``z = round(-Lo / s)`` from the ends ``Lo = low lo``, ``H = high hi``
of each group's range. Every ``round`` has derivative one, ``clip`` its own (0 outside), hence

    dw'/dw = i     dw'/dv = s i     dw'/ds = (c - z) - i w / s     dw'/dz = s (i - 1)

where i says that the code was not clipped. This is the estimator of SignRound (Cheng et al., 2023)
and of OmniQuant's learnable clipping (Shao et al., 2023); written out, it takes a few passes where
automatic differentiation keeps a dozen copies of the matrix, and compiled a single one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from rarefy.kernels.soft import soft_rounding


@dataclass(frozen=True)
class Ranges:
    """The ranges of a matrix's groups, before and after their factors.

    Attributes:
        lo, hi: ends without factors, [m, G].
        scale, zero: of the grid that the factors lead to, [m, G].
        levels: the largest code L.
        group: columns a group; None for one group a row.
        symmetric: the scale follows the upper factor alone, and the zero point stays.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    levels: int
    group: int | None
    symmetric: bool


def soft_round(
    weight: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    offset: torch.Tensor | None,
    ranges: Ranges,
) -> torch.Tensor:
    """Grid values of a matrix [m, n], differentiable in all that comes before ``ranges``.

    Args:
        weight: float [m, n].
        low, high: factors of the lower and the upper end of each group's range, [m, G].
        offset: added to the codes before rounding, [m, n], or None.
        ranges: what the factors have led to.
    """
    result: torch.Tensor = _SoftRound.apply(weight, low, high, offset, ranges)  # type: ignore[no-untyped-call]
    return result


def _grouped(matrix: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    """[m, n] as [m, G, g]; the last group is filled up with zeros."""
    rows, groups = ranges.scale.shape
    missing = groups * (ranges.group or matrix.shape[1]) - matrix.shape[1]
    return (pad(matrix, (0, missing)) if missing else matrix).reshape(rows, groups, -1)


class _SoftRound(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        offset: torch.Tensor | None,
        ranges: Ranges,
    ) -> torch.Tensor:
        ctx.ranges, ctx.columns, ctx.offset = ranges, weight.shape[1], offset is not None
        ctx.kernel = soft_rounding(weight, offset, ranges)
        if ctx.kernel is not None:
            ctx.save_for_backward(weight, offset, low)
            return ctx.kernel.values(weight, offset)  # type: ignore[no-any-return]
        scale, zero = ranges.scale.unsqueeze(-1), ranges.zero.unsqueeze(-1)
        w = _grouped(weight, ranges)
        codes = w / scale
        if offset is not None:
            codes.add_(_grouped(offset, ranges))
        whole = zero.floor()
        codes.add_(zero - whole).round_().add_(whole)
        units = codes.clamp(0, ranges.levels)
        inside = codes == units
        units.sub_(zero)
        ctx.save_for_backward(w, units, inside, low)
        values = (units * scale).to(weight.dtype)
        return values.flatten(1)[:, : weight.shape[1]]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ranges: Ranges = ctx.ranges
        if ctx.kernel is not None:
            weight, offset, low = ctx.saved_tensors
            by_offset, sums = ctx.kernel.back(weight, offset, gradient.contiguous())
            by_units, by_position, through, total = sums.unbind(-1)
        else:
            w, units, inside, low = ctx.saved_tensors
            g = _grouped(gradient, ranges)
            kept = g * inside
            by_units, by_position = (g * units).sum(-1), (kept * w).sum(-1)
            through, total = kept.sum(-1), g.sum(-1)
            by_offset = (kept * ranges.scale.unsqueeze(-1)).flatten(1)[:, : ctx.columns]
        scale = ranges.scale
        by_scale = by_units - by_position / scale
        if ranges.symmetric:
            by_low, by_high = None, by_scale * ranges.hi * 2 / ranges.levels
        else:
            by_zero = (through - total) * scale
            by_scale = by_scale + by_zero * (ranges.lo * low) / scale.square()
            by_high = by_scale / ranges.levels * ranges.hi
            by_low = (-by_scale / ranges.levels - by_zero / scale) * ranges.lo
        by_weight = None
        if ctx.needs_input_grad[0]:
            by_weight = by_offset / scale.repeat_interleave(_span(ctx), 1)[:, : ctx.columns]
        return by_weight, by_low, by_high, by_offset if ctx.offset else None, None


def _span(ctx: Any) -> int:
    """Columns a group."""
    return int(ctx.ranges.group or ctx.columns)
