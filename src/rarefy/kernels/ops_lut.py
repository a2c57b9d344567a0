"""``rarefy::bcq_linear``: products with binary codings by table look-up (``csrc/lut.h``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812

from rarefy.formats.bcq import BCQ
from rarefy.kernels import library
from rarefy.kernels.call import SCALES, multiply
from rarefy.kernels.library import Matrix

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_FEW = 16  # vectors, beyond which decoding once is cheaper than looking up for each
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@torch.library.custom_op("rarefy::bcq_linear", mutates_args=())
def bcq_linear(
    x: torch.Tensor,
    planes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    columns: int,
    group: int,
) -> torch.Tensor:
    """``x W^T`` with the weights that decoding gives.

    Args:
        x: [..., n].
        planes: int32 [m, q, words].
        scale: [m, G, q] of a floating type.
        offset: [m, G] of the same type, or int16 multiples of the last scale, or None.
        columns: n.
        group: columns a group; n where a row has one group.

    Returns:
        [..., m] in x's type.
    """
    return reference(x, planes, scale, offset, columns, group)


@bcq_linear.register_fake
def _(x, planes, scale, offset, columns, group):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], planes.shape[0]))


@bcq_linear.register_kernel("cpu")
def cpu_bcq_linear(
    x: torch.Tensor,
    planes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    columns: int,
    group: int,
) -> torch.Tensor:
    """:func:`bcq_linear` by the library."""
    if not library.available():
        return reference(x, planes, scale, offset, columns, group)
    planes, scale = planes.contiguous(), scale.contiguous()
    offset = None if offset is None else offset.contiguous()
    return multiply(described(planes, scale, offset, columns, group), x, _FEW)


def reference(
    x: Tensor, planes: Tensor, scale: Tensor, offset: Tensor | None, columns: int, group: int
) -> Tensor:
    """The operator in torch: decode, multiply."""
    rule = "uniform" if offset is not None and offset.dtype == torch.int16 else "alternating"
    fmt = BCQ(
        planes.shape[1],
        group if group < columns else None,
        offset is not None,
        rule,
        scale_dtype=_NAMES[scale.dtype],
    )
    stored = {"weight_planes": planes, "weight_scale": scale}
    if offset is not None:
        stored["weight_offset"] = offset
    shape = torch.tensor([planes.shape[0], columns])
    return F.linear(x, fmt.decode(stored | {"weight_shape": shape}).to(x.dtype))


def described(
    planes: Tensor, scale: Tensor, offset: Tensor | None, columns: int, group: int
) -> Matrix:
    """The C descriptor, which borrows the tensors; arguments as those of the operator."""
    whole = offset is not None and offset.dtype == torch.int16
    address = None if offset is None else offset.data_ptr()
    return Matrix(
        kind=library.BCQ,
        bits=planes.shape[1],
        scale_type=SCALES[scale.dtype],
        rows=planes.shape[0],
        columns=columns,
        group=group,
        words_per_row=planes.shape[2],
        codes=planes.data_ptr(),
        scales=scale.data_ptr(),
        zeros=None if whole else address,
        extra=address if whole else None,
    )


class BCQKernel:
    """Binary codings times float32, by table look-up; see :class:`rarefy.kernels.bind.Kernel`.

    Args:
        fmt: the format.
    """

    def __init__(self, fmt: BCQ) -> None:
        self.fmt = fmt
        self.name = f"bcq{fmt.bits} x fp32"

    def product(
        self, x: Tensor, packed: Mapping[str, Tensor], scale: Tensor | None = None
    ) -> Tensor:
        """See :meth:`Kernel.product`."""
        found: Tensor = bcq_linear(x, *self._arguments(packed, x.shape[-1]))
        return found

    def rows(self, ids: Tensor, packed: Mapping[str, Tensor], columns: int) -> Tensor:
        """See :meth:`Kernel.rows`."""
        unique, where = torch.unique(ids, return_inverse=True)
        return self.fmt.decode(packed, unique)[where]

    def matrix(self, packed: Mapping[str, Tensor], columns: int) -> Matrix:
        """The C descriptor of stored tensors."""
        return described(*self._arguments(packed, columns))

    def _arguments(
        self, packed: Mapping[str, Tensor], columns: int
    ) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
        planes, scale = packed["weight_planes"], packed["weight_scale"]
        return planes, scale, packed.get("weight_offset"), columns, self.fmt.group or columns
