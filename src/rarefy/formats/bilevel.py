"""Grouped integers whose scales and zero points are small integers themselves.

    w = s (q - z),    s = U (h + c) / 2**p,    z = k / 2**(r - b),    h = 2**(p - 1)

Quantizing the statistics of small groups as well is the bilevel quantization of SpQR (Dettmers et
al., *SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression*, ICLR 2024,
arXiv 2306.03078, section 4) and the double quantization of QLoRA (arXiv 2305.14314). At the bytes
of 16-bit scales for groups of 64 it affords groups of 32.

    q   code of a weight, b bits            U   a row's unit, 16 bits, [m, 1]
    c   code of a group's scale, p bits     k   code of its zero point, r bits

Where we differ, and why:
 * A scale lies between U / 2 and 3 U / 2: the scales of one row differ by less than that, and what
   would code smaller ones makes the others finer.
 * Zero points have r - b bits behind the binary point. An integer zero point moves the ends of a
   group's range by up to half a step; then a matrix that has known a grid with real-valued ends,
   such as GGUF's Q4_1, leaves it.
 * Codes are searched together, for the least weighted error of the group.
Zero itself need not lie on the grid, so zeros do not stay zeros where r > b.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch

from rarefy.errors import RarefyError
from rarefy.formats.base import FORMATS, Packed, column_weights, strips
from rarefy.formats.integer import STORED, TORCH, Grouped, IntGrid
from rarefy.formats.packing import pack, unpack, words_per_row
from rarefy.rules import ranges

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_RULES = ("minmax", "mse")


@dataclass(frozen=True)
class BilevelGrid(IntGrid):
    """Scale and zero of every group, of values that their codes can express.

    Attributes:
        unit: U, float [m, 1], values that ``scale_dtype`` holds exactly.
    """

    form: Bilevel  # type: ignore[assignment]
    unit: torch.Tensor

    def _codes(self, columns: torch.Tensor, at: int) -> torch.Tensor:
        scale, zero = self._spread(columns.shape[1], at)
        return (columns / scale).add_(zero).round_().clamp_(0, self.form.levels)

    def parameters(self) -> Packed:
        """Units, and the codes of scales and zero points, packed along rows."""
        form = self.form
        k = (self.zero * form.fraction).round()
        return {
            "weight_scale": self.unit.to(TORCH[form.scale_dtype]),
            "weight_scale_code": _columns(form.scale_codes(self.scale, self.unit), form.scale_bits),
            "weight_zero_point": _columns(k, form.zero_bits),
        }

    def rows(self, start: int, stop: int) -> Self:
        """The grid of some rows."""
        kept = slice(start, stop)
        return replace(self, scale=self.scale[kept], zero=self.zero[kept], unit=self.unit[kept])

    @classmethod
    def join(cls, grids: Sequence[Self]) -> Self:
        """Concatenate groups of rows whose units agree."""
        if any(not torch.equal(grid.unit, grids[0].unit) for grid in grids):
            raise ValueError("spans of a bilevel grid share their units")
        scale = torch.cat([grid.scale for grid in grids], 1)
        zero = torch.cat([grid.zero for grid in grids], 1)
        return replace(grids[0], scale=scale, zero=zero)

    @property
    def scales(self) -> torch.Tensor:
        """The units: what may move without leaving the codes, [m, 1]."""
        return self.unit

    @property
    def pitch(self) -> torch.Tensor:
        """See :meth:`Grid.pitch`."""
        return self.scale / self.unit

    def units(self, weight: torch.Tensor) -> torch.Tensor:
        """Shares of the row's unit, [m, n]; see :meth:`Grid.units`."""
        scale, zero = self._spread(weight.shape[1], 0)
        return self._codes(weight, 0).sub_(zero).mul_(scale / self.unit)

    def spread(self, scales: torch.Tensor, columns: int) -> torch.Tensor:
        """See :meth:`Grid.spread`; of one number a row, or of one a group."""
        if scales.shape[1] == 1:
            return scales.expand(-1, columns)
        return super().spread(scales, columns)

    def rescaled(self, scales: torch.Tensor) -> Self:
        """Other units under the same codes; see :meth:`Grid.rescaled`."""
        unit = scales.to(TORCH[self.form.scale_dtype]).to(scales.dtype)
        codes = self.form.scale_codes(self.scale, self.unit)
        return replace(self, unit=unit, scale=self.form.scale_of(codes, unit))

    def adjusted(self, low: torch.Tensor, high: torch.Tensor) -> Self:
        """Other ranges under the same units; see :meth:`Grid.adjusted`."""
        form = self.form
        lo, hi = (end * factor for end, factor in zip(self._ends, (low, high), strict=True))
        scale = form.scale_of(form.scale_codes((hi - lo) / form.levels, self.unit), self.unit)
        return replace(self, scale=scale, zero=form.zero_of(-lo / scale))


@FORMATS.register(
    "bilevel",
    family="quantization",
    paper="Dettmers et al., SpQR, ICLR 2024",
    arxiv="2306.03078",
)
@dataclass(frozen=True)
class Bilevel(Grouped):
    """Integer codes in small groups, with scales and zero points of a few bits.

    Attributes:
        bits: b, 2 to 8.
        group: columns a group.
        scale_bits: p, 2 to 6.
        zero_bits: r, from ``bits`` to ``bits + 3``, at most 8.
        rule: "mse" to search for the codes of least error, or "minmax" for those nearest to the
            ends of the range.
        scale_dtype: of the units, "float16" or "bfloat16"; see :meth:`for_dtype`.

    Raises:
        ValueError: a field outside these values.
    """

    bits: int
    group: int = 32
    scale_bits: int = 4
    zero_bits: int = 5
    rule: str = "mse"
    scale_dtype: str = "float16"

    spans_independent = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must lie in 2..8, and {self.bits} does not")
        if self.group < 1:
            raise ValueError(f"group must be at least 1, not {self.group}")
        if not 2 <= self.scale_bits <= 6:
            raise ValueError(f"scale_bits must lie in 2..6, and {self.scale_bits} does not")
        most = min(8, self.bits + 3)
        if not self.bits <= self.zero_bits <= most:
            raise ValueError(
                f"zero_bits must lie in {self.bits}..{most} for codes of {self.bits} bits, and "
                f"{self.zero_bits} does not"
            )
        if self.rule not in _RULES:
            raise ValueError(f"rule must be one of {', '.join(_RULES)}, not {self.rule!r}")
        if self.scale_dtype not in TORCH:
            raise ValueError(f"scale_dtype must be one of {', '.join(TORCH)}")

    @property
    def holds_zero(self) -> bool:  # type: ignore[override]
        """Only where zero points are whole codes."""
        return self.zero_bits == self.bits

    @property
    def fraction(self) -> int:
        """Zero points between one code and the next."""
        return 1 << (self.zero_bits - self.bits)

    def with_bits(self, bits: int) -> Self:
        """The same bits behind the binary point of zero points; see :meth:`Format.with_bits`."""
        zero_bits = min(8, bits + self.zero_bits - self.bits)
        return replace(self, bits=bits, zero_bits=zero_bits)

    def scale_codes(self, scale: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        """The codes c whose scales are nearest, as floats [m, G]."""
        steps = 1 << self.scale_bits
        return (scale / unit * steps - steps // 2).round_().clamp_(0, steps - 1)

    def scale_of(self, codes: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        """s of codes c [m, G]."""
        steps = 1 << self.scale_bits
        return (codes + steps // 2) * (unit / steps)

    def zero_of(self, zero: torch.Tensor) -> torch.Tensor:
        """The nearest zero points that there are, [m, G]."""
        last = (1 << self.zero_bits) - 1
        return (zero * self.fraction).round_().clamp_(0, last).div_(self.fraction)

    def fit(
        self,
        weight: torch.Tensor,
        importance: torch.Tensor | None = None,
        support: torch.Tensor | None = None,
    ) -> BilevelGrid:
        """Units from each row's widest range, then the codes by the rule; see :meth:`Format.fit`.

        Raises:
            RarefyError: weights whose unit the stored type cannot hold.
        """
        importance = column_weights(importance)
        if importance is not None:
            importance = self.grouped(importance.unsqueeze(0))
        pieces = [
            self._fit(self.grouped(weight[part]), importance) for part in strips(*weight.shape)
        ]
        scale, zero, unit = (torch.cat(part) for part in zip(*pieces, strict=True))
        return BilevelGrid(scale, zero, self, unit)

    def _fit(
        self, groups: torch.Tensor, importance: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scale, zero [m, G] and unit [m, 1] of rows in groups [m, G, g]."""
        lo, hi = ranges.minmax(groups)
        wide, steps = (hi - lo) / self.levels, 1 << self.scale_bits
        stored = TORCH[self.scale_dtype]
        unit = (wide.amax(1, keepdim=True) * (steps / (1.5 * steps - 1))).to(stored).to(lo.dtype)
        if not bool(torch.isfinite(unit).all()):
            raise RarefyError(
                f"weights up to {float(hi.max()):.3g} need a scale beyond {self.scale_dtype}; "
                "convert the checkpoint to bfloat16, or keep this matrix"
            )
        lost = unit == 0  # rows of zeros, or smaller than the stored type can say
        unit = torch.where(lost, torch.ones_like(unit), unit)
        nearest, middle = self.scale_codes(wide, unit), (lo + hi) / 2
        search = self.rule == "mse"
        least = torch.full_like(wide, torch.inf)
        scale, zero = torch.empty_like(wide), torch.empty_like(wide)
        # Clipping a range pays often, widening it only where its nearest scale is too small.
        for c in range(-(steps // 2) + 1, 2) if search else (0,):
            s = self.scale_of((nearest + c).clamp_(0, steps - 1), unit)
            # The clipped range keeps its middle.
            centred = self.levels / 2 - middle / s
            for k in (0, -1, 1) if search else (0,):
                z = self.zero_of(centred + k / self.fraction)
                error = self._error(groups, s, z, importance)
                better = error < least
                least = torch.where(better, error, least)
                scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
        empty = lost | ((lo == 0) & (hi == 0))
        return scale, torch.where(empty, zero.floor(), zero), unit

    def _error(
        self,
        groups: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        importance: torch.Tensor | None,
    ) -> torch.Tensor:
        """Weighted squared error of every group, [m, G]."""
        s, z = scale.unsqueeze(-1), zero.unsqueeze(-1)
        error = (groups / s).add_(z).round_().clamp_(0, self.levels).sub_(z).mul_(s).sub_(groups)
        error.square_()
        return error.sum(-1) if importance is None else error.mul_(importance).sum(-1)

    def stored_grid(self, packed: Mapping[str, torch.Tensor]) -> BilevelGrid:
        """Scales and zero points as they are stored."""
        unit = packed["weight_scale"].float()
        rows = int(packed["weight_shape"][0])
        c = _rows(packed["weight_scale_code"], self.scale_bits, rows)
        k = _rows(packed["weight_zero_point"], self.zero_bits, rows)
        return BilevelGrid(self.scale_of(c, unit), k / self.fraction, self, unit)

    def opened(self, packed: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales as uint8 [m, G], and the float32 [m] that multiplies those of each row."""
        steps = 1 << self.scale_bits
        unit = packed["weight_scale"].float().squeeze(1)
        c = _rows(packed["weight_scale_code"], self.scale_bits, len(unit))
        return (c + steps // 2).to(torch.uint8).contiguous(), unit / steps

    def parameter_layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Units, and the codes of scales and zero points."""
        count = self.groups(columns)
        return {
            "weight_scale": ((rows, 1), STORED[self.scale_dtype]),
            "weight_scale_code": ((words_per_row(rows, self.scale_bits), count), "I32"),
            "weight_zero_point": ((words_per_row(rows, self.zero_bits), count), "I32"),
        }

    def for_dtype(self, dtype: str) -> Self:
        """Units in bfloat16 in a bfloat16 checkpoint, in float16 in any other."""
        return replace(self, scale_dtype="bfloat16" if dtype == "BF16" else "float16")

    def label(self) -> str:
        """For example ``int4 g32 s4 z5``."""
        return f"int{self.bits} g{self.group} s{self.scale_bits} z{self.zero_bits}"


def _columns(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [m, G] packed along rows, [words, G]."""
    return pack(codes.T.to(torch.int64), bits).T.contiguous()


def _rows(packed: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """Invert :func:`_columns`, as floats [m, G]."""
    return unpack(packed.T.contiguous(), bits, rows).T.float()
