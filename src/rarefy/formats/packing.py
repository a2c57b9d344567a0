"""The one bit packer: unsigned codes as an LSB-first bit stream in little-endian 32-bit words.

Code ``i`` of a row occupies stream bits ``[i*b, i*b + b)``; stream bit ``n`` is bit ``n % 32`` of
word ``n // 32``, so codes of 3, 5, 6 and 7 bits may cross a word border. This is the layout of
compressed-tensors ``pack-quantized`` (along the last axis here).

Eight codes fill exactly ``b`` bytes, whatever ``b`` is: that is the unit both directions work in.
"""

from __future__ import annotations

from functools import cache

import torch

from rarefy.errors import RarefyError


def words_per_row(columns: int, bits: int) -> int:
    """32-bit words that hold ``columns`` codes of ``bits`` bits."""
    return -(-columns * bits // 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes along the last axis.

    Args:
        codes: integer tensor [..., n] of values in [0, 2**bits).
        bits: 1 to 8.

    Returns:
        int32 [..., ceil(n * bits / 32)]; the unused high bits of the last word are zero.

    Raises:
        RarefyError: a code does not fit, which would corrupt its neighbours.

    Example:
        >>> hex(pack(torch.arange(8), 4).item() & 0xFFFFFFFF)
        '0x76543210'
    """
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise RarefyError(f"a code lies outside 0..{(1 << bits) - 1}; clamp codes before packing")
    *front, n = codes.shape
    eights = -(-n // 8)
    units = torch.nn.functional.pad(codes.long(), (0, eights * 8 - n)).reshape(*front, eights, 8)
    stream = (units << torch.arange(0, 8 * bits, bits, device=codes.device)).sum(-1, keepdim=True)
    octets = (stream >> torch.arange(0, 8 * bits, 8, device=codes.device)) & 0xFF
    octets = octets.to(torch.uint8).reshape(*front, eights * bits)
    wanted = 4 * words_per_row(n, bits)
    octets = torch.nn.functional.pad(octets, (0, max(0, wanted - eights * bits)))
    # Flat before the view: a contiguous tensor may still have odd strides on axes of length one.
    return octets[..., :wanted].reshape(-1).view(torch.int32).reshape(*front, wanted // 4)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Invert :func:`pack`.

    Args:
        packed: int32 [..., ceil(columns * bits / 32)].
        bits: 1 to 8.
        columns: number of codes per row.

    Returns:
        uint8 [..., columns].
    """
    *front, words = packed.shape
    eights = -(-columns // 8)
    octets = packed.reshape(-1).view(torch.uint8).reshape(*front, 4 * words)
    if bits == 8:
        return octets[..., :columns].clone()
    missing = eights * bits - octets.shape[-1]
    octets = torch.nn.functional.pad(octets, (0, max(0, missing)))[..., : eights * bits]
    octets = octets.reshape(*front, eights, bits)
    wide = torch.int32 if bits <= 4 else torch.int64
    stream = octets[..., 0].to(wide)
    for k in range(1, bits):
        stream |= octets[..., k].to(wide) << (8 * k)
    if bits <= 4:
        # Look up four codes at a time: eight shifts of every stream cost several times as much.
        four = (1 << 4 * bits) - 1
        halves = torch.stack((stream & four, (stream >> 4 * bits) & four), -1)
        codes = _quads(bits, packed.device)[halves.reshape(-1)].view(torch.uint8)
    else:
        shifts = torch.arange(0, 8 * bits, bits, dtype=wide, device=packed.device)
        codes = (stream.unsqueeze(-1) >> shifts).bitwise_and_((1 << bits) - 1).to(torch.uint8)
    return codes.reshape(*front, eights * 8)[..., :columns]


@cache
def _quads(bits: int, device: torch.device) -> torch.Tensor:
    """For every run of four codes, the same codes a byte each, as one int32."""
    runs = torch.arange(1 << 4 * bits, device=device)
    shifts = torch.arange(0, 4 * bits, bits, device=device)
    codes = (runs.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).view(torch.int32).squeeze(-1)
