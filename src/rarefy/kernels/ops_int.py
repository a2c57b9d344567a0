"""Operators on grouped integers, ``rarefy::int_linear``, ``int8_linear`` and ``int_rows``.

Stored tensors are those of :class:`rarefy.formats.integer.Int`; group 0 is one group a row. Tensors
on the CPU go to the compiled library where it is loaded, others to the reference. No operator has a
gradient.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from rarefy.kernels import library, reference
from rarefy.kernels.many import multiply_many

# Up to this many vectors the kernel reads codes again for every eight of them; beyond, decoding a
# strip of rows and multiplying by it in torch is faster.
FEW = 24

# Channels of a token that share a scale where the library rounds them and they do not all.
INPUT_GROUP = 64

_TYPES = {
    torch.float32: library.SCALE_F32,
    torch.float16: library.SCALE_F16,
    torch.bfloat16: library.SCALE_BF16,
    torch.uint8: library.SCALE_U8,
}


@torch.library.custom_op("rarefy::int_linear", mutates_args=())
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
    """``x W^T`` with the weights that decoding gives.

    Args:
        x: [..., n].
        codes: int32 [m, words].
        scales: float16 or bfloat16 [m, G]; uint8 where there are units.
        zeros: int32 [words(m), G]; None when symmetric.
        bits: 2 to 8.
        group: columns a group, or 0.
        zero_bits: of a zero point, 0 for ``bits``; see :func:`reference.int_rows`.
        units: float32 [m] that multiply the rows' scales, or None.

    Returns:
        [..., m] in x's type.
    """
    return reference.int_linear(x, codes, scales, zeros, bits, group, zero_bits, units)


@torch.library.custom_op("rarefy::int8_linear", mutates_args=())
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
    """``x W^T`` with x rounded to int8 and integer sums; see :func:`reference.int8_linear`.

    Args:
        x, codes, scales, zeros, bits, group, zero_bits, units: see :func:`int_linear`.
        input_scale: [1], one scale for all of x; None for scales of their own.
        input_group: channels of a token that share one, or 0 for all.
    """
    more = (input_group, zero_bits, units)
    return reference.int8_linear(x, codes, scales, zeros, input_scale, bits, group, *more)


@torch.library.custom_op("rarefy::int_rows", mutates_args=())
def int_rows(
    ids: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group: int,
    columns: int,
    zero_bits: int = 0,
    units: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows by number, float32 [..., n] for ids [...]; other arguments as in :func:`int_linear`."""
    unique, where = torch.unique(ids, return_inverse=True)
    more = (unique, zero_bits, units)
    return reference.int_rows(codes, scales, zeros, bits, group, columns, *more)[where]


@int_linear.register_fake
def _(x, codes, scales, zeros, bits, group, zero_bits=0, units=None):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@int8_linear.register_fake
def _(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, input_scale, bits, group, input_group=0, zero_bits=0, units=None
):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@int_rows.register_fake
def _(ids, codes, scales, zeros, bits, group, columns, zero_bits=0, units=None):  # type: ignore[no-untyped-def]
    return scales.new_empty((*ids.shape, columns), dtype=torch.float32)


@int_linear.register_kernel("cpu")
def cpu_int_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group: int,
    zero_bits: int = 0,
    units: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`int_linear` by the library; without the cost of an operator where nothing traces."""
    if not (library.available() and x.dtype is torch.float32):
        return reference.int_linear(x, codes, scales, zeros, bits, group, zero_bits, units)
    columns, rows = x.shape[-1], codes.shape[0]
    flat = x.reshape(-1, columns).contiguous()
    matrix = describe(codes, scales, zeros, bits, group, columns, zero_bits, units)
    y = x.new_empty((*x.shape[:-1], rows))
    if flat.shape[0] > FEW:
        multiply_many(matrix, flat, y.view(-1, rows))
        return y
    threads, call = torch.get_num_threads(), library.library().rarefy_matvec
    library.check(call(matrix, flat.data_ptr(), y.data_ptr(), flat.shape[0], threads))
    return y


@int8_linear.register_kernel("cpu")
def cpu_int8_linear(
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
    """:func:`int8_linear` by the library."""
    native = library.available() and input_group in (0, INPUT_GROUP)
    if not (native and x.dtype is torch.float32):
        more = (input_group, zero_bits, units)
        return reference.int8_linear(x, codes, scales, zeros, input_scale, bits, group, *more)
    columns, rows = x.shape[-1], codes.shape[0]
    flat = x.reshape(-1, columns).contiguous()
    matrix = describe(codes, scales, zeros, bits, group, columns, zero_bits, units)
    y = x.new_empty((*x.shape[:-1], rows))
    given = None if input_scale is None else input_scale.data_ptr()
    threads, call = torch.get_num_threads(), library.library().rarefy_matvec_int8
    at = (flat.data_ptr(), given, input_group, y.data_ptr())
    library.check(call(matrix, *at, flat.shape[0], threads))
    return y


@int_rows.register_kernel("cpu")
def cpu_int_rows(
    ids: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group: int,
    columns: int,
    zero_bits: int = 0,
    units: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`int_rows` by the library."""
    if not library.available():
        unique, where = torch.unique(ids, return_inverse=True)
        more = (unique, zero_bits, units)
        return reference.int_rows(codes, scales, zeros, bits, group, columns, *more)[where]
    wanted = ids.reshape(-1).long().contiguous()
    out = torch.empty((*ids.shape, columns))
    matrix = describe(codes, scales, zeros, bits, group, columns, zero_bits, units)
    call, threads = library.library().rarefy_decode_rows, torch.get_num_threads()
    library.check(call(matrix, wanted.data_ptr(), wanted.numel(), out.data_ptr(), threads))
    return out


def describe(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group: int,
    columns: int,
    zero_bits: int = 0,
    units: torch.Tensor | None = None,
) -> library.Matrix:
    """The C descriptor of stored tensors, which must stay alive while it is used.

    Args:
        codes, scales, zeros, bits, group: see :func:`int_linear`. columns: n.
        zero_bits: of a zero point, 0 for ``bits``. units: float32 [m], which multiply the rows'
            scales, uint8 then; see :func:`reference.int_rows`.
    """
    return _describe(
        *codes.shape, columns, bits, group, _TYPES[scales.dtype], zero_bits,
        codes.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr(),
        0 if units is None else units.data_ptr(),
    )  # fmt: skip


# Nothing but its arguments goes into a descriptor, so one that is kept cannot be out of date.
@lru_cache(maxsize=4096)
def _describe(
    rows: int, words: int, columns: int, bits: int, group: int, *more: int
) -> library.Matrix:
    scale_type, zero_bits, codes, scales, zeros, units = more
    return library.Matrix(
        kind=library.INT, bits=bits, scale_type=scale_type, symmetric=not zeros, rows=rows,
        columns=columns, group=group, words_per_row=words, codes=codes, scales=scales,
        zeros=zeros or None, units=units or None, zero_bits=zero_bits,
    )  # fmt: skip
