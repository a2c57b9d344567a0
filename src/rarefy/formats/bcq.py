"""Binary coding: ``w = beta + sum_i alpha_i b_i``, q planes of signs with a scale each per group.

Paper: Park et al., *LUT-GEMM: Quantized Matrix Multiplication based on LUTs for Efficient
Inference in Large-Scale Generative Language Models*, ICLR 2024, arXiv 2206.09557. A product with
such a matrix needs no weight: for eight inputs at a time it looks up which of their signed sums a
plane asks for, and multiplies by ``alpha`` once a group.

Any integer grid is a binary coding, because ``q = sum_i 2^i bit_i``:

    s (q - z) = sum_i (s 2^(i-1)) (2 bit_i - 1) + s ((2^b - 1)/2 - z)

so that round-to-nearest, GPTQ and AWQ results run on the same kernel; see :func:`from_int`. The
offset is then a whole multiple of the smallest scale, and that multiple is what is stored: half of
a 16-bit number's products would not fit into 16 bits again.

Symbols: m rows, n columns, g columns a group, G groups, q planes. Bit k of octet c of a plane's row
is the sign of column ``8 c + k``, set for +1.

Where we differ: ``sign(0)`` is +1 (the paper's code has 0, which no bit can hold); least squares
are exact, without a constant on the diagonal; the alternation starts from the uniform grid, too,
and keeps the better end. Sums are float32 and not rounded to the scales' type.
"""

from __future__ import annotations

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
from rarefy.rules import binary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rarefy.formats.integer import Int

_TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_RULES = ("alternating", "greedy", "uniform")
_TABLE = 8  # columns whose sums one table holds


@dataclass(frozen=True)
class BCQGrid(ElementGrid):
    """Scales and offset of every group, as they are stored.

    Attributes:
        scale: [m, G, q]. offset: [m, G], or None; int16 multiples of the last scale for the rule
            "uniform", otherwise of the scales' type.
        form: the format.
    """

    scale: torch.Tensor
    offset: torch.Tensor | None
    form: BCQ

    def _parameters(self, first: int, past: int) -> torch.Tensor:
        """Float32 scales and then the offset of groups ``first .. past``, [m, groups, q + 1]."""
        scale = self.scale[:, first:past].float()
        if self.offset is None:
            return torch.nn.functional.pad(scale, (0, 1))
        offset = self.offset[:, first:past].float().unsqueeze(-1)
        if self.form.rule == "uniform":
            offset = offset * scale[..., -1:]
        return torch.cat([scale, offset], -1)

    def _find(self, columns: torch.Tensor, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values of all codes [m, groups, 2^q] and the nearest codes [m, groups, g] of columns."""
        group = self.form.group or at + columns.shape[1]
        first, past = at // group, -(-(at + columns.shape[1]) // group)
        before, after = at - first * group, past * group - at - columns.shape[1]
        W = torch.nn.functional.pad(columns, (before, after)).reshape(len(columns), -1, group)
        values = binary.sums(self._parameters(first, past)).to(columns.dtype)
        return values, binary.nearest(W, values)

    def _pieces(self, columns: torch.Tensor, at: int, *, codes: bool) -> torch.Tensor:
        """Codes or values of the nearest members, [m, k], some rows at a time."""
        group = self.form.group or at + columns.shape[1]
        skipped, found = at % group, []
        for rows in strips(*columns.shape):
            values, nearest = self.rows(rows.start, rows.stop)._find(columns[rows], at)
            piece = nearest if codes else values.gather(-1, nearest)
            found.append(piece.flatten(1)[:, skipped : skipped + columns.shape[1]])
        return torch.cat(found)

    def round(self, columns: torch.Tensor, at: int = 0) -> torch.Tensor:
        """The nearest sums; see :meth:`Grid.round`."""
        return self._pieces(columns, at, codes=False)

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """int64 [m, n]; bit i is the sign in plane i."""
        return self._pieces(weight, 0, codes=True)

    def encode(self, weight: torch.Tensor) -> Packed:
        """Planes [m, q, words], scales [m, G, q] and, if there is one, the offset [m, G]."""
        shape = torch.tensor(list(weight.shape), dtype=torch.int64)
        planes = _planes(self.codes(weight), self.form.bits)
        return {"weight_planes": planes} | self.parameters() | {"weight_shape": shape}

    def parameters(self) -> Packed:
        """Scales and offset."""
        tensors = {"weight_scale": self.scale.contiguous()}
        if self.offset is not None:
            tensors["weight_offset"] = self.offset.contiguous()
        return tensors

    def rows(self, start: int, stop: int) -> Self:
        """The grid of some rows."""
        offset = None if self.offset is None else self.offset[start:stop]
        return type(self)(self.scale[start:stop], offset, self.form)

    @classmethod
    def join(cls, grids: Sequence[Self]) -> Self:
        """Concatenate groups."""
        offsets = [grid.offset for grid in grids if grid.offset is not None]
        scale = torch.cat([grid.scale for grid in grids], 1)
        return cls(scale, torch.cat(offsets, 1) if offsets else None, grids[0].form)


@FORMATS.register(
    "bcq",
    family="quantization",
    paper="Park et al., LUT-GEMM, ICLR 2024",
    arxiv="2206.09557",
)
@dataclass(frozen=True)
class BCQ(ElementFormat):
    """Planes of signs; ``q + 16 q / g`` bits a weight, and ``16 / g`` for an offset.

    Attributes:
        bits: planes q, 1 to 8.
        group: columns a group, a multiple of 8, or None for one group a row; the last group may
            be shorter.
        offset: store a ``beta`` for each group.
        rule: "alternating", "greedy", or "uniform" for the grid of rounding to nearest.
        rounds: of the alternation.
        scale_dtype: "float16", "bfloat16" or "float32"; see :meth:`for_dtype`.

    Raises:
        ValueError: a field outside these values.
    """

    bits: int = 3
    group: int | None = 64
    offset: bool = True
    rule: str = "alternating"
    rounds: int = 15
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must lie in 1..8, and {self.bits} does not")
        if self.group is not None and (self.group < 1 or self.group % _TABLE):
            raise ValueError(f"group must be a multiple of {_TABLE}, or null, not {self.group}")
        if self.rule not in _RULES:
            raise ValueError(f"rule must be one of {', '.join(_RULES)}, not {self.rule!r}")
        if self.offset and self.rule == "greedy":
            raise ValueError("the greedy rule fits no offset; give offset: false")
        if self.rounds < 0:
            raise ValueError(f"rounds must be at least 0, not {self.rounds}")
        if self.scale_dtype not in _TORCH:
            raise ValueError(f"scale_dtype must be one of {', '.join(_TORCH)}")

    @property
    def holds_zero(self) -> bool:  # type: ignore[override]
        """Signs have no zero between them, unless the grid is that of rounding to nearest."""
        return self.rule == "uniform" and self.offset

    @property
    def span(self) -> int | None:
        """Columns a group."""
        return self.group

    def groups(self, columns: int) -> int:
        """Number of groups of a row of that many columns."""
        return -(-columns // self.group) if self.group else 1

    def misfit(self, rows: int, columns: int) -> str:
        """A group may not be larger than a row."""
        if self.group is None or self.group <= columns:
            return ""
        return (
            f"a group of {self.group} is larger than rows of {columns} columns; choose a group of "
            f"at most {columns}, or null for one group a row"
        )

    def fit(
        self,
        weight: torch.Tensor,
        importance: torch.Tensor | None = None,
        support: torch.Tensor | None = None,
    ) -> BCQGrid:
        """Choose scales and offsets by the rule; see :meth:`Format.fit`.

        Raises:
            RarefyError: a scale is beyond the range of its type.
        """
        h = column_weights(importance)
        grids = [self._fit(weight[rows], h) for rows in strips(*weight.shape)]
        offsets = [grid.offset for grid in grids if grid.offset is not None]
        scale = torch.cat([grid.scale for grid in grids])
        return BCQGrid(scale, torch.cat(offsets) if offsets else None, self)

    def _fit(self, weight: torch.Tensor, importance: torch.Tensor | None) -> BCQGrid:
        n = weight.shape[1]
        group = self.group or n
        pad = self.groups(n) * group - n
        # Contiguous, because sums' last bits depend on the order in memory.
        W = torch.nn.functional.pad(weight, (0, pad)).contiguous().reshape(len(weight), -1, group)
        ones = torch.ones(n, dtype=weight.dtype, device=weight.device)
        h = torch.nn.functional.pad(ones if importance is None else importance, (0, pad))
        h = h.double().reshape(-1, group)
        # Relative and in single precision, so that the unit of the importance cannot show.
        largest = h.amax(-1, keepdim=True).clamp(min=torch.finfo(h.dtype).tiny)
        h = (h / largest).float().to(weight.dtype)
        if self.rule == "uniform":
            return self._uniform(W)
        if self.rule == "greedy":
            A = binary.greedy(W, h, self.bits)
        else:
            A = binary.fitted(W, h, self.bits, self.offset, self.rounds)
        A = self._stored(binary.descending(A))
        return BCQGrid(A[..., :-1], A[..., -1] if self.offset else None, self)

    def _uniform(self, W: torch.Tensor) -> BCQGrid:
        A = binary.uniform(W, self.bits, self.offset)
        scale = self._stored(A[..., :-1])
        if not self.offset:
            return BCQGrid(scale, None, self)
        # The smallest scale is half a step, and stored; all others are to be its exact multiples.
        half = scale[..., -1:].float()
        powers = 2.0 ** torch.arange(self.bits - 1, -1, -1, device=W.device)
        lo = W.amin(-1).clamp(max=0)
        step = 2 * half.squeeze(-1)
        zero = (-lo / torch.where(step > 0, step, torch.ones_like(step))).round()
        units = (1 << self.bits) - 1 - 2 * zero.clamp(0, (1 << self.bits) - 1)
        return BCQGrid(self._stored(half * powers), units.to(torch.int16), self)

    def _stored(self, values: torch.Tensor) -> torch.Tensor:
        stored = values.to(_TORCH[self.scale_dtype])
        if not bool(torch.isfinite(stored).all()):
            raise RarefyError(
                f"scales up to {float(values.abs().max()):.3g} are beyond {self.scale_dtype}; "
                "convert the checkpoint to bfloat16, or keep this matrix"
            )
        return stored

    def decode(
        self, packed: Mapping[str, torch.Tensor], rows: slice | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float32 [m, n]; the same sums as ``round``, hence the same bits."""
        wanted = slice(None) if rows is None else rows
        n = int(packed["weight_shape"][1])
        planes = unpack(packed["weight_planes"][wanted], 1, n)
        return self._sum(planes.transpose(0, 1), packed, rows)

    def values(
        self,
        codes: torch.Tensor,
        parameters: Mapping[str, torch.Tensor],
        rows: slice | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The sums of codes; see :meth:`ElementFormat.values`."""
        planes = [codes >> i & 1 for i in range(self.bits)]
        return self._sum(torch.stack(planes), parameters, rows)

    def _sum(
        self,
        planes: torch.Tensor,
        parameters: Mapping[str, torch.Tensor],
        rows: slice | torch.Tensor | None,
    ) -> torch.Tensor:
        """``beta + sum_i alpha_i b_i`` from bits [q, r, n], in the order of the planes."""
        n = planes.shape[-1]
        grid = self.stored_grid(parameters)
        A = grid._parameters(0, self.groups(n))[slice(None) if rows is None else rows]
        group = self.group or n
        planes = torch.nn.functional.pad(planes, (0, self.groups(n) * group - n))
        total = A[..., -1:].expand(*A.shape[:2], group)
        for i, plane in enumerate(planes):
            total = total + A[..., i : i + 1] * (plane.reshape(total.shape).float() * 2 - 1)
        return total.flatten(1)[:, :n].contiguous()

    def stored_grid(self, packed: Mapping[str, torch.Tensor]) -> BCQGrid:
        """Scales and offsets as they are stored."""
        return BCQGrid(packed["weight_scale"], packed.get("weight_offset"), self)

    def store(self, codes: torch.Tensor) -> torch.Tensor:
        """int32 words of the bit stream."""
        return pack(codes, self.bits)

    def restore(self, stored: torch.Tensor, count: int) -> torch.Tensor:
        """uint8 [count]."""
        return unpack(stored, self.bits, count)

    def stream_layout(self, count: int) -> tuple[tuple[int, ...], str]:
        """Words of the bit stream."""
        return (words_per_row(count, self.bits),), "I32"

    def parameter_layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Scales and, if there is one, the offset."""
        shape, stored = (rows, self.groups(columns)), _STORED[self.scale_dtype]
        tensors: dict[str, tuple[tuple[int, ...], str]] = {
            "weight_scale": ((*shape, self.bits), stored)
        }
        if self.offset:
            tensors["weight_offset"] = (shape, "I16" if self.rule == "uniform" else stored)
        return tensors

    def layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Stored tensors; see :meth:`Format.layout`."""
        planes = ((rows, self.bits, words_per_row(columns, 1)), "I32")
        parameters = self.parameter_layout(rows, columns)
        return {"weight_planes": planes} | parameters | {"weight_shape": ((2,), "I64")}

    def for_dtype(self, dtype: str) -> Self:
        """16-bit scales in the checkpoint's type; scales of 32 bits stay what they are."""
        if self.scale_dtype == "float32":
            return self
        return replace(self, scale_dtype="bfloat16" if dtype == "BF16" else "float16")

    def label(self) -> str:
        """For example ``bcq3 g64``, ``bcq2 row centred``."""
        where = f"g{self.group}" if self.group else "row"
        rule = "" if self.rule == "alternating" else f" {self.rule}"
        return f"bcq{self.bits} {where}{rule}{'' if self.offset else ' centred'}"


def _planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [m, n] as planes of signs, int32 [m, q, words]."""
    pieces = [
        torch.stack([pack(codes[rows] >> i & 1, 1) for i in range(bits)], 1)
        for rows in strips(*codes.shape)
    ]
    return torch.cat(pieces)


def from_int(fmt: Int, packed: Mapping[str, torch.Tensor]) -> tuple[BCQ, Packed]:
    """The same matrix in binary coding, whatever solver chose its codes.

    The result decodes to ``scale (code - zero)``, too. Scales are 16-bit as they were, unless half
    a scale does not fit, which happens below 1e-4 in float16; then all of the matrix' scales become
    float32.

    Args:
        fmt: the integer format. packed: its stored tensors.

    Raises:
        RarefyError: groups are no multiple of eight columns, which the tables need.
    """
    if fmt.group is not None and fmt.group % _TABLE:
        raise RarefyError(
            f"binary coding needs groups of a multiple of {_TABLE} columns, not of {fmt.group}"
        )
    m, n = (int(x) for x in packed["weight_shape"])
    grid = fmt.stored_grid(packed)
    powers = 2.0 ** torch.arange(fmt.bits - 2, -2, -1, device=grid.scale.device)
    scales = (grid.scale.unsqueeze(-1) * powers).contiguous()
    stored = scales.to(_TORCH[fmt.scale_dtype])
    exact = torch.equal(stored.float(), scales)
    kind = fmt.scale_dtype if exact else "float32"
    codes = unpack(packed["weight_packed"], fmt.bits, n)
    turned = sum((codes >> i & 1) << (fmt.bits - 1 - i) for i in range(fmt.bits))
    assert isinstance(turned, torch.Tensor)
    return BCQ(fmt.bits, fmt.group, rule="uniform", scale_dtype=kind), {
        "weight_planes": _planes(turned, fmt.bits),
        "weight_scale": stored if exact else scales,
        "weight_offset": (fmt.levels - 2 * grid.zero).to(torch.int16).contiguous(),
        "weight_shape": torch.tensor([m, n], dtype=torch.int64),
    }
