"""LoRA recovery: train a low-rank change of a compressed model, without undoing the compression.

    dense                       W + g B A                 merged at the end, nothing is lost
    sparse    mask: masked      W + g M * (B A)           MaskLoRA
              mask: scale       W * (B A)                 ScaleLoRA, A = B = 1 / sqrt(r) at first
              mask: plain       W + g B A,  M at the end  LoRA-Prune
    any       mask: apart       x W^T + g x A^T B^T       the pair is saved beside the matrix

Symbols: M the stored support (not ``W != 0``: a kept weight may be zero), g = alpha / r, ``*``
elementwise. LoRA is Hu et al., 2106.09685; the variants that keep zeros, and training norms and
biases beside them, are PERP: Zimmer, Andoni, Spiegel, Pokutta, 2312.15230.

ScaleLoRA begins with equal columns, as published; they have equal gradients and stay equal, so its
change has rank one whatever r is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rarefy.errors import RarefyError
from rarefy.tuners.adapters import (
    Beside,
    Pair,
    PairOptions,
    Recomputed,
    Training,
    floating,
    settled,
)
from rarefy.tuners.base import TUNERS, Adapter, MatrixView, Outcome

if TYPE_CHECKING:
    from rarefy.formats.base import Format

_MASKS = ("masked", "scale", "plain", "apart")


@TUNERS.register(
    "lora",
    family="recovery",
    paper="Hu et al., LoRA, ICLR 2022; Zimmer et al., PERP, 2023",
    arxiv="2312.15230",
)
@dataclass(frozen=True)
class LoRA(Training):
    """Low-rank changes of the linears.

    Attributes:
        rank, alpha, dropout: see :class:`PairOptions`; dropout for pairs beside the matrix only.
        mask: what becomes of a sparse matrix, or of any: "masked", "scale", "plain" or "apart".
        norms: whether norms move, too.
        biases: whether biases do.

    Raises:
        ValueError: a field outside its values.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    mask: str = "masked"
    norms: bool = False
    biases: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask not in _MASKS:
            raise ValueError(f"mask must be one of {', '.join(_MASKS)}, not {self.mask!r}")
        PairOptions(self.rank, self.alpha, self.dropout)

    def adapt(self, matrix: MatrixView) -> Adapter:
        """A pair of the kind that the matrix can take up.

        Raises:
            RarefyError: its values are codes, so that it can take up none.
        """
        options = PairOptions(self.rank, self.alpha, self.dropout)
        if self.mask == "apart":
            return _Apart(matrix, options)
        if matrix.grid is not None and not floating(matrix.grid.form):
            raise RarefyError(
                f"{matrix.name} is stored as {matrix.grid.form.label()}, which cannot take up an "
                "adapter; give mask: apart, or use the tuner scales"
            )
        if matrix.support is None or self.mask == "plain":
            return _Merged(matrix, options)
        return _Scaled(matrix, options) if self.mask == "scale" else _Masked(matrix, options)

    def moving(self, shape: tuple[int, int], form: Format | None) -> int:
        """Those of the pair."""
        return self.rank * sum(shape)

    def moves(self, name: str, norm: bool) -> bool:
        """As the options say."""
        return self.norms if norm else self.biases and name.endswith(".bias")


class _Apart(Beside):
    """A pair that is never merged."""

    weight: torch.Tensor

    def __init__(self, matrix: MatrixView, options: PairOptions) -> None:
        super().__init__(matrix, options)
        self.register_buffer("weight", matrix.weight.detach())

    def base(self) -> torch.Tensor:
        return self.weight


class _Merged(_Apart):
    """A pair that becomes a part of its matrix; the grid of a sparse one cuts it to the support."""

    def __init__(self, matrix: MatrixView, options: PairOptions) -> None:
        super().__init__(matrix, options)
        self.grid = matrix.grid

    @torch.no_grad()
    def finish(self) -> Outcome:
        return settled(self.matrix(), self.grid)


class _Sparse(Recomputed):
    """A pair that works through the support of its matrix."""

    weight: torch.Tensor
    support: torch.Tensor

    def __init__(self, matrix: MatrixView, options: PairOptions) -> None:
        super().__init__()
        assert matrix.support is not None
        self.pair = Pair(matrix, options)
        self.grid = matrix.grid
        self.register_buffer("weight", matrix.weight.detach())
        self.register_buffer("support", matrix.support)

    @torch.no_grad()
    def finish(self) -> Outcome:
        return settled(self.matrix(), self.grid)


class _Masked(_Sparse):
    def matrix(self) -> torch.Tensor:
        return self.weight + self.pair.product() * self.support


class _Scaled(_Sparse):
    def __init__(self, matrix: MatrixView, options: PairOptions) -> None:
        super().__init__(matrix, options)
        for factor in (self.pair.A, self.pair.B):
            nn.init.constant_(factor, options.rank**-0.5)

    def matrix(self) -> torch.Tensor:
        return self.weight * (self.pair.B @ self.pair.A)
