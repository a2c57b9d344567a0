"""The products in torch: what kernels are compared with, and what runs where they cannot."""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812

from rarefy.formats.activation import IntActivation
from rarefy.formats.packing import unpack

# Rows are decoded in strips of about this many weights, so a vocabulary-sized head stays cheap.
_STRIP = 1 << 22


def int_rows(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group: int,
    columns: int,
    rows: slice | torch.Tensor | None = None,
    zero_bits: int = 0,
    units: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows of a matrix of grouped integers as float32, ``scale (code - zero)``.

    Args:
        codes: int32 [m, words], :mod:`rarefy.formats.packing`'s streams.
        scales: [m, G]. zeros: packed along rows, or None for the middle code.
        bits: of a code. group: columns a group; 0 is one group a row. columns: n.
        rows: which, or None for all.
        zero_bits: of a zero point, 0 for ``bits``; with more it is the packed number over
            ``2**(zero_bits - bits)``.
        units: [m] that multiply the rows' scales, or None.
    """
    wanted = slice(None) if rows is None else rows
    scale, zero = grid(scales, zeros, bits, codes.shape[0], zero_bits, units)
    width = group or columns
    scale, zero = (part[wanted].repeat_interleave(width, 1)[:, :columns] for part in (scale, zero))
    return unpack(codes[wanted], bits, columns).float().sub_(zero).mul_(scale)


def grid(
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    rows: int,
    zero_bits: int = 0,
    units: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points of every group, float32 [m, G]; see :func:`int_rows`."""
    scale = scales.float() if units is None else units.unsqueeze(1) * scales.float()
    if zeros is None:
        return scale, torch.full_like(scale, 1 << (bits - 1))
    wide = zero_bits or bits
    zero = unpack(zeros.T.contiguous(), wide, rows).T.float()
    return scale, zero / (1 << (wide - bits))


def int_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group: int,
    zero_bits: int = 0,
    units: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x W^T`` for x [..., n], giving [..., m]; weights are decoded in strips."""
    rows, columns = codes.shape[0], x.shape[-1]
    strip = max(32, _STRIP // columns // 32 * 32)
    parts = []
    for start in range(0, rows, strip):
        piece = slice(start, min(rows, start + strip))
        more = (piece, zero_bits, units)
        weight = int_rows(codes, scales, zeros, bits, group, columns, *more)
        parts.append(F.linear(x, weight.to(x.dtype)))
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def int8_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    bits: int,
    group: int,
    input_group: int = 0,
    zero_bits: int = 0,
    units: torch.Tensor | None = None,
) -> torch.Tensor:
    """``s_x sum_g s_g sum_j (q - z) round(x / s_x)``: integer products, as int8 kernels form them.

    Activations are rounded as :class:`rarefy.formats.activation.IntActivation` of 8 bits does, for
    each token, for each ``input_group`` channels of one, or by the given scale.
    """
    columns = x.shape[-1]
    per = "group" if input_group else "token"
    rounded, scale = IntActivation(8, per, group=input_group or 1).codes(x, input_scale)
    weight = int_rows(codes, scales, zeros, bits, group, columns, None, zero_bits, units)
    return F.linear(rounded * scale, weight) if input_group else F.linear(rounded, weight) * scale
