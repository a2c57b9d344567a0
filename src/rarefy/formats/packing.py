"""The one bit packer: unsigned codes as an LSB-first bit stream in little-endian 32-bit words.

Code ``i`` of a row occupies stream bits ``[i*b, i*b + b)``; stream bit ``n`` is bit ``n % 32`` of
word ``n // 32``, so codes of 3, 5, 6 and 7 bits may cross a word border. This is the layout of
compressed-tensors ``pack-quantized`` (along the last axis here).
"""

from __future__ import annotations

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
    n = codes.shape[-1]
    words = words_per_row(n, bits)
    # 32 codes fill exactly `bits` words, so a run of 32 can be treated alike in every row.
    runs = -(-n // 32)
    padded = torch.zeros(*codes.shape[:-1], runs * 32, dtype=torch.int64, device=codes.device)
    padded[..., :n] = codes
    run = padded.reshape(*codes.shape[:-1], runs, 32)
    out = torch.zeros(*run.shape[:-1], bits, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        out[..., word] |= run[..., i] << shift & 0xFFFFFFFF
        if shift + bits > 32:
            out[..., word + 1] |= run[..., i] >> (32 - shift)
    flat = out.flatten(-2)[..., :words]
    # int64 -> int32 keeps the low 32 bits, which is what the view as unsigned words needs.
    return torch.where(flat >= 1 << 31, flat - (1 << 32), flat).to(torch.int32)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Invert :func:`pack`.

    Args:
        packed: int32 [..., ceil(columns * bits / 32)].
        bits: 1 to 8.
        columns: number of codes per row.

    Returns:
        uint8 [..., columns].
    """
    words = packed.shape[-1]
    runs = -(-columns // 32)
    mask = (1 << bits) - 1
    if words != runs * bits:
        packed = torch.nn.functional.pad(packed, (0, runs * bits - words))
    run = packed.reshape(*packed.shape[:-1], runs, bits)
    out = torch.empty(*run.shape[:-1], 32, dtype=torch.uint8, device=packed.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = run[..., word] >> shift
        if shift + bits > 32:
            # The arithmetic shift drags the sign bit in: only the 32 - shift low bits are ours.
            low = code & ((1 << (32 - shift)) - 1)
            code = low | (run[..., word + 1] << (32 - shift))
        out[..., i] = code & mask
    return out.flatten(-2)[..., :columns]
