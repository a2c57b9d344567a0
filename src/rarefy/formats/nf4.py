"""NF4: four-bit codes for normally distributed weights, in blocks that share a largest value.

    w = absmax(block) t[code],    t: 16 quantiles of the normal distribution, scaled to [-1, 1]

Dettmers, Pagnoni, Holtzman, Zettlemoyer, QLoRA, NeurIPS 2023 (arXiv 2305.14314), sections 2 and 3,
laid out as bitsandbytes does: the matrix is flattened row by row and cut into blocks of 64, which
cross rows where 64 does not divide them; two codes a byte, the first in the high nibble.

**Double quantization** stores the absmax of the blocks in 8 bits. Their mean over the matrix is
taken off, and what is left is coded in blocks of 256 by a table of dynamic exponents, each block
with a float32 absmax of its own. (The paper's text calls that table FP8; its code uses this one.)

Symbols: m rows, n columns, B = ceil(m n / 64) blocks, D = ceil(B / 256) blocks of blocks. A matrix
of some rows cut out of another begins in the middle of a block; ``start`` says where.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Self

import torch
from torch.nn.functional import pad

from rarefy.errors import RarefyError
from rarefy.formats.base import FORMATS, ElementFormat, ElementGrid, Packed, strips

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BLOCK = 64
NESTED = 256
_TAIL = 0.9677083  # ((1 - 1 / 32) + (1 - 1 / 30)) / 2, to the digits that bitsandbytes took
_TRUST = 1.05  # codes stay the same if the absmax is off by this factor
_LARGE = 1 << 21  # elements above which a matrix is rounded in strips


@cache
def normal_table() -> torch.Tensor:
    """The 16 values of NF4 in ascending order, float32: 7 negative, zero, 8 positive."""
    # Single precision up to the quantiles, as in bitsandbytes, so that the last bits agree.
    upper = torch.special.ndtri(torch.linspace(_TAIL, 0.5, 9)[:-1].double())
    lower = -torch.special.ndtri(torch.linspace(_TAIL, 0.5, 8)[:-1].double())
    table = torch.cat([upper, lower, torch.zeros(1, dtype=torch.float64)]).sort().values.float()
    return table / table.max()


@cache
def _pairs(device: torch.device) -> torch.Tensor:
    """For every octet the values of its two codes, as one number of eight bytes, [256]."""
    codes = torch.arange(256)
    both = normal_table()[torch.stack((codes >> 4, codes & 15), 1)]
    return both.view(torch.float64).squeeze(1).to(device)


@cache
def dynamic_table() -> torch.Tensor:
    """The 256 values of the signed 8-bit dynamic exponent in ascending order, float32.

    A decade ``10^-k`` is cut into ``2^(6 - k)`` equal parts, whose middles are the values; 0 and
    1 are added. Dettmers, 8-bit Approximations for Parallelism in Deep Learning, ICLR 2016.
    """
    edges = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
    decades = [(edge[1:] + edge[:-1]) / 2 * 10.0 ** (i - 6) for i, edge in enumerate(edges)]
    middles = torch.cat(decades)
    return torch.cat([-middles, middles, torch.tensor([0.0, 1.0])]).sort().values


def _nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index of the nearest entry of an ascending table, uint8."""
    middles = ((table[1:] + table[:-1]) / 2).to(values.device)
    return torch.bucketize(values, middles, out_int32=True).to(torch.uint8)


def _blocks(flat: torch.Tensor, size: int) -> torch.Tensor:
    """A vector cut into rows of ``size``, the last filled up with zeros."""
    return pad(flat, (0, -len(flat) % size)).reshape(-1, size)


@dataclass(frozen=True)
class Absmax:
    """The largest absolute value of every block, as it is stored.

    Attributes:
        stored: ``weight_scale`` [B], or ``weight_scale_code`` [B], ``weight_scale_peak`` [D] and
            ``weight_scale_mean`` [1].
    """

    stored: Packed

    @classmethod
    def of(cls, absmax: torch.Tensor, nested: bool) -> Self:
        """Store a vector [B], float32, as it is or quantized."""
        if not nested:
            return cls({"weight_scale": absmax})
        mean = absmax.mean()
        blocks = _blocks(absmax - mean, NESTED)
        # The last block's filling takes part in no peak, because it is zero.
        peak = blocks.abs().amax(1)
        unit = torch.where(peak > 0, peak, torch.ones_like(peak)).unsqueeze(1)
        codes = _nearest(blocks / unit, dynamic_table()).flatten()[: len(absmax)]
        return cls(
            {
                "weight_scale_code": codes,
                "weight_scale_peak": peak,
                "weight_scale_mean": mean.reshape(1),
            }
        )

    def values(self) -> torch.Tensor:
        """Float32 [B]. Far below the others of its block of blocks one may come out negative."""
        if "weight_scale" in self.stored:
            return self.stored["weight_scale"]
        codes = self.stored["weight_scale_code"]
        units = _blocks(dynamic_table().to(codes.device)[codes.int()], NESTED)
        offsets = units * self.stored["weight_scale_peak"].unsqueeze(1)
        return offsets.flatten()[: len(codes)] + self.stored["weight_scale_mean"]

    def cut(self, first: int, past: int) -> Self:
        """Blocks ``first .. past``, the first being the first of its block of blocks."""
        cuts = {"weight_scale_mean": slice(None)}
        cuts["weight_scale_peak"] = slice(first // NESTED, -(-past // NESTED))
        return type(self)({k: t[cuts.get(k, slice(first, past))] for k, t in self.stored.items()})


@dataclass(frozen=True)
class NF4Grid(ElementGrid):
    """The blocks' absmax, and what weights are divided by to find their codes.

    Attributes:
        absmax: as it is stored.
        scale: the values that it decodes to, [B].
        unit: the weights' own absmax where the stored one is close to it, [B]; infinite where the
            stored one is not positive, so that all codes are zero there.
        start: position of the matrix's first weight in its blocks.
        columns: n.
        form: the format.
    """

    absmax: Absmax
    scale: torch.Tensor
    unit: torch.Tensor
    start: int
    columns: int
    form: NF4

    def _spread(self, blocks: torch.Tensor, shape: torch.Size, at: int) -> torch.Tensor:
        """The entry of each weight's block, for columns ``at .. at + k`` of the matrix, [m, k]."""
        if shape[1] == self.columns:
            return _along(blocks, self.start, shape.numel()).reshape(shape)
        rows = torch.arange(shape[0], device=blocks.device).unsqueeze(1) * self.columns
        places = rows + torch.arange(self.start + at, self.start + at + shape[1]).to(rows.device)
        return blocks[places // BLOCK]

    def _codes(self, columns: torch.Tensor, at: int) -> torch.Tensor:
        unit = self._spread(self.unit, columns.shape, at)
        return _nearest(columns.float() / unit, normal_table())

    def round(self, columns: torch.Tensor, at: int = 0) -> torch.Tensor:
        """Values of the nearest codes; see :meth:`Grid.round`."""
        if columns.numel() > _LARGE and columns.shape[1] == self.columns:
            pieces = strips(*columns.shape)
            return torch.cat([self.rows(p.start, p.stop).round(columns[p]) for p in pieces])
        values = normal_table().to(columns.device)[self._codes(columns, at).int()]
        values.mul_(self._spread(self.scale, columns.shape, at))
        return values.to(columns.dtype)

    def encode(self, weight: torch.Tensor) -> Packed:
        """Codes of the flattened matrix, the absmax, and where the matrix begins."""
        shape = torch.tensor(list(weight.shape), dtype=torch.int64)
        codes = self.form.store(self.codes(weight).flatten())
        return {"weight_packed": codes} | self.parameters() | {"weight_shape": shape}

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """uint8 [m, n]."""
        pieces = strips(*weight.shape)
        return torch.cat([self.rows(p.start, p.stop)._codes(weight[p], 0) for p in pieces])

    def parameters(self) -> Packed:
        """The absmax, and where the matrix begins."""
        return self.absmax.stored | {"weight_start": torch.tensor([self.start])}

    def rows(self, start: int, stop: int) -> Self:
        """The grid of some rows, which begin where they began in the whole."""
        whole = BLOCK * (NESTED if self.form.double_quantization else 1)
        begin, end = (self.start + row * self.columns for row in (start, stop))
        dropped = begin // whole * whole
        first, past = dropped // BLOCK, -(-end // BLOCK)
        return type(self)(
            self.absmax.cut(first, past),
            self.scale[first:past],
            self.unit[first:past],
            begin - dropped,
            self.columns,
            self.form,
        )

    @classmethod
    def join(cls, grids: Sequence[Self]) -> Self:
        """All columns share their blocks, so there is nothing to join."""
        [grid] = grids
        return grid


def _along(blocks: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """The entry of the block of each of ``count`` neighbouring weights from ``start``, [count]."""
    first, past = start // BLOCK, -(-(start + count) // BLOCK)
    skipped = start - first * BLOCK
    return blocks[first:past].repeat_interleave(BLOCK)[skipped : skipped + count]


def _scaled(values: torch.Tensor, blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Neighbouring weights from ``start``, each multiplied by its block's entry, in place."""
    if start % BLOCK or len(values) % BLOCK:
        return values.mul_(_along(blocks, start, len(values)))
    wanted = blocks[start // BLOCK :][: len(values) // BLOCK]
    return values.view(-1, BLOCK).mul_(wanted.unsqueeze(1)).flatten()


@FORMATS.register(
    "nf4",
    family="quantization",
    paper="Dettmers et al., QLoRA, NeurIPS 2023",
    arxiv="2305.14314",
)
@dataclass(frozen=True)
class NF4(ElementFormat):
    """Four-bit quantiles of the normal distribution; 4.127 bits a weight, or 4.5 without nesting.

    Attributes:
        double_quantization: store the blocks' absmax in 8 bits instead of float32.
    """

    double_quantization: bool = True

    rows_independent = False
    spans_independent = False

    @property
    def span(self) -> None:
        """Blocks do not follow the columns."""
        return

    def fit(
        self,
        weight: torch.Tensor,
        importance: torch.Tensor | None = None,
        support: torch.Tensor | None = None,
    ) -> NF4Grid:
        """Take each block's absmax; see :meth:`Format.fit`.

        Raises:
            RarefyError: a weight is NaN or infinite.
        """
        absmax = _blocks(weight.reshape(-1), BLOCK).abs().amax(1).float()
        if not bool(torch.isfinite(absmax).all()):
            raise RarefyError("a weight is NaN or infinite; check the checkpoint")
        stored = Absmax.of(absmax, self.double_quantization)
        scale = stored.values()
        # Codes are those of the weights' own absmax, as published. Where the stored one is far off
        # (a small block among large ones) they would not be the nearest, nor stay when repeated.
        unit = torch.maximum(torch.minimum(absmax, scale * _TRUST), scale / _TRUST)
        return NF4Grid(stored, scale, _divisor(scale, unit), 0, weight.shape[1], self)

    def stored_grid(self, packed: Mapping[str, torch.Tensor]) -> NF4Grid:
        """The grid of the stored absmax."""
        stored = Absmax({k: t for k, t in packed.items() if k.startswith("weight_scale")})
        scale = stored.values()
        start, columns = int(packed["weight_start"]), int(packed["weight_shape"][1])
        return NF4Grid(stored, scale, _divisor(scale, scale), start, columns, self)

    def decode(
        self, packed: Mapping[str, torch.Tensor], rows: slice | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float32 [m, n]; the same arithmetic as ``round``, hence the same bits."""
        m, n = (int(x) for x in packed["weight_shape"])
        codes = packed["weight_packed"]
        if isinstance(rows, torch.Tensor):
            places = rows.unsqueeze(1) * n + torch.arange(n, device=rows.device)
            both = codes[places // 2]
            return self.values(torch.where(places % 2 == 0, both >> 4, both & 15), packed, rows)
        a, b, _ = (rows or slice(None)).indices(m)
        octets = codes[a * n // 2 : -(-b * n // 2)]
        # The first of the rows may begin in the middle of an octet.
        values = _pairs(codes.device)[octets.int()].view(torch.float32)[a * n % 2 :][: (b - a) * n]
        grid = self.stored_grid(packed)
        return _scaled(values, grid.scale, grid.start + a * n).reshape(b - a, n)

    def values(
        self,
        codes: torch.Tensor,
        parameters: Mapping[str, torch.Tensor],
        rows: slice | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``absmax t[code]`` in float32; see :meth:`ElementFormat.values`."""
        m, n = (int(x) for x in parameters["weight_shape"])
        grid = self.stored_grid(parameters)
        values = normal_table().to(codes.device)[codes.int()]
        if isinstance(rows, torch.Tensor):
            columns = torch.arange(grid.start, grid.start + n, device=rows.device)
            return values.mul_(grid.scale[(rows.unsqueeze(1) * n + columns) // BLOCK])
        first = grid.start + (rows or slice(None)).indices(m)[0] * n
        return _scaled(values.flatten(), grid.scale, first).reshape(values.shape)

    def store(self, codes: torch.Tensor) -> torch.Tensor:
        """Two codes an octet, the first in the high nibble, uint8."""
        pairs = pad(codes.to(torch.uint8), (0, len(codes) % 2)).reshape(-1, 2)
        return pairs[:, 0] << 4 | pairs[:, 1]

    def restore(self, stored: torch.Tensor, count: int) -> torch.Tensor:
        """uint8 [count]."""
        return torch.stack((stored >> 4, stored & 15), 1).flatten()[:count]

    def stream_layout(self, count: int) -> tuple[tuple[int, ...], str]:
        """Half an octet a code."""
        return (-(-count // 2),), "U8"

    def parameter_layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """The absmax, and where the matrix begins."""
        count = -(-rows * columns // BLOCK)
        absmax: dict[str, tuple[tuple[int, ...], str]] = {"weight_scale": ((count,), "F32")}
        if self.double_quantization:
            absmax = {
                "weight_scale_code": ((count,), "U8"),
                "weight_scale_peak": ((-(-count // NESTED),), "F32"),
                "weight_scale_mean": ((1,), "F32"),
            }
        return absmax | {"weight_start": ((1,), "I64")}

    def layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Stored tensors; see :meth:`Format.layout`."""
        packed = self.stream_layout(rows * columns)
        parameters = self.parameter_layout(rows, columns)
        return {"weight_packed": packed} | parameters | {"weight_shape": ((2,), "I64")}

    def label(self) -> str:
        """``nf4``, or ``nf4 f32`` with unquantized absmax."""
        return "nf4" if self.double_quantization else "nf4 f32"


def _divisor(scale: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """What to divide by; infinite where the decoded absmax is not positive."""
    return torch.where(scale > 0, unit, torch.full_like(unit, torch.inf))
