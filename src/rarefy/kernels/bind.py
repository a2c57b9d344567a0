"""Which operator multiplies by the stored matrices of a format.

One function, :func:`kernel_for`, with an entry for each class of formats that has kernels; the
modules of ``runtime/packed.py`` ask it and know no format.
"""

from __future__ import annotations

from functools import singledispatch
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeGuard

import torch

from rarefy.formats.activation import IntActivation
from rarefy.formats.bcq import BCQ
from rarefy.formats.bilevel import Bilevel
from rarefy.formats.integer import Int
from rarefy.formats.llm_int8 import LLMInt8
from rarefy.formats.sparse import Sparse
from rarefy.kernels import library, ops_cuda, ops_int
from rarefy.kernels.mixed import MixedKernel
from rarefy.kernels.ops_lut import BCQKernel
from rarefy.kernels.ops_sparse import SparseKernel, supports

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rarefy.formats.activation import Activation
    from rarefy.formats.base import Format
    from rarefy.formats.integer import Grouped


class Kernel(Protocol):
    """Multiplies by one format's stored tensors.

    Attributes:
        name: what is multiplied by what, ``int4 x fp32``.
    """

    name: str

    def product(
        self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], scale: torch.Tensor | None
    ) -> torch.Tensor:
        """``x W^T`` for float32 x [..., n], giving [..., m].

        Args:
            x: activations, not rounded yet.
            packed: tensors by suffix.
            scale: the static scale of activations [1], if they have one.
        """

    def rows(
        self, ids: torch.Tensor, packed: Mapping[str, torch.Tensor], columns: int
    ) -> torch.Tensor:
        """Rows of W [m, columns] by number, float32 [..., columns] for ids [...]."""


class Stored(NamedTuple):
    """The tensors of grouped integers, as operators take them; see :mod:`ops_int`."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    zero_bits: int = 0
    units: torch.Tensor | None = None


@singledispatch
def kernel_for(fmt: Format, rounding: Activation | None = None) -> Kernel | None:
    """The kernel of a format, or None where decoding has to do.

    Args:
        fmt: the format of the matrix.
        rounding: how activations are rounded, by the kernel itself.
    """
    return None


def runs_on(x: torch.Tensor, kernel: Kernel) -> bool:
    """Whether a kernel takes this input, and nobody asks for a gradient.

    On the CPU that is float32; on GPUs there are only products of integers with floating numbers.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    if x.is_cuda:
        return type(kernel) is IntKernel and ops_cuda.available()
    # Compilation cannot follow how the library is looked for; the operators do without it, too.
    there = torch.compiler.is_compiling() or library.available()
    return x.device.type == "cpu" and x.dtype is torch.float32 and there


def described(kernel: Kernel | None) -> str:
    """For tables: ``int4 x fp32, avx2``, or ``reference``."""
    return "reference" if kernel is None else f"{kernel.name}, {library.instructions()}"


class IntKernel:
    """Grouped integers times float32.

    Args:
        fmt: the format.
    """

    def __init__(self, fmt: Grouped) -> None:
        self.bits = fmt.bits
        self.group = fmt.group or 0
        self.name = f"int{fmt.bits} x fp32"

    def stored(self, packed: Mapping[str, torch.Tensor]) -> Stored:
        """The arguments of operators."""
        zero = packed.get("weight_zero_point")
        return Stored(packed["weight_packed"], packed["weight_scale"], zero)

    def product(
        self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], scale: torch.Tensor | None
    ) -> torch.Tensor:
        """See :meth:`Kernel.product`."""
        it = self.stored(packed)
        found: torch.Tensor = ops_int.int_linear(x, *it[:3], self.bits, self.group, *it[3:])
        return found

    def rows(
        self, ids: torch.Tensor, packed: Mapping[str, torch.Tensor], columns: int
    ) -> torch.Tensor:
        """See :meth:`Kernel.rows`."""
        it = self.stored(packed)
        shape = (self.bits, self.group, columns)
        found: torch.Tensor = ops_int.int_rows(ids, *it[:3], *shape, *it[3:])
        return found

    def matrix(self, packed: Mapping[str, torch.Tensor], columns: int) -> library.Matrix:
        """The C descriptor of stored tensors, which also borrows from this kernel."""
        it = self.stored(packed)
        return ops_int.describe(*it[:3], self.bits, self.group, columns, *it[3:])


class Int8Kernel(IntKernel):
    """Grouped integers times activations rounded to int8: sums of integers.

    Args:
        fmt: the format of the weights.
        rounding: of the activations, 8 bits.

    Attributes:
        fast: whether there is more than the loop that takes any width.
    """

    def __init__(self, fmt: Int, rounding: IntActivation) -> None:
        super().__init__(fmt)
        self.fast = fmt.bits in (2, 3, 4, 8)
        self.rounding = rounding
        self.name = f"int{fmt.bits} x int8"
        if rounding.per == "group":
            self.name += f" g{rounding.group}"

    def product(
        self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], scale: torch.Tensor | None
    ) -> torch.Tensor:
        """See :meth:`Kernel.product`."""
        return self._by(ops_int.int8_linear, x, packed, scale)

    def direct(
        self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], scale: torch.Tensor | None
    ) -> torch.Tensor:
        """The same on the CPU, and not as an operator, which would import torch's compiler."""
        return self._by(ops_int.cpu_int8_linear, x, packed, scale)

    def _by(
        self,
        operator: Callable[..., torch.Tensor],
        x: torch.Tensor,
        packed: Mapping[str, torch.Tensor],
        scale: torch.Tensor | None,
    ) -> torch.Tensor:
        if self.rounding.per == "tensor" and scale is None:
            scale = self.rounding.scale(x.abs().reshape(-1))
        together = self.rounding.group if self.rounding.per == "group" else 0
        it = self.stored(packed)
        return operator(x, *it[:3], scale, self.bits, self.group, together, *it[3:])


class Opened:
    """What kernels of bilevel integers have in common: scale codes as bytes, beside the units.

    Args:
        fmt: the format.
    """

    def __init__(self, fmt: Bilevel, *more: IntActivation) -> None:
        super().__init__(fmt, *more)  # type: ignore[call-arg]
        self.fmt = fmt
        # A stored tensor, and what was made of it.
        self._known: tuple[torch.Tensor, Stored] | None = None

    def stored(self, packed: Mapping[str, torch.Tensor]) -> Stored:
        """The arguments of operators, made once for a matrix."""
        codes = packed["weight_scale_code"]
        if self._known is None or self._known[0] is not codes:
            scales, units = self.fmt.opened(packed)
            zero = packed["weight_zero_point"]
            found = Stored(packed["weight_packed"], scales, zero, self.fmt.zero_bits, units)
            self._known = codes, found
        return self._known[1]


class BilevelKernel(Opened, IntKernel):
    """Bilevel integers times float32; see :class:`IntKernel`."""


class Bilevel8Kernel(Opened, Int8Kernel):
    """Bilevel integers times activations rounded to int8; see :class:`Int8Kernel`."""


@kernel_for.register(Int)
def _(fmt: Int, rounding: Activation | None = None) -> Kernel | None:
    if rounding is None:
        return IntKernel(fmt) if library.available() or ops_cuda.available() else None
    if isinstance(rounding, LLMInt8):
        return MixedKernel(fmt, rounding) if library.available() else None
    return Int8Kernel(fmt, rounding) if _rounds_to_int8(rounding) else None


@kernel_for.register(Bilevel)
def _(fmt: Bilevel, rounding: Activation | None = None) -> Kernel | None:
    if rounding is None:
        return BilevelKernel(fmt) if library.available() else None
    return Bilevel8Kernel(fmt, rounding) if _rounds_to_int8(rounding) else None


def _rounds_to_int8(rounding: Activation) -> TypeGuard[IntActivation]:
    """Whether there are products of integers with activations rounded so."""
    if not (library.available() and isinstance(rounding, IntActivation) and rounding.bits == 8):
        return False
    return rounding.per != "group" or rounding.group == ops_int.INPUT_GROUP


@kernel_for.register(BCQ)
def _(fmt: BCQ, rounding: Activation | None = None) -> Kernel | None:
    return BCQKernel(fmt) if rounding is None and library.available() else None


@kernel_for.register(Sparse)
def _(fmt: Sparse, rounding: Activation | None = None) -> Kernel | None:
    found = rounding is None and supports(fmt) and library.available()
    return SparseKernel(fmt) if found else None
