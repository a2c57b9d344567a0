"""The format role: a set of matrices, and how a member of the set is written down.

A **Format** is a frozen dataclass that knows no model and no data. ``fit`` chooses a **Grid** for
a matrix; the grid rounds, encodes and can be cut by rows. The contract that the conformance suite
checks for every registered format: rounding twice is rounding once, ``decode(encode(w))`` equals
``round(w)`` bit for bit, and the declared bytes are the stored bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self, TypeAlias

import torch

from rarefy.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Packed: TypeAlias = dict[str, torch.Tensor]


class Grid(ABC):
    """The set of values that a fitted matrix may take."""

    @abstractmethod
    def round(self, columns: torch.Tensor, at: int = 0) -> torch.Tensor:
        """Nearest members of the set.

        Args:
            columns: float [m, k], columns ``at .. at + k`` of the matrix.
            at: index of the first of these columns.

        Returns:
            float [m, k].
        """

    @abstractmethod
    def encode(self, weight: torch.Tensor) -> Packed:
        """Stored tensors of ``round(weight)``, keyed by suffix (``weight_packed`` ...)."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Self:
        """The grid of rows ``start .. stop``."""

    @classmethod
    @abstractmethod
    def join(cls, grids: Sequence[Self]) -> Self:
        """One grid from grids of neighbouring column spans, in order."""


class Format(ABC):
    """A set of matrices; subclasses are frozen dataclasses whose fields are the options."""

    @property
    @abstractmethod
    def span(self) -> int | None:
        """Columns that share one independent grid; None when all columns do."""

    @abstractmethod
    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> Grid:
        """Choose a grid for a matrix.

        Args:
            weight: float [m, n].
            importance: non-negative weight of each column's squared error, float [n].
        """

    @abstractmethod
    def decode(
        self, packed: Mapping[str, torch.Tensor], rows: slice | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float32 matrix [m, n] from its stored tensors.

        Args:
            packed: tensors by suffix.
            rows: decode only these, a slice or row numbers; None for all.
        """

    @abstractmethod
    def layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Stored tensors of an [m, n] matrix: suffix -> (shape, safetensors dtype name)."""

    def for_dtype(self, dtype: str) -> Self:
        """The format as stored in a checkpoint of this safetensors dtype ("BF16")."""
        return self

    @abstractmethod
    def label(self) -> str:
        """Short name for tables: ``int4 g64``."""


FORMATS: Registry[Format] = Registry("format", Format, "rarefy.formats")  # type: ignore[type-abstract]

BYTES = {"I64": 8, "F64": 8, "I32": 4, "F32": 4, "I16": 2, "BF16": 2, "F16": 2, "U8": 1, "I8": 1}


_STRIP = 1 << 18


def strips(rows: int, columns: int) -> list[slice]:
    """Cut the rows of a matrix into pieces of about a quarter of a million weights.

    Rows are independent in most formats; working on a piece at a time keeps intermediate results
    in the cache and out of the peak memory.
    """
    size = max(1, _STRIP // max(1, columns))
    return [slice(a, min(a + size, rows)) for a in range(0, rows, size)]


def stored_bytes(fmt: Format, rows: int, columns: int) -> int:
    """Exact bytes of the stored tensors of an [m, n] matrix."""
    total = 0
    for shape, dtype in fmt.layout(rows, columns).values():
        size = BYTES[dtype]
        for extent in shape:
            size *= extent
        total += size
    return total
