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

from rarefy.errors import RarefyError
from rarefy.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Packed: TypeAlias = dict[str, torch.Tensor]


class Grid(ABC):
    """The set of values that a fitted matrix may take.

    Attributes:
        form: the format as it is to be recorded with the stored matrix.
    """

    form: Format

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

    @property
    def support(self) -> torch.Tensor | None:
        """Where values may differ from zero, bool [m, n]; None when everywhere."""
        return None

    def within(self, support: torch.Tensor | None) -> Self:
        """The same grid with another support, bool [m, n], or with none; for sparse sets only."""
        raise NotImplementedError(f"{type(self).__name__} has no support")

    # What gradients can move. Tuners ask ``Format.learnable`` and ``Format.scaled`` first.

    @property
    def scales(self) -> torch.Tensor:
        """The stored scales, one for every group, float [m, G], or for every row, [m, 1]."""
        raise NotImplementedError(f"{type(self).__name__} has no scales")

    def units(self, weight: torch.Tensor) -> torch.Tensor:
        """``round(weight)`` [m, n] in units of the scales: what codes stand for."""
        raise NotImplementedError(f"{type(self).__name__} has no scales")

    def spread(self, scales: torch.Tensor, columns: int) -> torch.Tensor:
        """One number for each column, [m, columns], from those of scales or of groups."""
        raise NotImplementedError(f"{type(self).__name__} has no scales")

    @property
    def pitch(self) -> torch.Tensor:
        """``units`` from one code of a group to the next, [m, G]."""
        return torch.ones_like(self.scales)

    def rescaled(self, scales: torch.Tensor) -> Self:
        """The same codes under other scales [m, G], which are rounded to their stored type."""
        raise NotImplementedError(f"{type(self).__name__} has no scales")

    def soft(
        self,
        weight: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``adjusted(low, high).round(weight)``, differentiable by straight-through estimation.

        Args:
            weight: float [m, n].
            low, high: factors of both ends of each group's range, [m, G].
            offset: added to the codes before they are rounded, [m, n].
        """
        raise NotImplementedError(f"{type(self).__name__} has no ranges")

    def adjusted(self, low: torch.Tensor, high: torch.Tensor) -> Self:
        """The grid with both ends of each group's range multiplied, [m, G]."""
        raise NotImplementedError(f"{type(self).__name__} has no ranges")

    def limits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the largest code of every group, less its zero point, [m, G] each."""
        raise NotImplementedError(f"{type(self).__name__} has no ranges")


class Format(ABC):
    """A set of matrices; subclasses are frozen dataclasses whose fields are the options.

    Attributes:
        rows_independent: a row's grid does not depend on the other rows, so that matrices may be
            stacked.
        spans_independent: nor does the grid of a span of columns on the other spans.
        chunk: columns whose support a sweep has to choose together; None when there is nothing
            to choose.
        pattern: neighbouring columns that always hold the same number of non-zeros (M of N:M);
            None when there is no pattern.
        density: share of the weights that may differ from zero.
        holds_zero: zero is a member of every fitted set, so that zeros stay zeros.
        scaled: grids have ``scales``, ``units`` and ``rescaled``.
        learnable: grids have ranges: ``soft``, ``adjusted`` and ``limits``.
    """

    holds_zero: bool = True
    scaled: bool = False
    learnable: bool = False
    rows_independent: bool = True
    spans_independent: bool = True
    chunk: int | None = None
    pattern: int | None = None
    density: float = 1.0

    @property
    @abstractmethod
    def span(self) -> int | None:
        """Columns that share one independent grid; None when all columns do."""

    @abstractmethod
    def fit(
        self,
        weight: torch.Tensor,
        importance: torch.Tensor | None = None,
        support: torch.Tensor | None = None,
    ) -> Grid:
        """Choose a grid for a matrix, so that ``round`` loses little.

        Args:
            weight: float [m, n].
            importance: metric of the loss: non-negative weight of each column's squared error,
                [n], or the Gram matrix ``E[x x^T]`` of the inputs, [n, n]. Formats that know only
                the former use the diagonal of the latter.
            support: where values may differ from zero, bool [m, n], if an earlier stage or a
                solver has decided; sets that are not sparse ignore it.
        """

    def choose(
        self,
        columns: torch.Tensor,
        at: int,
        importance: torch.Tensor,
    ) -> torch.Tensor:
        """Choose the support of one chunk in the middle of a sweep.

        Args:
            columns: float [m, k], the live columns ``at .. at + k``.
            at: index of the first of these columns.
            importance: weight of each column's squared error, [k].

        Returns:
            bool [m, k].
        """
        raise NotImplementedError(f"{type(self).__name__} has no support to choose")

    def misfit(self, rows: int, columns: int) -> str:
        """Why an [m, n] matrix cannot be stored in this format; empty if it can."""
        return ""

    def with_density(self, density: float) -> Self:
        """The format with another budget, for allocators.

        Raises:
            RarefyError: the format has no such budget.
        """
        raise RarefyError(f"{self.label()} has no budget that could differ from layer to layer")

    def with_bits(self, bits: int) -> Self:
        """The format at another width, for allocators.

        Raises:
            RarefyError: the format has no width that could be another.
        """
        raise RarefyError(f"{self.label()} has no bits that could differ from matrix to matrix")

    def carrying(self, values: Format) -> Format | None:
        """The set that keeps this one's structure and takes the other's values.

        A stage that meets a matrix in this format imposes the structure on its own format so.
        None when there is no structure to keep.
        """
        return None

    def stored_support(self, packed: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The support of a stored matrix, bool [m, n]; None when it has none."""
        return None

    def stored_grid(self, packed: Mapping[str, torch.Tensor]) -> Grid | None:
        """The grid of a stored matrix; None where a matrix does not tell."""
        return None

    def inner_width(self, rows: int, columns: int) -> int | None:
        """Width k of the space between two thin factors [m, k] [k, n]; None for one matrix."""
        return None

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


class ElementGrid(Grid):
    """A grid that writes every weight as one code, beside parameters such as scales."""

    @abstractmethod
    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Codes of ``round(weight)``, integers [m, n]."""

    @abstractmethod
    def parameters(self) -> Packed:
        """Stored tensors beside the codes, by suffix."""


class ElementFormat(Format):
    """A format of one code a weight, so that a sparse set can store the codes of its support."""

    @abstractmethod
    def fit(
        self,
        weight: torch.Tensor,
        importance: torch.Tensor | None = None,
        support: torch.Tensor | None = None,
    ) -> ElementGrid:
        """Choose a grid; see :meth:`Format.fit`."""

    @abstractmethod
    def store(self, codes: torch.Tensor) -> torch.Tensor:
        """Stored tensor of a stream of codes [k]."""

    @abstractmethod
    def restore(self, stored: torch.Tensor, count: int) -> torch.Tensor:
        """Codes [count] of a stored stream."""

    @abstractmethod
    def values(
        self,
        codes: torch.Tensor,
        parameters: Mapping[str, torch.Tensor],
        rows: slice | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Float32 values of codes.

        Args:
            codes: [r, n].
            parameters: by suffix, of the whole matrix; ``weight_shape`` among them.
            rows: which rows of the matrix the codes belong to; None for all.
        """

    @abstractmethod
    def stream_layout(self, count: int) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors dtype name of a stored stream of ``count`` codes."""

    @abstractmethod
    def parameter_layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Stored tensors beside the codes, as :meth:`Format.layout` gives them."""


def column_weights(importance: torch.Tensor | None) -> torch.Tensor | None:
    """The weight of each column's squared error [n] from a metric, [n] or [n, n]."""
    return importance.diagonal() if importance is not None and importance.ndim == 2 else importance


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
