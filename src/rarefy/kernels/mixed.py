"""LLM.int8()'s product: integers for most channels, floats for the few with outliers.

    y = s_t s_i sum_{j not in O} q_tj q_ij  +  sum_{j in O} x_tj W_ij

See :mod:`rarefy.formats.llm_int8` for what O is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rarefy.formats.llm_int8 import INNER, LLMInt8
from rarefy.formats.packing import unpack
from rarefy.kernels import ops_int

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from rarefy.formats.integer import Int

_EXACT = 1 << 24  # integers that float32 adds up without rounding


def mixed_product(
    x: Tensor,
    fmt: Int,
    packed: Mapping[str, Tensor],
    rounding: LLMInt8,
    kept: Tensor | None = None,
) -> Tensor:
    """``x W^T`` in mixed precision, the integers in torch.

    Args:
        x: [..., n].
        fmt, packed: the stored weights, one group a row.
        rounding: says which channels are outliers.
        kept: weights [m, n] for the outlier channels; by default the stored ones, decoded.

    Returns:
        [..., m].
    """
    apart = rounding.outliers(x)
    codes, scale = INNER.codes(x.masked_fill(apart, 0))
    sums = accumulate(codes, signed_codes(fmt, packed))
    y = sums * scale * packed["weight_scale"].reshape(-1).to(sums.dtype)
    columns = apart.nonzero().squeeze(1)
    return add_outliers(y.to(x.dtype), x, columns, kept, (fmt, packed))


def signed_codes(fmt: Int, packed: Mapping[str, Tensor]) -> Tensor:
    """Codes less their zero points, int16 [m, n], of a format with one group a row."""
    codes = unpack(packed["weight_packed"], fmt.bits, int(packed["weight_shape"][1]))
    zero = fmt.stored_grid(packed).zero
    assert zero.shape[1] == 1, "integers are summed over whole rows"
    return codes.to(torch.int16) - zero.to(torch.int16)


def accumulate(codes: Tensor, weights: Tensor) -> Tensor:
    """Exact integer sums [..., m] of codes [..., n] and weights [m, n], as floats."""
    largest = codes.shape[-1] * 128 * 255
    kind = torch.float32 if largest < _EXACT else torch.float64
    return codes.to(kind) @ weights.to(kind).T


def add_outliers(
    y: Tensor,
    x: Tensor,
    columns: Tensor,
    kept: Tensor | None,
    stored: tuple[Int, Mapping[str, Tensor]],
) -> Tensor:
    """``y`` plus the product of some columns, with kept weights or with the stored ones."""
    if len(columns) == 0:
        return y
    weights = decode_columns(*stored, columns) if kept is None else kept[:, columns]
    return y + x[..., columns] @ weights.to(x.dtype).T


def decode_columns(fmt: Int, packed: Mapping[str, Tensor], columns: Tensor) -> Tensor:
    """Some columns of a stored matrix, float32 [m, k]; of 8 bits no other column is touched."""
    if fmt.bits != 8:
        return fmt.decode(packed)[:, columns]
    octets = packed["weight_packed"].view(torch.uint8)
    grid = fmt.stored_grid(packed)
    group = columns // fmt.group if fmt.group else torch.zeros_like(columns)
    return (octets[:, columns].float() - grid.zero[:, group]) * grid.scale[:, group]


class MixedKernel:
    """Integers times tokens in LLM.int8(); see :class:`rarefy.kernels.bind.Kernel`.

    Args:
        fmt: of the weights.
        rounding: of the activations.
    """

    def __init__(self, fmt: Int, rounding: LLMInt8) -> None:
        self.fmt = fmt
        self.rounding = rounding
        self.name = f"int{fmt.bits} x int8 and fp32"

    def product(
        self, x: Tensor, packed: Mapping[str, Tensor], scale: Tensor | None = None
    ) -> Tensor:
        """See :meth:`Kernel.product`."""
        return self._by(ops_int.int8_linear, x, packed)

    def direct(
        self, x: Tensor, packed: Mapping[str, Tensor], scale: Tensor | None = None
    ) -> Tensor:
        """The same on the CPU, and not as an operator, which would import torch's compiler."""
        return self._by(ops_int.cpu_int8_linear, x, packed)

    def _by(
        self, operator: Callable[..., Tensor], x: Tensor, packed: Mapping[str, Tensor]
    ) -> Tensor:
        apart = self.rounding.outliers(x)
        codes, scales = packed["weight_packed"], packed["weight_scale"]
        zeros, group = packed.get("weight_zero_point"), self.fmt.group or 0
        inner = x.masked_fill(apart, 0)
        y = operator(inner, codes, scales, zeros, None, self.fmt.bits, group)
        columns = apart.nonzero().squeeze(1)
        return add_outliers(y, x, columns, None, (self.fmt, packed))

    def rows(self, ids: Tensor, packed: Mapping[str, Tensor], columns: int) -> Tensor:
        """See :meth:`Kernel.rows`."""
        unique, where = torch.unique(ids, return_inverse=True)
        return self.fmt.decode(packed, unique)[where]
