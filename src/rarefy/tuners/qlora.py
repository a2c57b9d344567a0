"""QLoRA: adapters beside a base that stays packed.

    y = x decode(packed)^T + (alpha / r) x A^T B^T

Dettmers, Pagnoni, Holtzman, Zettlemoyer, QLoRA: Efficient Finetuning of Quantized LLMs, NeurIPS
2023 (arXiv 2305.14314). Only A and B move. The base is decoded for every product, in the backward
pass again, so that no dense matrix outlives a call; its gradient is never computed.

The paper's base is NF4 with double quantization; any format does. The adapter is saved apart:
merging it would need the base in full precision, or a second rounding that loses a part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F  # noqa: N812

from rarefy.engine.paged import PagedAdamW
from rarefy.errors import RarefyError
from rarefy.runtime.packed import PackedMatrix
from rarefy.tuners.adapters import Beside, PairOptions, Training
from rarefy.tuners.base import TUNERS, Adapter, Groups, MatrixView, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from rarefy.formats.base import Format, Grid, Packed


@TUNERS.register(
    "qlora",
    family="quantization",
    paper="Dettmers et al., QLoRA, NeurIPS 2023",
    arxiv="2305.14314",
)
@dataclass(frozen=True)
class QLoRA(Training):
    """Low-rank pairs beside packed matrices.

    Attributes:
        rank, alpha, dropout: see :class:`PairOptions`.
        paged: bytes of memory for the optimizer's state, the rest of which stays on disk; None
            keeps all of it in memory.

    Raises:
        ValueError: a field outside its values.
    """

    learning_rate: float = 2e-4
    schedule: str = "constant"
    clip: float | None = 0.3
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.0
    paged: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        PairOptions(self.rank, self.alpha, self.dropout)

    def adapt(self, matrix: MatrixView) -> Adapter:
        """The packed matrix, packed now if it is dense, and a pair beside it.

        Raises:
            RarefyError: it is dense, and no format is given.
        """
        options = PairOptions(self.rank, self.alpha, self.dropout)
        if matrix.packed is not None and matrix.grid is not None:
            return _Packed(matrix, options, matrix.grid, matrix.packed)
        if matrix.scheme is None:
            raise RarefyError(
                f"{matrix.name} is dense, and qlora trains beside packed matrices; "
                "give its stage schemes, such as '*': {format: nf4}"
            )
        weight = matrix.weight.detach()
        grid = matrix.scheme.fit(weight, support=matrix.support)
        return _Packed(matrix, options, grid, grid.encode(weight), new=True)

    def moving(self, shape: tuple[int, int], form: Format | None) -> int:
        """Those of the pair."""
        return self.rank * sum(shape)

    def optimizer(self, groups: Groups) -> torch.optim.Optimizer:
        """AdamW, paged if a budget is given."""
        if self.paged is None:
            return super().optimizer(groups)
        return PagedAdamW(groups, budget=self.paged)


class _Packed(Beside):
    """Holds stored tensors; ``new`` says that they are to be stored with the adapter."""

    def __init__(
        self,
        matrix: MatrixView,
        options: PairOptions,
        grid: Grid,
        packed: Packed,
        new: bool = False,
    ) -> None:
        super().__init__(matrix, options)
        rows, columns = matrix.weight.shape
        self.stored = PackedMatrix(grid.form, (rows, columns))
        tensors = {suffix: packed[suffix] for suffix in self.stored.suffixes}
        self.stored.load_state_dict(tensors, assign=True)
        self.grid = grid if new else None

    def base(self) -> torch.Tensor:
        return self.stored.dense()

    def frozen(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Decoded.apply(x, self.base)  # type: ignore[no-untyped-call]
        return y

    def finish(self) -> Outcome:
        if self.grid is None:
            return super().finish()
        return Outcome(self.base(), self.grid, self.pair.tensors())


class _Decoded(torch.autograd.Function):
    """``x W^T`` for a W that is decoded when it is needed and has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, decode: Callable[[], torch.Tensor]) -> torch.Tensor:
        ctx.decode = decode
        return F.linear(x, decode())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient @ ctx.decode(), None
