"""``rarefy::sparse_linear``: products with matrices whose zeros are not stored (``csrc/sparse.h``).

Unstructured supports and 2:4, with floating values or integer codes. Other patterns are decoded.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812

from rarefy.formats.base import strips
from rarefy.formats.floating import Float
from rarefy.formats.integer import Int
from rarefy.formats.packing import unpack
from rarefy.formats.sparse import Sparse
from rarefy.kernels import library
from rarefy.kernels.call import SCALES, multiply
from rarefy.kernels.library import Matrix

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_FEW = 8  # vectors, beyond which decoding once is cheaper
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Places(ctypes.Structure):
    """Mirror of ``rarefy_places``."""

    _fields_ = (("stream", ctypes.c_void_p), ("starts", ctypes.c_void_p))


class Stored(NamedTuple):
    """A sparse matrix as the operator takes it.

    Attributes:
        values: the kept weights row by row, floats or int32 words of codes.
        places: mask int32 [m, words], or places of 2:4 int32 [words].
        starts: of a mask: how many weights are kept above each row, and in all, int64 [m + 1].
        scale, zero: of codes, as the integer format stores them; zero None where symmetric.
        rows: m. bits: of a code, 0 for floats. group: columns a group, n where a row has one.
    """

    values: Tensor
    places: Tensor
    starts: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    rows: int
    bits: int
    group: int


def supports(fmt: Sparse) -> bool:
    """Whether there is a kernel."""
    pattern = (fmt.kept, fmt.of) in ((None, None), (2, 4))
    return pattern and type(fmt.values) in (Int, Float)


def row_starts(mask: Tensor, columns: int) -> Tensor:
    """How many weights are kept above each row, and in all, int64 [m + 1]."""
    counts = [unpack(mask[rows], 1, columns).sum(1) for rows in strips(len(mask), columns)]
    return torch.cat([mask.new_zeros(1, dtype=torch.int64), torch.cat(counts)]).cumsum(0)


def stored(
    fmt: Sparse, tensors: Mapping[str, Tensor], columns: int, starts: Tensor | None = None
) -> Stored:
    """The operator's arguments from stored tensors.

    Args:
        fmt: one that :func:`supports` accepts. tensors: by suffix. columns: n.
        starts: what :func:`row_starts` gave for the mask, if it is known already.
    """
    packed, scale = tensors["weight_packed"], tensors.get("weight_scale")
    places = tensors["weight_index"] if fmt.of is not None else tensors["weight_mask"]
    rows = places.shape[0]
    if fmt.of is not None:
        rows = 2 * len(packed) // columns if scale is None else scale.shape[0]
    elif starts is None:
        starts = row_starts(places, columns)
    values = fmt.values
    bits = values.bits if isinstance(values, Int) else 0
    zero = tensors.get("weight_zero_point")
    return Stored(packed, places, starts, scale, zero, rows, bits, values.span or columns)


@torch.library.custom_op("rarefy::sparse_linear", mutates_args=())
def sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    starts: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    rows: int,
    bits: int,
    group: int,
) -> torch.Tensor:
    """``x W^T`` with the weights that decoding gives.

    Args:
        x: [..., n].
        values, places, starts, scale, zero, rows, bits, group: see :class:`Stored`.

    Returns:
        [..., m] in x's type.
    """
    return reference(x, Stored(values, places, starts, scale, zero, rows, bits, group))


@sparse_linear.register_fake
def _(x, values, places, starts, scale, zero, rows, bits, group):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], rows))


@sparse_linear.register_kernel("cpu")
def cpu_sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    starts: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    rows: int,
    bits: int,
    group: int,
) -> torch.Tensor:
    """:func:`sparse_linear` by the library."""
    scale, zero = (None if t is None else t.contiguous() for t in (scale, zero))
    values, places = values.contiguous(), places.contiguous()
    it = Stored(values, places, starts, scale, zero, rows, bits, group)
    if not library.available():
        return reference(x, it)
    return multiply(described(it, x.shape[-1]), x, _FEW)


def reference(x: Tensor, it: Stored) -> Tensor:
    """The operator in torch: decode, multiply."""
    columns = x.shape[-1]
    values: Int | Float = Float(_NAMES.get(it.values.dtype))
    if it.bits:
        assert it.scale is not None
        group = it.group if it.group < columns else None
        dtype = _NAMES[it.scale.dtype]
        values = Int(it.bits, group, symmetric=it.zero is None, scale_dtype=dtype)
    fmt = Sparse(kept=2, of=4, values=values) if it.starts is None else Sparse(values=values)
    where = "weight_index" if it.starts is None else "weight_mask"
    tensors = {"weight_packed": it.values, where: it.places}
    tensors["weight_shape"] = torch.tensor([it.rows, columns])
    if it.scale is not None:
        tensors["weight_scale"] = it.scale
    if it.zero is not None:
        tensors["weight_zero_point"] = it.zero
    return F.linear(x, fmt.decode(tensors).to(x.dtype))


def described(it: Stored, columns: int) -> Matrix:
    """The C descriptor, which borrows the tensors."""
    addresses = [None if t is None else t.data_ptr() for t in (it.scale, it.zero, it.starts)]
    scale, zero, starts = addresses
    places = Places(it.places.data_ptr(), starts)
    kind = it.values if it.scale is None else it.scale
    matrix = Matrix(
        kind=library.TWO_FOUR if it.starts is None else library.BITMASK,
        bits=it.bits,
        scale_type=SCALES[kind.dtype],
        symmetric=it.zero is None,
        rows=it.rows,
        columns=columns,
        group=it.group,
        words_per_row=it.places.shape[-1],
        codes=it.values.data_ptr(),
        scales=scale,
        zeros=zero,
        extra=ctypes.addressof(places),
    )
    matrix.places = places  # the address is valid as long as this object lives
    return matrix


class SparseKernel:
    """Sparse matrices times float32; see :class:`rarefy.kernels.bind.Kernel`.

    Args:
        fmt: one that :func:`supports` accepts.
    """

    def __init__(self, fmt: Sparse) -> None:
        self.fmt = fmt
        self.name = f"{fmt.label()} x fp32"
        self._counted: tuple[Tensor, Tensor] | None = None  # a mask, and where its rows start

    def product(
        self, x: Tensor, packed: Mapping[str, Tensor], scale: Tensor | None = None
    ) -> Tensor:
        """See :meth:`Kernel.product`."""
        found: Tensor = sparse_linear(x, *self._stored(packed, x.shape[-1]))
        return found

    def rows(self, ids: Tensor, packed: Mapping[str, Tensor], columns: int) -> Tensor:
        """See :meth:`Kernel.rows`."""
        unique, where = torch.unique(ids, return_inverse=True)
        return self.fmt.decode(packed, unique)[where]

    def matrix(self, packed: Mapping[str, Tensor], columns: int) -> Matrix:
        """The C descriptor of stored tensors, which also borrows from this kernel."""
        return described(self._stored(packed, columns), columns)

    def _stored(self, packed: Mapping[str, Tensor], columns: int) -> Stored:
        """The operator's arguments; rows of a mask are counted once, unless it is another one."""
        if self.fmt.of is not None:
            return stored(self.fmt, packed, columns)
        mask = packed["weight_mask"]
        if self._counted is None or self._counted[0] is not mask:
            self._counted = mask, row_starts(mask, columns)
        return stored(self.fmt, packed, columns, self._counted[1])
