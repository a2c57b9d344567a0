"""Matrices that lie on a grid already, as ggml blocks with the same values: nothing is rounded.

    ours                        codes                ggml
    ggml, any type              as they are          the same type
    int, symmetric              q - 2^(b-1)          q4_0 to 4 bits, q5_0 at 5, q8_0 above
    int, zero points, b <= 3    q - zero             q4_0
    int, zero points, b = 4, 5  q, with a minimum    q4_1, q5_1: -scale * zero has to fit float16
    int, zero points, b = 6, 7  q - zero             q8_0
    bilevel, b <= 5             q, with a minimum    q4_1, q5_1: scales have to fit float16, too

Groups must be whole blocks of 32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rarefy.export.blocks import small
from rarefy.formats.bilevel import Bilevel
from rarefy.formats.ggml import BLOCK, TYPES, Ggml
from rarefy.formats.integer import Int
from rarefy.formats.packing import unpack

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rarefy.export.blocks import Octets
    from rarefy.formats.base import Format

_SYMMETRIC = {2: "q4_0", 3: "q4_0", 4: "q4_0", 5: "q5_0", 6: "q8_0", 7: "q8_0", 8: "q8_0"}
_BILEVEL = {2: "q4_1", 3: "q4_1", 4: "q4_1", 5: "q5_1"}
_ASYMMETRIC = {2: "q4_0", 3: "q4_0", 4: "q4_1", 5: "q5_1", 6: "q8_0", 7: "q8_0"}


def exact_type(fmt: Format, columns: int, packed: Mapping[str, torch.Tensor]) -> str | None:
    """The ggml type that holds a stored matrix without another rounding; None if none does.

    Args:
        fmt: its format. columns: n. packed: its stored tensors.
    """
    if isinstance(fmt, Ggml):
        return fmt.type
    if isinstance(fmt, Bilevel):
        return None if fmt.group % BLOCK or columns % BLOCK else _BILEVEL.get(fmt.bits)
    if not isinstance(fmt, Int) or (fmt.group or columns) % BLOCK or columns % BLOCK:
        return None
    scale = packed["weight_scale"].float()
    if not torch.equal(scale.half().float(), scale):
        return None  # a bfloat16 beyond float16's range
    return (_SYMMETRIC if fmt.symmetric else _ASYMMETRIC).get(fmt.bits)


def exact_blocks(fmt: Format, packed: Mapping[str, torch.Tensor]) -> tuple[Octets, float]:
    """A stored matrix as blocks of its :func:`exact_type`.

    Returns:
        uint8 [m, bytes of a row], and how far float16 moves a value, at most, in steps of the
        grid: 0 unless the type has minima.
    """
    columns = int(packed["weight_shape"][1])
    if isinstance(fmt, Ggml):
        codes = unpack(packed["weight_packed"], fmt.block.bits, columns)
        stored = packed["weight_scale"], packed.get("weight_minimum")
        return small(codes, *stored, fmt.block.bits), 0.0
    assert isinstance(fmt, Int | Bilevel)
    known = _BILEVEL if isinstance(fmt, Bilevel) else _SYMMETRIC if fmt.symmetric else _ASYMMETRIC
    block = TYPES[known[fmt.bits]]
    grid, codes = fmt.stored_grid(packed), unpack(packed["weight_packed"], fmt.bits, columns)
    times = (fmt.group or columns) // BLOCK
    scale, zero = (part.repeat_interleave(times, 1)[:, : columns // BLOCK] for part in
                   (grid.scale, grid.zero))  # fmt: skip
    if block.minimum:
        minimum = -scale * zero
        moved = (minimum.half().float() - minimum).abs()
        moved += (scale.half().float() - scale).abs() * fmt.levels
        return small(codes, scale, minimum, block.bits), float(
            (moved / scale.abs().clamp(min=1e-30)).max()
        )
    units = codes.short() - zero.short().repeat_interleave(BLOCK, 1)
    return small(units - block.levels.low, scale, None, block.bits), 0.0
