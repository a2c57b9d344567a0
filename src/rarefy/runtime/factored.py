"""A linear as two thin ones, executed as two products: no [m, n] matrix is ever formed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from torch import Tensor


class Factored(nn.Module):
    """``y = second(first(x)) + b``; stands in for nn.Linear and for GPT-2's Conv1D.

    Args:
        shape: (m, n) of the matrix that it replaces. rank: k.
        bias: of the module that it replaces.
        device: where the factors are made, "meta" before loading.
    """

    def __init__(
        self, shape: tuple[int, int], rank: int, bias: nn.Parameter | None, device: str = "meta"
    ) -> None:
        super().__init__()
        rows, columns = shape
        self.first = nn.Linear(columns, rank, bias=False, device=device)
        self.second = nn.Linear(rank, rows, bias=False, device=device)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """Shape without values, for code that reaches into a linear."""
        rows, columns = self.second.weight.shape[0], self.first.weight.shape[1]
        return torch.empty(rows, columns, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m]."""
        y: Tensor = self.second(self.first(x))
        return y if self.bias is None else y + self.bias


def factorize(model: nn.Module, name: str, rank: int) -> None:
    """Put an empty :class:`Factored` in the place of a linear."""
    module = model.get_submodule(name)
    rows, columns = module.weight.shape  # type: ignore[misc]
    if isinstance(module, Conv1D):
        rows, columns = columns, rows
    bias = module.bias if isinstance(module.bias, nn.Parameter) else None
    model.set_submodule(name, Factored((int(rows), int(columns)), rank, bias))
