"""Calls of the compiled products: a described matrix and float vectors in, float vectors out."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from rarefy.kernels import library
from rarefy.kernels.library import check
from rarefy.kernels.many import multiply_many

if TYPE_CHECKING:
    from rarefy.kernels.library import Matrix

SCALES = {
    torch.float32: library.SCALE_F32,
    torch.float16: library.SCALE_F16,
    torch.bfloat16: library.SCALE_BF16,
}


def multiply(matrix: Matrix, x: torch.Tensor, few: int = 8) -> torch.Tensor:
    """``x W^T`` for x [..., n], giving [..., m] in x's type.

    Args:
        matrix: describes W [m, n]; whoever made it keeps what it points to.
        x: on the CPU.
        few: up to so many vectors are multiplied with the stored codes; for more, strips of the
            matrix are decoded and multiplied by BLAS.
    """
    vectors = x.detach().reshape(-1, matrix.columns).float().contiguous()
    y = torch.empty(len(vectors), matrix.rows)
    if len(vectors) > few:
        multiply_many(matrix, vectors, y)
    else:
        arguments = (vectors.data_ptr(), y.data_ptr(), len(vectors), torch.get_num_threads())
        check(library.library().rarefy_matvec(ctypes.byref(matrix), *arguments))
    return y.reshape(*x.shape[:-1], matrix.rows).to(x.dtype)


def decode(matrix: Matrix, row0: int, row1: int) -> torch.Tensor:
    """Rows ``row0 .. row1`` of a described matrix, float32 [row1 - row0, n]."""
    found, threads = torch.empty(row1 - row0, matrix.columns), torch.get_num_threads()
    call = library.library().rarefy_decode
    check(call(ctypes.byref(matrix), row0, row1, found.data_ptr(), threads))
    return found
