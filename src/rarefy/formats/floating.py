"""Plain floating numbers: the values of a matrix that is sparse but not quantized."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch

from rarefy.errors import RarefyError
from rarefy.formats.base import FORMATS, ElementFormat, ElementGrid, Packed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_STORED = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_CODES = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class FloatGrid(ElementGrid):
    """Every number of the type."""

    form: Float

    def round(self, columns: torch.Tensor, at: int = 0) -> torch.Tensor:
        """Nearest numbers of the type; see :meth:`Grid.round`."""
        return columns.to(self.form.kind).to(columns.dtype)

    def encode(self, weight: torch.Tensor) -> Packed:
        """The numbers, [m, n]."""
        shape = torch.tensor(list(weight.shape), dtype=torch.int64)
        return {
            "weight_values": weight.to(self.form.kind).contiguous(),
            "weight_shape": shape,
        }

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Bit patterns, integers [m, n]."""
        return weight.to(self.form.kind).contiguous().view(_CODES[self.form.kind])

    def parameters(self) -> Packed:
        """There are none."""
        return {}

    def rows(self, start: int, stop: int) -> Self:
        """The same set."""
        return self

    @classmethod
    def join(cls, grids: Sequence[Self]) -> Self:
        """The same set."""
        return grids[0]


@FORMATS.register("float", family="storage")
@dataclass(frozen=True)
class Float(ElementFormat):
    """Floating numbers of one type.

    Attributes:
        dtype: "float16", "bfloat16", "float32", or null for that of the checkpoint.

    Raises:
        ValueError: another type.
    """

    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in _TORCH:
            raise ValueError(
                f"dtype must be null or one of {', '.join(_TORCH)}, not {self.dtype!r}"
            )

    @property
    def kind(self) -> torch.dtype:
        """The stored type."""
        return _TORCH[self.dtype or "float16"]

    @property
    def span(self) -> None:
        """All columns share the set."""
        return

    def fit(
        self,
        weight: torch.Tensor,
        importance: torch.Tensor | None = None,
        support: torch.Tensor | None = None,
    ) -> FloatGrid:
        """Nothing is chosen; see :meth:`Format.fit`.

        Raises:
            RarefyError: a weight is beyond the type's range.
        """
        reach, limit = float(weight.abs().max()), torch.finfo(self.kind).max
        if reach > limit:
            raise RarefyError(
                f"weights up to {reach:.3g} do not fit into {self.kind}; give dtype bfloat16"
            )
        return FloatGrid(self)

    def stored_grid(self, packed: Mapping[str, torch.Tensor]) -> FloatGrid:
        """The same for every matrix."""
        return FloatGrid(self)

    def decode(
        self, packed: Mapping[str, torch.Tensor], rows: slice | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float32 [m, n]."""
        return packed["weight_values"][slice(None) if rows is None else rows].float()

    def values(
        self,
        codes: torch.Tensor,
        parameters: Mapping[str, torch.Tensor],
        rows: slice | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The numbers of the bit patterns."""
        return codes.contiguous().view(self.kind).float()

    def store(self, codes: torch.Tensor) -> torch.Tensor:
        """The numbers themselves, so that any reader of the file can look at them."""
        return codes.contiguous().view(self.kind)

    def restore(self, stored: torch.Tensor, count: int) -> torch.Tensor:
        """Bit patterns [count]."""
        return stored.view(_CODES[self.kind])

    def stream_layout(self, count: int) -> tuple[tuple[int, ...], str]:
        """One number a code."""
        return (count,), _STORED[self.kind]

    def parameter_layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """There are none."""
        return {}

    def layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Stored tensors; see :meth:`Format.layout`."""
        numbers = ((rows, columns), _STORED[self.kind])
        return {"weight_values": numbers, "weight_shape": ((2,), "I64")}

    def for_dtype(self, dtype: str) -> Self:
        """The checkpoint's own type, unless one was asked for."""
        names = {_STORED[kind]: name for name, kind in _TORCH.items()}
        return replace(self, dtype=self.dtype or names.get(dtype, "float16"))

    def label(self) -> str:
        """For example ``f16``."""
        return _STORED[self.kind].lower()
