"""Grouped integers: ``w = scale * (code - zero)``, 2 to 8 bits, one scale a row or a group.

Symbols: m rows, n columns, g columns a group, G = ceil(n / g) groups (the last may be shorter).
Asymmetric: ``scale = (hi - lo) / (2**b - 1)``, ``zero = round(-lo / scale)``, both from the range
that a rule chose. Symmetric: ``scale = 2 max|w| / (2**b - 1)``, ``zero = 2**(b - 1)``.
This is the grid family of GPTQ (Frantar et al., ICLR 2023) and of compressed-tensors.

Scales are rounded to their stored 16-bit type *before* any code is chosen, and float32 holds every
product ``scale * (code - zero)`` exactly: what a solver sees is, bit for bit, what is decoded. A
reader that multiplies in 16 bits rounds once more, to its own type.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch

from rarefy.errors import RarefyError
from rarefy.formats.base import (
    FORMATS,
    ElementFormat,
    ElementGrid,
    Packed,
    column_weights,
    strips,
)
from rarefy.formats.packing import pack, unpack, words_per_row
from rarefy.formats.soft import Ranges, soft_round
from rarefy.rules import ranges

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rarefy.rules.ranges import Range

TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16}
STORED = {"float16": "F16", "bfloat16": "BF16"}
_RULES = ("minmax", "mse")
_LARGE = 1 << 21  # elements above which a matrix is rounded in strips


@dataclass(frozen=True)
class IntGrid(ElementGrid):
    """Scale and zero of every group.

    Attributes:
        scale: float [m, G], values that ``scale_dtype`` holds exactly.
        zero: float [m, G], integers in [0, 2**bits).
        form: the format it was fitted for.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    form: Int

    def _spread(self, columns: int, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of columns ``at .. at + columns``, each [m, columns] or [m, 1]."""
        group = self.form.group or at + columns
        first, last = at // group, (at + columns - 1) // group
        if first == last:
            return self.scale[:, first : first + 1], self.zero[:, first : first + 1]
        index = torch.arange(at, at + columns, device=self.scale.device) // group
        return self.scale[:, index], self.zero[:, index]

    def _codes(self, columns: torch.Tensor, at: int) -> torch.Tensor:
        scale, zero = self._spread(columns.shape[1], at)
        return (columns / scale).round_().add_(zero).clamp_(0, self.form.levels)

    def round(self, columns: torch.Tensor, at: int = 0) -> torch.Tensor:
        """Grid values of the nearest codes; see :meth:`Grid.round`."""
        if columns.numel() > _LARGE:
            pieces = strips(*columns.shape)
            return torch.cat([self.rows(p.start, p.stop).round(columns[p], at) for p in pieces])
        scale, zero = self._spread(columns.shape[1], at)
        return self._codes(columns, at).sub_(zero).mul_(scale).to(columns.dtype)

    def encode(self, weight: torch.Tensor) -> Packed:
        """Codes [m, words] along columns, scales [m, G], zeros packed along rows [words, G]."""
        packed = [
            pack(self.rows(p.start, p.stop).codes(weight[p]), self.form.bits)
            for p in strips(*weight.shape)
        ]
        shape = torch.tensor(list(weight.shape), dtype=torch.int64)
        return {"weight_packed": torch.cat(packed)} | self.parameters() | {"weight_shape": shape}

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """int64 [m, n]."""
        return self._codes(weight, 0).to(torch.int64)

    def parameters(self) -> Packed:
        """Scales and, unless symmetric, zero points."""
        tensors = {"weight_scale": self.scale.to(TORCH[self.form.scale_dtype])}
        if not self.form.symmetric:
            zeros = pack(self.zero.T.to(torch.int64), self.form.bits).T
            tensors["weight_zero_point"] = zeros.contiguous()
        return tensors

    def rows(self, start: int, stop: int) -> Self:
        """The grid of some rows."""
        return type(self)(self.scale[start:stop], self.zero[start:stop], self.form)

    @property
    def scales(self) -> torch.Tensor:
        """float [m, G]."""
        return self.scale

    def units(self, weight: torch.Tensor) -> torch.Tensor:
        """Codes minus zero points; see :meth:`Grid.units`."""
        return self._codes(weight, 0).sub_(self._spread(weight.shape[1], 0)[1])

    def spread(self, scales: torch.Tensor, columns: int) -> torch.Tensor:
        """See :meth:`Grid.spread`."""
        group = self.form.group or columns
        return scales.repeat_interleave(group, 1)[:, :columns]

    def rescaled(self, scales: torch.Tensor) -> Self:
        """Other scales under the same codes and zero points; see :meth:`Grid.rescaled`."""
        stored = scales.to(TORCH[self.form.scale_dtype]).to(scales.dtype)
        return replace(self, scale=stored)

    @property
    def _ends(self) -> Range:
        """Both ends of each group's range, [m, G]; of symmetric grids the reach to either side."""
        if self.form.symmetric:
            reach = self.scale * self.form.levels / 2
            return -reach, reach
        return -self.zero * self.scale, (self.form.levels - self.zero) * self.scale

    def adjusted(self, low: torch.Tensor, high: torch.Tensor) -> Self:
        """Other ranges; a symmetric grid follows ``high`` alone. See :meth:`Grid.adjusted`."""
        lo, hi = self._ends
        stored = TORCH[self.form.scale_dtype]
        # Of a 16-bit scale no less than its smallest normal number may be left to divide by,
        # unless the matrix was that small before.
        least = self.scale.clamp(max=torch.finfo(stored).tiny)
        if self.form.symmetric:
            scale = torch.maximum(self.scale * high, least).to(stored).to(lo.dtype)
            return replace(self, scale=scale)
        lo, hi = lo * low, hi * high
        scale = torch.maximum((hi - lo) / self.form.levels, least).to(stored).to(lo.dtype)
        zero = (-lo / scale).round_().clamp_(0, self.form.levels)
        return replace(self, scale=scale, zero=zero)

    def limits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes from 0 to the largest, less the zero points; see :meth:`Grid.limits`."""
        return -self.zero, self.form.levels - self.zero

    def soft(
        self,
        weight: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Straight through the roundings of codes, scales and zeros; see :meth:`Grid.soft`."""
        moved = self.adjusted(low.detach(), high.detach())
        form, (lo, hi) = self.form, self._ends
        reach = Ranges(
            lo=lo,
            hi=hi,
            scale=moved.scale,
            zero=moved.zero,
            levels=form.levels,
            group=form.group,
            symmetric=form.symmetric,
        )
        return soft_round(weight, low, high, offset, reach)

    @classmethod
    def join(cls, grids: Sequence[Self]) -> Self:
        """Concatenate groups."""
        scale = torch.cat([grid.scale for grid in grids], 1)
        return cls(scale, torch.cat([grid.zero for grid in grids], 1), grids[0].form)


class Grouped(ElementFormat):
    """Integer codes in groups of columns; subclasses say how scales and zero points are stored.

    Attributes:
        bits: of a code.
        group: columns a group, or None for one group a row; the last group may be shorter.
        scale_dtype: of the stored scales, "float16" or "bfloat16".
        symmetric: no stored zero point.
    """

    bits: int
    group: int | None
    scale_dtype: str
    symmetric: bool = False

    scaled = True
    learnable = True

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def span(self) -> int | None:
        """Columns a group."""
        return self.group

    def groups(self, columns: int) -> int:
        """Number of groups of a row of that many columns."""
        return -(-columns // self.group) if self.group else 1

    def grouped(self, matrix: torch.Tensor) -> torch.Tensor:
        """[m, n] as [m, G, g], the last group filled up with zeros."""
        count = self.groups(matrix.shape[1])
        pad = count * (self.group or matrix.shape[1]) - matrix.shape[1]
        return torch.nn.functional.pad(matrix, (0, pad)).reshape(matrix.shape[0], count, -1)

    def misfit(self, rows: int, columns: int) -> str:
        """A group may not be larger than a row."""
        if self.group is None or self.group <= columns:
            return ""
        return (
            f"a group of {self.group} is larger than rows of {columns} columns; choose a group of "
            f"at most {columns}, or null for one group a row"
        )

    @abstractmethod
    def stored_grid(self, packed: Mapping[str, torch.Tensor]) -> IntGrid:
        """Scales and zero points as they are stored."""

    def decode(
        self, packed: Mapping[str, torch.Tensor], rows: slice | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float32 [m, n]; the same arithmetic as ``round``, hence the same bits."""
        columns = int(packed["weight_shape"][1])
        wanted = slice(None) if rows is None else rows
        return self.values(
            unpack(packed["weight_packed"][wanted], self.bits, columns), packed, rows
        )

    def values(
        self,
        codes: torch.Tensor,
        parameters: Mapping[str, torch.Tensor],
        rows: slice | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``scale (code - zero)``; see :meth:`ElementFormat.values`."""
        columns = int(parameters["weight_shape"][1])
        wanted = slice(None) if rows is None else rows
        grid = self.stored_grid(parameters)
        scale, zero = grid.scale[wanted], grid.zero[wanted]
        groups = self.grouped(codes.float())
        groups.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
        return groups.reshape(scale.shape[0], -1)[:, :columns]

    def store(self, codes: torch.Tensor) -> torch.Tensor:
        """int32 words of the bit stream."""
        return pack(codes, self.bits)

    def restore(self, stored: torch.Tensor, count: int) -> torch.Tensor:
        """uint8 [count]."""
        return unpack(stored, self.bits, count)

    def stream_layout(self, count: int) -> tuple[tuple[int, ...], str]:
        """Words of the bit stream."""
        return (words_per_row(count, self.bits),), "I32"

    def layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Stored tensors; see :meth:`Format.layout`."""
        packed = ((rows, words_per_row(columns, self.bits)), "I32")
        parameters = self.parameter_layout(rows, columns)
        return {"weight_packed": packed} | parameters | {"weight_shape": ((2,), "I64")}


@FORMATS.register("int", family="quantization")
@dataclass(frozen=True)
class Int(Grouped):
    """Integer codes with a scale (and a zero point) per row or group of columns.

    Attributes:
        bits: 2 to 8.
        group: columns a group, or None for one group a row; the last group may be shorter.
        symmetric: no stored zero point.
        rule: "minmax", or "mse" to search for the range of least error.
        scale_dtype: "float16" or "bfloat16"; see :meth:`for_dtype`.

    Raises:
        ValueError: a field outside these values.
    """

    bits: int
    group: int | None = None
    symmetric: bool = False
    rule: str = "minmax"
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must lie in 2..8, and {self.bits} does not")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group must be at least 1, or null for whole rows, not {self.group}")
        if self.rule not in _RULES:
            raise ValueError(f"rule must be one of {', '.join(_RULES)}, not {self.rule!r}")
        if self.scale_dtype not in TORCH:
            raise ValueError(f"scale_dtype must be one of {', '.join(TORCH)}")

    def with_bits(self, bits: int) -> Self:
        """See :meth:`Format.with_bits`."""
        return replace(self, bits=bits)

    def fit(
        self,
        weight: torch.Tensor,
        importance: torch.Tensor | None = None,
        support: torch.Tensor | None = None,
    ) -> IntGrid:
        """Choose each group's range by the rule; see :meth:`Format.fit`."""
        importance = column_weights(importance)
        pieces = [self._range(weight[rows], importance) for rows in strips(*weight.shape)]
        lo, hi = (torch.cat(ends) for ends in zip(*pieces, strict=True))
        return self._grid((lo, hi))

    def _range(self, weight: torch.Tensor, importance: torch.Tensor | None) -> Range:
        """The rule's range of every group of some rows."""
        # Padding with zeros changes no range and costs no error: zero is always on the grid.
        groups = self.grouped(weight)
        if self.rule == "minmax":
            return ranges.minmax(groups)
        if importance is not None:
            importance = self.grouped(importance.unsqueeze(0))[0]
        return ranges.mse(groups, self._quantize, importance)

    def _grid(self, span: Range) -> IntGrid:
        lo, hi = span
        if self.symmetric:
            reach = torch.maximum(-lo, hi)
            lo, hi = -reach, reach
        stored = TORCH[self.scale_dtype]
        scale = ((hi - lo) / self.levels).to(stored).to(lo.dtype)
        if not bool(torch.isfinite(scale).all()):
            raise RarefyError(
                f"weights up to {float(hi.max()):.3g} need a scale beyond {self.scale_dtype}; "
                "convert the checkpoint to bfloat16, or keep this matrix"
            )
        empty = scale == 0
        scale = torch.where(empty, torch.ones_like(scale), scale)
        if self.symmetric:
            zero = torch.full_like(scale, 1 << (self.bits - 1))
        else:
            zero = torch.where(empty, torch.zeros_like(lo), -lo / scale)
            zero = zero.round_().clamp_(0, self.levels)
        return IntGrid(scale, zero, self)

    def _quantize(self, groups: torch.Tensor, span: Range) -> torch.Tensor:
        grid = self._grid(span)
        scale, zero = grid.scale.unsqueeze(-1), grid.zero.unsqueeze(-1)
        codes = (groups / scale).round_().add_(zero).clamp_(0, self.levels)
        return codes.sub_(zero).mul_(scale)

    def stored_grid(self, packed: Mapping[str, torch.Tensor]) -> IntGrid:
        """Scales and zero points as they are stored."""
        scale = packed["weight_scale"].float()
        rows = int(packed["weight_shape"][0])
        zero = torch.full_like(scale, 1 << (self.bits - 1))
        if not self.symmetric:
            words = packed["weight_zero_point"].T.contiguous()
            zero = unpack(words, self.bits, rows).T.float()
        return IntGrid(scale, zero, self)

    def parameter_layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Scales and, unless symmetric, zero points."""
        count = self.groups(columns)
        tensors: dict[str, tuple[tuple[int, ...], str]] = {
            "weight_scale": ((rows, count), STORED[self.scale_dtype]),
        }
        if not self.symmetric:
            tensors["weight_zero_point"] = ((words_per_row(rows, self.bits), count), "I32")
        return tensors

    def for_dtype(self, dtype: str) -> Self:
        """Scales in bfloat16 in a bfloat16 checkpoint, in float16 in any other."""
        return replace(self, scale_dtype="bfloat16" if dtype == "BF16" else "float16")

    def label(self) -> str:
        """For example ``int4 g64``, ``int8 row sym``."""
        where = f"g{self.group}" if self.group else "row"
        return f"int{self.bits} {where}{' sym' if self.symmetric else ''}"
