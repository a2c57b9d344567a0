"""The products in torch: what kernels are compared with, and what runs where they cannot."""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812

from rarefy.formats.activation import IntActivation
from rarefy.formats.integer import Int
from rarefy.formats.packing import unpack

# Rows are decoded in strips of about this many weights, so a vocabulary-sized head stays cheap.
_STRIP = 1 << 22

_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def int_format(scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, group: int) -> Int:
    """The format of stored tensors; group 0 is one group a row."""
    return Int(bits, group or None, zeros is None, scale_dtype=_NAMES[scales.dtype])


def int_rows(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group: int,
    columns: int,
    rows: slice | torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows of a matrix of grouped integers as float32; see :class:`rarefy.formats.integer.Int`."""
    packed = {"weight_packed": codes, "weight_scale": scales}
    packed["weight_shape"] = torch.tensor([codes.shape[0], columns])
    if zeros is not None:
        packed["weight_zero_point"] = zeros
    return int_format(scales, zeros, bits, group).decode(packed, rows)


def int_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group: int,
) -> torch.Tensor:
    """``x W^T`` for x [..., n], giving [..., m]; weights are decoded in strips."""
    rows, columns = codes.shape[0], x.shape[-1]
    strip = max(32, _STRIP // columns // 32 * 32)
    parts = []
    for start in range(0, rows, strip):
        piece = slice(start, min(rows, start + strip))
        weight = int_rows(codes, scales, zeros, bits, group, columns, piece)
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
) -> torch.Tensor:
    """``s_x sum_g s_g sum_j (q - z) round(x / s_x)``: integer products, as int8 kernels form them.

    Activations are rounded as :class:`rarefy.formats.activation.IntActivation` of 8 bits does, for
    each token, for each ``input_group`` channels of one, or by the given scale. Weights are not
    rounded to the scales' 16-bit type, as decoding does, because the integers are multiplied first.
    """
    columns = x.shape[-1]
    per = "group" if input_group else "token"
    rounded, scale = IntActivation(8, per, group=input_group or 1).codes(x, input_scale)
    fmt = int_format(scales, zeros, bits, group)
    packed = {"weight_scale": scales, "weight_shape": torch.tensor([codes.shape[0], columns])}
    if zeros is not None:
        packed["weight_zero_point"] = zeros
    grid = fmt.stored_grid(packed)
    units = unpack(codes, bits, columns) - grid.spread(grid.zero, columns)
    weight = units * grid.spread(grid.scale, columns)
    return F.linear(rounded * scale, weight) if input_group else F.linear(rounded, weight) * scale
