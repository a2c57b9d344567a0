"""The blocks of 32 that GGUF files store, as a format: solvers then work on the very grid that
llama.cpp decodes, and an export copies codes instead of rounding again.

    q4_0, q5_0, q8_0   w = d q            q in -8 .. 7, -16 .. 15, -128 .. 127; d of either sign
    q4_1, q5_1         w = d q + m        q in 0 .. 15, 0 .. 31; m is any number, not a zero point
    iq4_nl             w = d t[q]         t: 16 values that lie denser around zero

d and m are float16 and products are float32, as in ggml. The scales are those of least weighted
error; see ``rules/blocks.py``. Bits a weight: 4.5, 5.5, 8.5, 5, 6, 4.5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch

from rarefy.errors import RarefyError
from rarefy.formats.base import FORMATS, Format, Grid, Packed, column_weights, strips
from rarefy.formats.packing import pack, unpack, words_per_row
from rarefy.rules.blocks import Levels, affine, inverse, symmetric, weights_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BLOCK = 32
_SMALLEST = 2.0**-24  # of float16
_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types with 32 weights a block.

    Attributes:
        bits: of a code. levels: what codes stand for. minimum: whether a block stores one.
    """

    bits: int
    levels: Levels
    minimum: bool = False


TYPES: dict[str, BlockType] = {
    "q4_0": BlockType(4, Levels(-8, 7)),
    "q4_1": BlockType(4, Levels(0, 15), minimum=True),
    "q5_0": BlockType(5, Levels(-16, 15)),
    "q5_1": BlockType(5, Levels(0, 31), minimum=True),
    "q8_0": BlockType(8, Levels(-128, 127)),
    "iq4_nl": BlockType(4, Levels(-127, 113, _NL)),
}


@dataclass(frozen=True)
class GgmlGrid(Grid):
    """Scale and minimum of every block.

    Attributes:
        scale, minimum: float [m, G], values that float16 holds exactly.
        form: the format it was fitted for.
    """

    scale: torch.Tensor
    minimum: torch.Tensor
    form: Ggml

    def _spread(self, columns: int, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and minimum of columns ``at .. at + columns``, each [m, columns] or [m, 1]."""
        first, last = at // BLOCK, (at + columns - 1) // BLOCK
        if first == last:
            return self.scale[:, first : first + 1], self.minimum[:, first : first + 1]
        index = torch.arange(at, at + columns, device=self.scale.device) // BLOCK
        return self.scale[:, index], self.minimum[:, index]

    def codes(self, columns: torch.Tensor, at: int = 0) -> torch.Tensor:
        """Codes of the nearest members, int64 [m, k]."""
        scale, minimum = self._spread(columns.shape[1], at)
        return self.form.block.levels.codes((columns.float() - minimum) * inverse(scale))

    def round(self, columns: torch.Tensor, at: int = 0) -> torch.Tensor:
        """Values of the nearest codes; see :meth:`Grid.round`."""
        scale, minimum = self._spread(columns.shape[1], at)
        units = self.form.block.levels.nearest((columns.float() - minimum) * inverse(scale))
        return units.mul_(scale).add_(minimum).to(columns.dtype)

    def encode(self, weight: torch.Tensor) -> Packed:
        """Codes [m, words] along columns, scales and minima [m, G]."""
        packed = [
            pack(self.rows(p.start, p.stop).codes(weight[p]), self.form.block.bits)
            for p in strips(*weight.shape)
        ]
        tensors = {"weight_packed": torch.cat(packed), "weight_scale": self.scale.half()}
        if self.form.block.minimum:
            tensors["weight_minimum"] = self.minimum.half()
        return tensors | {"weight_shape": torch.tensor(list(weight.shape), dtype=torch.int64)}

    def rows(self, start: int, stop: int) -> Self:
        """The grid of some rows."""
        return replace(self, scale=self.scale[start:stop], minimum=self.minimum[start:stop])

    @classmethod
    def join(cls, grids: Sequence[Self]) -> Self:
        """Concatenate blocks."""
        scale = torch.cat([grid.scale for grid in grids], 1)
        return cls(scale, torch.cat([grid.minimum for grid in grids], 1), grids[0].form)

    @property
    def scales(self) -> torch.Tensor:
        """float [m, G]."""
        return self.scale

    def units(self, weight: torch.Tensor) -> torch.Tensor:
        """What the codes stand for; see :meth:`Grid.units`."""
        return self.form.block.levels.nearest(weight * inverse(self._spread(weight.shape[1], 0)[0]))

    def spread(self, scales: torch.Tensor, columns: int) -> torch.Tensor:
        """See :meth:`Grid.spread`."""
        return scales.repeat_interleave(BLOCK, 1)[:, :columns]

    def rescaled(self, scales: torch.Tensor) -> Self:
        """Other scales under the same codes; see :meth:`Grid.rescaled`."""
        return replace(self, scale=_stored(scales))

    def adjusted(self, low: torch.Tensor, high: torch.Tensor) -> Self:
        """Other ranges; without a minimum the scale follows ``high``. See :meth:`Grid.adjusted`."""
        scale, minimum = self._moved(low, high)
        return replace(self, scale=_stored(scale), minimum=_stored(minimum))

    def _moved(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.form.block.minimum:
            return self.scale * high, self.minimum
        top = self.form.block.levels.high
        last = (self.minimum + top * self.scale) * high
        return (last - self.minimum * low) / top, self.minimum * low

    def limits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ends of the levels; see :meth:`Grid.limits`."""
        levels = self.form.block.levels
        low, high = (torch.full_like(self.scale, end) for end in (levels.low, levels.high))
        return low, high

    def soft(
        self,
        weight: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Straight through every rounding; see :meth:`Grid.soft`."""
        columns, levels = weight.shape[1], self.form.block.levels
        scale, minimum = (
            self.spread(_through(part, _stored(part)), columns) for part in self._moved(low, high)
        )
        units = (weight - minimum) / torch.where(scale == 0, 1.0, scale)
        units = units if offset is None else units + offset
        return _through(units, units.round()).clamp(levels.low, levels.high) * scale + minimum


def _through(soft: torch.Tensor, hard: torch.Tensor) -> torch.Tensor:
    """The values of ``hard`` with the gradient of ``soft``."""
    return hard.detach() + (soft - soft.detach())


def _stored(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers as float16 holds them."""
    return numbers.detach().half().to(numbers.dtype)


@FORMATS.register("ggml", family="quantization")
@dataclass(frozen=True)
class Ggml(Format):
    """Blocks of 32 columns that GGUF files can hold.

    Attributes:
        type: "q4_0", "q4_1", "q5_0", "q5_1", "q8_0" or "iq4_nl".

    Raises:
        ValueError: another type.
    """

    type: str = "q4_1"

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ValueError(f"type must be one of {', '.join(TYPES)}, not {self.type!r}")

    @property
    def block(self) -> BlockType:
        """Facts of the type."""
        return TYPES[self.type]

    @property
    def holds_zero(self) -> bool:  # type: ignore[override]
        """A minimum, and the table of iq4_nl, leave zero out."""
        return not self.block.minimum and not self.block.levels.table

    @property
    def scaled(self) -> bool:  # type: ignore[override]
        """A minimum is not a multiple of the scale."""
        return not self.block.minimum

    @property
    def learnable(self) -> bool:  # type: ignore[override]
        """Codes have to be evenly spaced."""
        return not self.block.levels.table

    @property
    def span(self) -> int:
        """Columns a block."""
        return BLOCK

    def misfit(self, rows: int, columns: int) -> str:
        """Blocks are whole."""
        if columns % BLOCK == 0:
            return ""
        return f"its {columns} columns are not blocks of {BLOCK}; keep it, or give format int"

    def fit(
        self,
        weight: torch.Tensor,
        importance: torch.Tensor | None = None,
        support: torch.Tensor | None = None,
    ) -> GgmlGrid:
        """Search scales, and minima, of least weighted error; see :meth:`Format.fit`.

        Raises:
            RarefyError: weights beyond float16's range.
        """
        weights = column_weights(importance)
        if weights is not None:
            weights = weights.float().reshape(-1, BLOCK)
        found = [self._search(weight[rows], weights) for rows in strips(*weight.shape)]
        scale, minimum = (torch.cat(parts) for parts in zip(*found, strict=True))
        if not bool(torch.isfinite(scale).all() & torch.isfinite(minimum).all()):
            raise RarefyError(
                f"weights up to {float(weight.abs().max()):.3g} need a scale beyond float16; "
                "keep this matrix"
            )
        return GgmlGrid(scale, minimum, self)

    def _search(
        self, weight: torch.Tensor, importance: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and minimum of every block of some rows, [m, G]."""
        x = weight.float().reshape(len(weight), -1, BLOCK)
        w = weights_of(importance, x)
        if not self.block.minimum:
            scale = _stored(symmetric(x, w, self.block.levels))
            if self.holds_zero:  # then a block of zeros may have a scale that tuners divide by
                scale = torch.where(scale == 0, _SMALLEST, scale)
            return scale, torch.zeros_like(scale)
        scale, minimum = affine(x, w, self.block.levels.high)
        # The minimum answers to the scale as it is stored.
        scale = _stored(scale)
        units = (x - minimum.unsqueeze(-1)) * inverse(scale).unsqueeze(-1)
        rest = x - self.block.levels.nearest(units) * scale.unsqueeze(-1)
        return scale, _stored((w * rest).sum(-1) / w.sum(-1))

    def decode(
        self, packed: Mapping[str, torch.Tensor], rows: slice | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float32 [m, n]; the same arithmetic as ``round``, hence the same bits."""
        columns = int(packed["weight_shape"][1])
        wanted = slice(None) if rows is None else rows
        codes = unpack(packed["weight_packed"][wanted], self.block.bits, columns)
        values = self.block.levels.values(codes).reshape(len(codes), -1, BLOCK)
        values.mul_(packed["weight_scale"][wanted].float().unsqueeze(-1))
        if self.block.minimum:
            values.add_(packed["weight_minimum"][wanted].float().unsqueeze(-1))
        return values.reshape(len(codes), columns)

    def stored_grid(self, packed: Mapping[str, torch.Tensor]) -> GgmlGrid:
        """Scales and minima as they are stored."""
        scale = packed["weight_scale"].float()
        minimum = packed["weight_minimum"].float() if self.block.minimum else scale * 0
        return GgmlGrid(scale, minimum, self)

    def layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Stored tensors; see :meth:`Format.layout`."""
        blocks = (rows, columns // BLOCK)
        tensors: dict[str, tuple[tuple[int, ...], str]] = {
            "weight_packed": ((rows, words_per_row(columns, self.block.bits)), "I32"),
            "weight_scale": (blocks, "F16"),
        }
        if self.block.minimum:
            tensors["weight_minimum"] = (blocks, "F16")
        return tensors | {"weight_shape": ((2,), "I64")}

    def label(self) -> str:
        """For example ``q4_1``."""
        return self.type
