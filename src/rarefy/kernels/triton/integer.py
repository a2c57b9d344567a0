"""Products with grouped integers of 2, 4 or 8 bits on a GPU, read as they are stored.

    y[t, r] = sum_c x[t, c] W'[r, c]        W'[r, c] = scale (code - zero)

The layout is that of :mod:`rarefy.formats.integer`: int32 words [m, ceil(n b / 32)], codes from the
low bits up; scales [m, G] of 16 bits; zero points packed along the rows, [ceil(m b / 32), G]. Each
product is formed in float32 from x and from W' rounded to the type of x, and float32 is multiplied
as such, not as TensorFloat-32.

Few vectors go through sums of elementwise products, many through ``tl.dot``. Block sizes are
plausible and not tuned.
"""

# What triton compiles has its own types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rarefy.errors import RarefyError

BITS = (2, 4, 8)  # widths whose codes do not cross a word border
_WHOLE_ROW = 1 << 30
_FEW = 4  # vectors, each of which decodes the matrix for itself


@triton.jit
def _weights(
    words, scales, zeros, rows, start, m, n, words_per_row, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W' [rows, start .. start + BLOCK] in float32; zero outside the matrix."""
    PER: tl.constexpr = 32 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    columns = start + tl.arange(0, BLOCK)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    at = rows.to(tl.int64)[:, None] * words_per_row + (columns // PER)[None, :]
    word = tl.load(words + at, mask=inside, other=0)
    code = (word >> ((columns % PER) * BITS)[None, :]) & MASK
    if GROUP % BLOCK == 0:  # the block lies in one group: one scale a row is read
        group = tl.zeros([1, 1], tl.int32) + start // GROUP
    else:
        group = (columns // GROUP)[None, :]
    known = (rows < m)[:, None] & (group < groups)
    scale = tl.load(scales + rows[:, None] * groups + group, mask=known, other=0.0)
    if SYMMETRIC:
        zero = 1 << (BITS - 1)
    else:
        above = tl.load(zeros + (rows // PER)[:, None] * groups + group, mask=known, other=0)
        zero = (above >> ((rows % PER) * BITS)[:, None]) & MASK
    value = (code - zero).to(tl.float32) * scale.to(tl.float32)
    return tl.where(inside, value, 0.0)


@triton.jit
def _few_vectors(
    x, words, scales, zeros, y, m, n, words_per_row, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One vector and ROWS rows a program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    vector = tl.program_id(1).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        w = _weights(
            words, scales, zeros, rows, start, m, n, words_per_row, groups,
            BITS, GROUP, SYMMETRIC, BLOCK,
        )  # fmt: skip
        columns = start + tl.arange(0, BLOCK)
        some = tl.load(x + vector * n + columns, mask=columns < n, other=0.0)
        total += w.to(some.dtype).to(tl.float32) * some.to(tl.float32)[None, :]
    out = tl.sum(total, 1).to(y.dtype.element_ty)
    tl.store(y + vector * m + rows, out, mask=rows < m)


@triton.jit
def _many_vectors(
    x, words, scales, zeros, y, m, n, words_per_row, groups, vectors,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """VECTORS vectors and ROWS rows a program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(1) * VECTORS + tl.arange(0, VECTORS)
    wide = which.to(tl.int64)[:, None]
    total = tl.zeros([VECTORS, ROWS], tl.float32)
    for start in range(0, n, BLOCK):
        w = _weights(
            words, scales, zeros, rows, start, m, n, words_per_row, groups,
            BITS, GROUP, SYMMETRIC, BLOCK,
        )  # fmt: skip
        columns = start + tl.arange(0, BLOCK)
        inside = (which < vectors)[:, None] & (columns < n)[None, :]
        some = tl.load(x + wide * n + columns[None, :], mask=inside, other=0.0)
        total = tl.dot(some, tl.trans(w.to(some.dtype)), total, input_precision="ieee")
    inside = (which < vectors)[:, None] & (rows < m)[None, :]
    tl.store(y + wide * m + rows[None, :], total.to(y.dtype.element_ty), mask=inside)


def product(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group: int | None,
) -> torch.Tensor:
    """``x W'^T`` from stored integers.

    Args:
        x: float32, float16 or bfloat16, [..., n].
        words: int32 [m, ceil(n * bits / 32)].
        scales: float16 or bfloat16 [m, G].
        zeros: int32 [ceil(m * bits / 32), G], or None for symmetric codes.
        bits: 2, 4 or 8.
        group: columns that share a scale; None for whole rows.

    Returns:
        [..., m] in the type of x.

    Raises:
        RarefyError: another width.
    """
    if bits not in BITS:
        raise RarefyError(
            f"no kernel for GPUs reads {bits} bits; store 2, 4 or 8, or use the torch reference"
        )
    m, n = words.shape[0], x.shape[-1]
    flat = x.reshape(-1, n).contiguous()
    vectors = flat.shape[0]
    y = torch.empty(vectors, m, dtype=x.dtype, device=x.device)
    tensors = (flat, words, scales, scales if zeros is None else zeros, y)
    each = group or _WHOLE_ROW
    options = {"BITS": bits, "GROUP": each, "SYMMETRIC": zeros is None}
    sizes = (m, n, words.shape[1], scales.shape[1])
    with torch.cuda.device_of(x):
        if vectors <= _FEW:
            grid = (triton.cdiv(m, 16), vectors)
            block = 128 if each % 128 == 0 else 64
            _few_vectors[grid](*tensors, *sizes, **options, ROWS=16, BLOCK=block)
        else:
            # 16 is the least that tl.dot takes.
            size = min(max(triton.next_power_of_2(vectors), 16), 64)
            grid = (triton.cdiv(m, 64), triton.cdiv(vectors, size))
            # Columns are few, so that float32 fits the shared memory of small GPUs.
            blocks = {"ROWS": 64, "BLOCK": 32, "VECTORS": size}
            _many_vectors[grid](*tensors, *sizes, vectors, **options, **blocks)
    return y.reshape(*x.shape[:-1], m)
