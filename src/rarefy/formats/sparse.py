"""Sparse matrices: which weights differ from zero, and what those are.

The **support** is free within a budget (unstructured: the ``sparsity`` of each row or of the whole
matrix) or bound to a pattern (N:M: ``kept`` of every ``of`` neighbouring columns). The values on it
are in any format that writes one code a weight, so the same class is a pruned 16-bit matrix and a
sparse int4 one. Nothing is stored for a zero but its place: one bit a weight (unstructured), or
``ceil(log2 of)`` bits for each kept weight (N:M; 2:4 then takes one bit a weight, too).

N means *kept*: the names of the field read so, although the code of Wanda and SparseGPT prunes N
of M (the two agree at 2:4 and 4:8).

Symbols: m rows, n columns, s sparsity, k number of kept weights. Of a row exactly
``floor(s n)`` weights are zero (of a matrix ``floor(s m n)``); what a sweep chooses chunk by chunk
adds up to the same number, because the count of a chunk is a difference of such floors.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import floor
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from rarefy.errors import RarefyError
from rarefy.formats.base import (
    FORMATS,
    ElementFormat,
    ElementGrid,
    Format,
    Grid,
    Packed,
    column_weights,
)
from rarefy.formats.floating import Float
from rarefy.formats.packing import pack, unpack, words_per_row

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SCOPES = ("row", "matrix", "free")
_CHUNK = 128  # SparseGPT's block
_NARROW = 256  # patterns are at most this wide


@dataclass(frozen=True)
class SparseGrid(Grid):
    """A support and the grid of the values on it.

    Attributes:
        mask: bool [m, n], or None while no support is chosen. inner: grid of the values.
        form: the format.
    """

    mask: torch.Tensor | None
    inner: ElementGrid
    form: Sparse

    @property
    def support(self) -> torch.Tensor | None:
        """Where values may differ from zero."""
        return self.mask

    def within(self, support: torch.Tensor | None) -> Self:
        """The same values on another support."""
        form = self.form if support is None else self.form.counted(support)
        return type(self)(support, self.inner, form)

    @property
    def chosen(self) -> torch.Tensor:
        """The support, which is there whenever a matrix is stored or cut."""
        assert self.mask is not None
        return self.mask

    def round(self, columns: torch.Tensor, at: int = 0) -> torch.Tensor:
        """Zero off the support, the nearest value on it; see :meth:`Grid.round`."""
        if self.mask is None:
            return self.inner.round(columns, at)
        on = self.mask[:, at : at + columns.shape[1]]
        return self.inner.round(columns, at).masked_fill(~on, 0)

    def encode(self, weight: torch.Tensor) -> Packed:
        """Codes on the support row by row, their places, and the values' parameters."""
        codes = self.inner.codes(weight)[self.chosen]
        places = {"weight_mask": _bits(self.chosen)}
        if self.form.of is not None:
            groups = self.chosen.reshape(-1, self.form.of)
            offsets = groups.nonzero()[:, 1]
            places = {"weight_index": pack(offsets, self.form.index_bits)}
        return {
            "weight_packed": self.form.values.store(codes),
            **places,
            **self.inner.parameters(),
            "weight_shape": torch.tensor(list(weight.shape), dtype=torch.int64),
        }

    def rows(self, start: int, stop: int) -> Self:
        """The grid of some rows."""
        mask = self.chosen[start:stop]
        return type(self)(mask, self.inner.rows(start, stop), self.form.counted(mask))

    @property
    def scales(self) -> torch.Tensor:
        """Those of the values."""
        return self.inner.scales

    def units(self, weight: torch.Tensor) -> torch.Tensor:
        """Those of the values, zero off the support."""
        return self.inner.units(weight).masked_fill(~self.chosen, 0)

    def spread(self, scales: torch.Tensor, columns: int) -> torch.Tensor:
        """As the values do."""
        return self.inner.spread(scales, columns)

    @property
    def pitch(self) -> torch.Tensor:
        """That of the values."""
        return self.inner.pitch

    def limits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the values."""
        return self.inner.limits()

    def rescaled(self, scales: torch.Tensor) -> Self:
        """The values under other scales."""
        return replace(self, inner=self.inner.rescaled(scales))

    def adjusted(self, low: torch.Tensor, high: torch.Tensor) -> Self:
        """The values' ranges with both ends multiplied."""
        return replace(self, inner=self.inner.adjusted(low, high))

    def soft(
        self,
        weight: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """That of the values, zero off the support; see :meth:`Grid.soft`."""
        return self.inner.soft(weight, low, high, offset) * self.chosen

    @classmethod
    def join(cls, grids: Sequence[Self]) -> Self:
        """Neighbouring spans side by side."""
        mask = torch.cat([grid.chosen for grid in grids], 1)
        inner = type(grids[0].inner).join([grid.inner for grid in grids])
        return cls(mask, inner, grids[0].form.counted(mask))


@FORMATS.register("sparse", family="pruning")
@dataclass(frozen=True)
class Sparse(Format):
    """Matrices with zeros that are not stored.

    Attributes:
        sparsity: share of zeros of an unstructured support.
        kept, of: at most ``kept`` non-zeros in each run of ``of`` columns; then sparsity follows.
        scope: where the budget of an unstructured support is met: "row", "matrix", or "free" when
            a solver decides how many weights it keeps.
        values: format of the values, one that writes a code a weight.
        nonzeros: number of kept weights of one stored matrix, recorded for the scope "free".

    Raises:
        ValueError: a field outside these values.
    """

    sparsity: float = 0.5
    kept: int | None = None
    of: int | None = None
    scope: str = "row"
    values: ElementFormat = field(default_factory=Float)
    nonzeros: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must lie in [0, 1), and {self.sparsity} does not")
        if (self.kept is None) != (self.of is None):
            raise ValueError("give both kept and of for an N:M pattern, or neither")
        if self.kept is not None and not 1 <= self.kept < (self.of or 0) <= 256:
            raise ValueError(f"{self.kept}:{self.of} is no pattern; give 1 <= kept < of <= 256")
        if self.scope not in _SCOPES:
            raise ValueError(f"scope must be one of {', '.join(_SCOPES)}, not {self.scope!r}")
        if not isinstance(self.values, ElementFormat):
            raise ValueError(f"values cannot be {self.values!r}: give int or float")

    @property
    def scaled(self) -> bool:  # type: ignore[override]
        """Whether the values have scales."""
        return self.values.scaled

    @property
    def learnable(self) -> bool:  # type: ignore[override]
        """Whether the values have ranges."""
        return self.values.learnable

    @property
    def density(self) -> float:  # type: ignore[override]
        """Share of the weights that is kept."""
        return self.kept / self.of if self.kept and self.of else 1 - self.sparsity

    @property
    def rows_independent(self) -> bool:  # type: ignore[override]
        """Whether budget and values are matters of a single row."""
        return self.values.rows_independent and (self.of is not None or self.scope == "row")

    @property
    def spans_independent(self) -> bool:  # type: ignore[override]
        """Whether patterns lie inside the spans of the values."""
        return self.of is not None and self.span is not None and self.span % self.of == 0

    @property
    def chunk(self) -> int:  # type: ignore[override]
        """A pattern's width, or a block of columns."""
        return self.of or _CHUNK

    @property
    def pattern(self) -> int | None:  # type: ignore[override]
        """A pattern's width."""
        return self.of

    @property
    def span(self) -> int | None:
        """That of the values."""
        return self.values.span

    @property
    def index_bits(self) -> int:
        """Bits of a place within a pattern."""
        return max(1, ((self.of or 2) - 1).bit_length())

    def counted(self, mask: torch.Tensor) -> Self:
        """The format as it is recorded for a matrix of this support, bool [m, n]."""
        if self.of is not None or self.scope != "free":
            return self
        return replace(self, nonzeros=int(mask.sum()))

    def count(self, rows: int, columns: int) -> int:
        """Number of kept weights of an [m, n] matrix."""
        if self.kept is not None and self.of is not None:
            return rows * columns // self.of * self.kept
        if self.scope == "free" and self.nonzeros is not None:
            return self.nonzeros
        if self.scope == "row":
            return rows * (columns - self._zeros(columns))
        return rows * columns - self._zeros(rows * columns)

    def _zeros(self, total: int) -> int:
        """``floor(s total)``, robust against the last bit of a product that is whole."""
        return floor(self.sparsity * total + 1e-6)

    def misfit(self, rows: int, columns: int) -> str:
        """Patterns must fill the row, and the values must fit."""
        if self.of is not None and columns % self.of:
            return f"{self.of} does not divide rows of {columns} columns"
        return self.values.misfit(rows, columns)

    def with_density(self, density: float) -> Self:
        """Another sparsity.

        Raises:
            RarefyError: the pattern fixes it.
        """
        if self.of is not None:
            raise RarefyError(f"the pattern {self.label()} fixes the sparsity; allocate without it")
        return replace(self, sparsity=1 - density)

    def carrying(self, values: Format) -> Self | None:
        """This support with other values, or None when the other is not one code a weight."""
        return replace(self, values=values) if isinstance(values, ElementFormat) else None

    def fit(
        self,
        weight: torch.Tensor,
        importance: torch.Tensor | None = None,
        support: torch.Tensor | None = None,
    ) -> SparseGrid:
        """Keep the largest ``w^2`` times importance, within the imposed support if there is one.

        Raises:
            RarefyError: the support holds another number of weights than the budget says.
        """
        weights = column_weights(importance)
        if support is None:
            unit = torch.ones(weight.shape[1], dtype=weight.dtype, device=weight.device)
            mask = self.choose(weight, 0, unit if weights is None else weights)
        elif self.of is None and self.scope == "free":
            mask = support
        else:
            mask = self._filled(support, weight)
        inner = self.values.fit(weight.masked_fill(~mask, 0), weights)
        return SparseGrid(mask, inner, self.counted(mask))

    def _filled(self, support: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """An imposed support brought to the budget's exact count by places whose value is zero."""
        live = weight.abs().add_(1).masked_fill_(~support, 0)
        mask = self.choose(live, 0, torch.ones_like(live[0]))
        if bool((support & ~mask).any()):
            raise RarefyError(
                f"more weights are kept than {self.label()} may hold; "
                "repeat the sparsity of the stage that chose them, or give the scope 'free'"
            )
        return mask

    def choose(
        self,
        columns: torch.Tensor,
        at: int,
        importance: torch.Tensor,
    ) -> torch.Tensor:
        """Keep the largest ``w^2`` times importance; see :meth:`Format.choose`."""
        scores = columns.square() * importance
        m, k = columns.shape
        if self.kept is not None and self.of is not None:
            groups = scores.reshape(m, k // self.of, self.of)
            return _largest(groups, self.kept).reshape(m, k)
        if self.scope == "row":
            zeros = self._zeros(at + k) - self._zeros(at)
            return _largest(scores, k - zeros)
        zeros = self._zeros(m * (at + k)) - self._zeros(m * at)
        return _largest(scores.reshape(1, -1), m * k - zeros).reshape(m, k)

    def decode(
        self, packed: Mapping[str, torch.Tensor], rows: slice | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float32 [m, n]; see :meth:`Format.decode`."""
        mask = self.stored_support(packed)
        kept = self.values.restore(packed["weight_packed"], int(mask.sum()))
        codes = torch.zeros(mask.shape, dtype=kept.dtype, device=kept.device)
        codes[mask] = kept
        wanted = slice(None) if rows is None else rows
        values = self.values.values(codes[wanted], packed, rows)
        return values.masked_fill_(~mask[wanted], 0)

    def stored_grid(self, packed: Mapping[str, torch.Tensor]) -> SparseGrid | None:
        """The stored support, and the values' grid."""
        inner = self.values.stored_grid(packed)
        if not isinstance(inner, ElementGrid):
            return None
        return SparseGrid(self.stored_support(packed), inner, self)

    def stored_support(self, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """bool [m, n]."""
        m, n = (int(x) for x in packed["weight_shape"])
        if self.kept is None or self.of is None:
            return unpack(packed["weight_mask"], 1, n).bool()
        groups = m * n // self.of
        offsets = unpack(packed["weight_index"], self.index_bits, groups * self.kept).long()
        mask = torch.zeros(groups, self.of, dtype=torch.bool, device=offsets.device)
        return mask.scatter_(1, offsets.reshape(groups, self.kept), True).reshape(m, n)

    def layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Stored tensors; see :meth:`Format.layout`."""
        count = self.count(rows, columns)
        places: dict[str, tuple[tuple[int, ...], str]] = {
            "weight_mask": ((rows, words_per_row(columns, 1)), "I32")
        }
        if self.of is not None:
            places = {"weight_index": ((words_per_row(count, self.index_bits),), "I32")}
        return {
            "weight_packed": self.values.stream_layout(count),
            **places,
            **self.values.parameter_layout(rows, columns),
            "weight_shape": ((2,), "I64"),
        }

    def for_dtype(self, dtype: str) -> Self:
        """Values for the checkpoint's type."""
        return replace(self, values=self.values.for_dtype(dtype))

    def label(self) -> str:
        """For example ``sparse 50% f16``, ``2:4 int4 g64``."""
        where = f"{self.kept}:{self.of}" if self.of else f"sparse {100 * self.sparsity:.4g}%"
        return f"{where} {self.values.label()}"


def _largest(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """Mask of the ``kept`` largest entries along the last axis, exactly that many."""
    n = scores.shape[-1]
    if n <= _NARROW or scores.device.type != "cpu":
        places = scores.topk(kept, -1, sorted=False).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, True)
    if kept == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # NumPy selects an order statistic ten times faster than torch's topk.
    ordered = np.partition(scores.numpy(), n - kept, axis=-1)[..., n - kept, None]
    least = torch.from_numpy(ordered)
    above, equal = scores > least, scores == least
    wanted = kept - above.sum(-1, keepdim=True)
    if bool((equal.sum(-1, keepdim=True) != wanted).any()):
        equal &= equal.cumsum(-1) <= wanted
    return above | equal


def _bits(mask: torch.Tensor) -> torch.Tensor:
    """One bit a weight, first column lowest, rows padded to whole words: int32 [m, words]."""
    n = mask.shape[1]
    octets = np.packbits(mask.contiguous().cpu().numpy(), axis=1, bitorder="little")
    missing = 4 * words_per_row(n, 1) - octets.shape[1]
    return torch.from_numpy(np.pad(octets, ((0, 0), (0, missing)))).view(torch.int32)
