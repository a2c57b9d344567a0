"""``rarefy::dense_linear``: a few float32 vectors times a matrix of float32, float16 or bfloat16.

On the CPU torch first converts a 16-bit matrix, which reads and writes it as a whole; the kernel
converts in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812

from rarefy.kernels import library
from rarefy.kernels.call import multiply
from rarefy.kernels.library import Matrix

if TYPE_CHECKING:
    from torch import Tensor

_KINDS = {torch.float32: library.F32, torch.float16: library.F16, torch.bfloat16: library.BF16}
_FEW = 8  # vectors, beyond which torch's product is faster


@torch.library.custom_op("rarefy::dense_linear", mutates_args=())
def dense_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x W^T`` for float32 x [..., n] and W [m, n], giving float32 [..., m]."""
    return F.linear(x, weight.to(x.dtype))


@dense_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@dense_linear.register_kernel("cpu")
def _(x: Tensor, weight: Tensor) -> Tensor:
    if not library.available() or x.dtype is not torch.float32 or weight.dtype not in _KINDS:
        return F.linear(x, weight.to(x.dtype))
    weight = weight.contiguous()
    rows, columns = weight.shape
    matrix = Matrix(kind=_KINDS[weight.dtype], rows=rows, columns=columns, codes=weight.data_ptr())
    return multiply(matrix, x, _FEW)
