"""Modules that execute packed matrices, decoding what they need when they need it.

No dense copy outlives a call, unless :func:`hold_dense` asks for it. Where there is a compiled
kernel for the format it multiplies by the stored codes; else, on other devices and where gradients
are wanted, rows are decoded by the torch reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from rarefy.kernels.bind import Int8Kernel, described, kernel_for, runs_on

if TYPE_CHECKING:
    from rarefy.formats.activation import Activation
    from rarefy.formats.base import Format, Packed
    from rarefy.kernels.bind import Kernel

# Rows are decoded in strips of about this many weights, so a vocabulary-sized head stays cheap.
_STRIP = 1 << 22


class PackedMatrix(nn.Module):
    """A matrix [m, n] in a format, as buffers named like the stored tensors.

    Args:
        fmt: the format.
        shape: (m, n).
        device: where the empty buffers are made, "meta" before loading.
    """

    def __init__(self, fmt: Format, shape: tuple[int, int], device: str = "meta") -> None:
        super().__init__()
        from rarefy.checkpoint.reader import DTYPES

        self.fmt = fmt
        self.shape = shape
        self.suffixes = tuple(fmt.layout(*shape))
        self.held: torch.Tensor | None = None
        self._multiply = kernel_for(fmt)
        for suffix, (extent, dtype) in fmt.layout(*shape).items():
            self.register_buffer(suffix, torch.empty(extent, dtype=DTYPES[dtype], device=device))

    @property
    def kernel(self) -> str:
        """What multiplies, for tables."""
        return self.multiplier(None)

    def multiplier(self, rounding_kernel: Kernel | None) -> str:
        """The same where inputs are rounded by a kernel, if it is not None."""
        used = rounding_kernel or self._multiply
        return "held dense" if self.held is not None else described(used)

    def tensors(self) -> Packed:
        """The stored tensors by suffix."""
        return {suffix: getattr(self, suffix) for suffix in self.suffixes}

    def dense(self, rows: slice | torch.Tensor | None = None) -> torch.Tensor:
        """Decode some rows, or all, to float32."""
        return self.fmt.decode(self.tensors(), rows)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """``x W^T`` for x [..., n], giving [..., m]."""
        if self.held is not None:
            return F.linear(x, self.held.to(x.dtype))
        if self._multiply is not None and runs_on(x, self._multiply):
            return self._multiply.product(x, self.tensors(), None)
        m, n = self.shape
        strip = max(32, _STRIP // n // 32 * 32)
        if strip >= m:
            return F.linear(x, self.dense().to(x.dtype))
        parts = [
            F.linear(x, self.dense(slice(a, min(a + strip, m))).to(x.dtype))
            for a in range(0, m, strip)
        ]
        return torch.cat(parts, -1)

    def extra_repr(self) -> str:
        """Shape and format, for ``print(model)``."""
        return f"{self.shape[1]} -> {self.shape[0]}, {self.fmt.label()}"


class RoundsInputs:
    """What modules have in common whose inputs may be rounded before they are multiplied.

    Attributes:
        rounding: how inputs are rounded, if they are. input_scale: its stored scale, if it has one.
        rounding_kernel: what rounds inputs and multiplies, where there is such a kernel.
    """

    rounding: Activation | None = None
    rounding_kernel: Kernel | None = None
    input_scale: torch.Tensor | None

    def round_by(self, rounding: Activation, kernel: Kernel | None = None) -> None:
        """Round inputs by another rule from here on; without a kernel, before the product."""
        self.rounding, self.rounding_kernel = rounding, kernel

    def product_with(self, matrix: PackedMatrix, x: torch.Tensor) -> torch.Tensor:
        """``x W^T`` for x [..., n], giving [..., m]."""
        kernel = None if matrix.held is not None else self.rounding_kernel
        if self.rounding is None:
            return matrix.product(x)
        if kernel is not None and runs_on(x, kernel):
            return kernel.product(x, matrix.tensors(), self.input_scale)
        return matrix.product(self.rounding.round(x, self.input_scale))


class PackedLinear(PackedMatrix, RoundsInputs):
    """``y = x W^T + b`` from a packed W; stands in for nn.Linear and for GPT-2's Conv1D.

    Args:
        fmt, shape: see :class:`PackedMatrix`.
        bias: b, or None.
        rounding: how x is rounded first, if it is.
    """

    def __init__(
        self,
        fmt: Format,
        shape: tuple[int, int],
        bias: nn.Parameter | None,
        rounding: Activation | None = None,
    ) -> None:
        super().__init__(fmt, shape)
        self.bias = bias
        if rounding is not None:
            self.round_by(rounding, kernel_for(fmt, rounding))
        scale = torch.empty(1, device="meta") if rounding is not None and rounding.static else None
        self.register_buffer("input_scale", scale)

    @property
    def weight(self) -> torch.Tensor:
        """Shape without values, for initialisers that reach into their children (GPT-2's)."""
        return torch.empty(self.shape, device="meta")

    @property
    def kernel(self) -> str:
        """What multiplies, for tables."""
        return self.multiplier(self.rounding_kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] -> [..., m]."""
        y = self.product_with(self, x)
        return y if self.bias is None else y + self.bias


def hold_dense(model: nn.Module) -> None:
    """Decode every packed linear once and keep the result beside it, which costs the memory of a
    dense model: for long evaluations, where decoding at every call would take most of the time.
    """
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.held = module.dense()


class PackedEmbedding(PackedMatrix):
    """Rows of a packed matrix by token id.

    Args:
        fmt: the format.
        shape: (vocabulary, width).
        factor: multiplies the output (Gemma's embedding scale), or None.
    """

    def __init__(self, fmt: Format, shape: tuple[int, int], factor: float | None = None) -> None:
        super().__init__(fmt, shape)
        self.factor = factor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [...] -> [..., width]."""
        if self._multiply is not None and ids.device.type == "cpu":
            rows = self._multiply.rows(ids, self.tensors(), self.shape[1])
        else:
            unique, where = torch.unique(ids, return_inverse=True)
            rows = self.dense(unique)[where]
        return rows if self.factor is None else rows * self.factor


class TiedHead(nn.Module, RoundsInputs):
    """A head that reads the packed embedding.

    Args:
        embedding: its buffers are used, not copied; it stays a child of the model alone.
    """

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        self.embedding = (embedding,)  # in a tuple: not a submodule, so nothing is stored twice
        self.input_scale = None

    @property
    def kernel(self) -> str:
        """What multiplies, for tables."""
        return self.embedding[0].multiplier(self.rounding_kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., vocabulary]."""
        return self.product_with(self.embedding[0], x)


def round_inputs(model: nn.Module, rounding: Activation) -> int:
    """Round the inputs of packed matrices from here on, where that is faster and nothing did yet.

    Args:
        model: whose modules are changed.
        rounding: how, without a stored scale.

    Returns:
        How many matrices that are.
    """
    count = 0
    for module in model.modules():
        if not isinstance(module, RoundsInputs) or module.rounding is not None:
            continue
        matrix = module.embedding[0] if isinstance(module, TiedHead) else module
        assert isinstance(matrix, PackedMatrix)
        kernel = kernel_for(matrix.fmt, rounding)
        if isinstance(kernel, Int8Kernel) and kernel.fast:
            module.round_by(rounding, kernel)
            count += 1
    return count
