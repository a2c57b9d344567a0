"""Full fine-tuning: every weight of the linears moves, within the support of sparse ones.

The recovery that all cheaper ones are measured against, and the student of distillation. Gradients
off the support are zero, and after every step the support is imposed again, because weight decay
or a restored state could bring zeros back to life.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rarefy.errors import RarefyError
from rarefy.tuners.adapters import Training, floating, settled
from rarefy.tuners.base import TUNERS, Adapter, MatrixView, Outcome

_TABLES = ("wte", "wpe", "lm_head")  # beside all that is called an embedding


def is_embedding(name: str) -> bool:
    """Whether a parameter path is that of an embedding or of the head."""
    return "embed" in name or name.split(".")[-2] in _TABLES


@TUNERS.register("full", family="recovery")
@dataclass(frozen=True)
class Full(Training):
    """All weights of the linears.

    Attributes:
        norms: whether norms move, too.
        biases: whether biases do.
        embeddings: whether embeddings and head do.
    """

    learning_rate: float = 1e-5
    schedule: str = "cosine"
    norms: bool = True
    biases: bool = True
    embeddings: bool = False

    def adapt(self, matrix: MatrixView) -> Adapter:
        """The matrix itself.

        Raises:
            RarefyError: its values are codes.
        """
        if matrix.grid is not None and not floating(matrix.grid.form):
            raise RarefyError(
                f"{matrix.name} is stored as {matrix.grid.form.label()}, whose codes do not move; "
                "use the tuner scales, qlora or qat"
            )
        return Latent(matrix)

    def moves(self, name: str, norm: bool) -> bool:
        """As the options say."""
        if norm or name.endswith(".bias"):
            return self.norms if norm else self.biases
        return self.embeddings and is_embedding(name)


class Latent(Adapter):
    """A matrix whose weights move, on its support.

    Args:
        matrix: where they begin; a copy is taken.
    """

    support: torch.Tensor | None

    def __init__(self, matrix: MatrixView) -> None:
        super().__init__()
        self.grid = matrix.grid
        self.weight = nn.Parameter(matrix.weight.detach().clone().contiguous())
        self.register_buffer("support", matrix.support)
        if matrix.support is not None:
            self.weight.register_hook(self._within)  # type: ignore[no-untyped-call]

    def _within(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.support is None else values * self.support

    def matrix(self) -> torch.Tensor:
        """The weights."""
        return self.weight

    def constrain(self) -> None:
        """Zero off the support."""
        if self.support is not None:
            with torch.no_grad():
                self.weight.mul_(self.support)

    def finish(self) -> Outcome:
        """The weights, rounded to the numbers that their matrix stores."""
        return settled(self.weight, self.grid)
