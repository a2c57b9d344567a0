"""Blocks of ggml as bytes: where codes and scales lie.

Layouts are those of the GGUF format, little-endian; ``h`` is a float16. Rows of codes are whole
blocks, and every function turns [rows, ...] into uint8 [rows, bytes].

    32 weights    h scale, h minimum if any, fifth bits if any, nibbles j and j + 16 in one byte
    256 weights   see each function
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

Octets: TypeAlias = "NDArray[Any]"  # uint8; numpy types shifts of uint8 as integers

SUPER = 256


def small(
    codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None, bits: int
) -> Octets:
    """Blocks of 32: q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl.

    Args:
        codes: integers from 0, [m, n]. scale, minimum: one a block, [m, n / 32]. bits: of a code.
    """
    q = _octets(codes).reshape(-1, 32)
    parts = [_halves(part) for part in (scale, minimum) if part is not None]
    if bits == 8:
        parts.append(q ^ np.uint8(128))  # ggml stores them signed
    else:
        if bits == 5:
            parts.append(np.packbits(q >> 4, axis=1, bitorder="little"))
        parts.append((q[:, :16] & 15) | (q[:, 16:] << 4))
    return _rows(parts, len(codes))


def q2_k(
    codes: torch.Tensor, steps: tuple[torch.Tensor, torch.Tensor], super_: Sequence[torch.Tensor]
) -> Octets:
    """Two bits: scales and minima in nibbles, crumbs, h scale, h minimum.

    Args:
        codes: [m, n]. steps: scales and minima of sub-blocks in units of the super-blocks'.
        super_: scale and minimum of each super-block, [m, n / 256].
    """
    scale, minimum = (_octets(step).reshape(-1, 16) for step in steps)
    halves = [_halves(one) for one in super_]
    return _rows([scale | (minimum << 4), _crumbs(_octets(codes)), *halves], len(codes))


def q3_k(codes: torch.Tensor, steps: torch.Tensor, scale: torch.Tensor) -> Octets:
    """Three bits: high bits, crumbs, six-bit scales (plus 32), h scale."""
    q, u = _octets(codes), _octets(steps + 32).reshape(-1, 16)
    high = (q >> 2).reshape(-1, 8, 32)  # bit 4 h + k of byte l belongs to weight 128 h + 32 k + l
    low = (u[:, :8] & 15) | ((u[:, 8:] & 15) << 4)
    fours = (u >> 4).reshape(-1, 4, 4)
    parts = [_stacked(high, 1), _crumbs(q & 3), low, _stacked(fours, 2), _halves(scale)]
    return _rows(parts, len(codes))


def q45_k(
    codes: torch.Tensor,
    steps: tuple[torch.Tensor, torch.Tensor],
    super_: Sequence[torch.Tensor],
    bits: int,
) -> Octets:
    """Four or five bits: h scale, h minimum, six-bit scales and minima, fifth bits, nibbles."""
    q = _octets(codes).reshape(-1, 8, 32)
    scale, minimum = (_octets(step).reshape(-1, 8) for step in steps)
    steps12 = np.concatenate(
        [
            (scale[:, :4]) | ((scale[:, 4:] >> 4) << 6),
            (minimum[:, :4]) | ((minimum[:, 4:] >> 4) << 6),
            (scale[:, 4:] & 15) | ((minimum[:, 4:] & 15) << 4),
        ],
        axis=1,
    )
    fifth = [_stacked(q >> 4, 1)] if bits == 5 else []
    nibbles = (q[:, 0::2] & 15) | ((q[:, 1::2] & 15) << 4)
    parts = [*(_halves(one) for one in super_), steps12, *fifth, nibbles.reshape(len(q), 128)]
    return _rows(parts, len(codes))


def q6_k(codes: torch.Tensor, steps: torch.Tensor, scale: torch.Tensor) -> Octets:
    """Six bits: nibbles, crumbs, signed scales of a byte, h scale."""
    q = _octets(codes)
    quarters = (q & 15).reshape(-1, 2, 2, 64)  # [block, half, nibble, byte]
    low = quarters[:, :, 0] | (quarters[:, :, 1] << 4)
    signed = steps.cpu().numpy().astype(np.int8).view(np.uint8).reshape(-1, 16)
    return _rows([low.reshape(-1, 128), _crumbs(q >> 4), signed, _halves(scale)], len(codes))


def _octets(numbers: torch.Tensor) -> Octets:
    found: Octets = numbers.cpu().numpy().astype(np.uint8)
    return found


def _halves(numbers: torch.Tensor) -> Octets:
    """float16, two bytes for each block."""
    return numbers.half().cpu().contiguous().numpy().reshape(-1, 1).view(np.uint8)


def _stacked(parts: Octets, bits: int) -> Octets:
    """[block, k, l] -> [block, l]: part k in bits ``k * bits`` of each byte."""
    shifts = np.arange(0, parts.shape[1] * bits, bits, dtype=np.uint8)
    found: Octets = np.bitwise_or.reduce(parts << shifts[:, None], axis=1)
    return found


def _crumbs(q: Octets) -> Octets:
    """Two bits of each weight: weight 128 h + 32 k + l in bits 2 k of byte 32 h + l."""
    return _stacked(q.reshape(-1, 4, 32), 2).reshape(-1, 64)


def _rows(parts: list[Octets], rows: int) -> Octets:
    return np.concatenate(parts, axis=1).reshape(rows, -1)
