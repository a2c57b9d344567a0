"""What the adapters of model tuners share: run options, low-rank pairs, gradients, peft's files.

    y = x W^T + (alpha / r) x A^T B^T          A [r, in], B [out, r], B = 0 at the start

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022 (arXiv 2106.09685).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from rarefy.engine.fit import Loop
from rarefy.formats.floating import Float
from rarefy.formats.sparse import Sparse
from rarefy.tuners.base import Adapter, ModelTuner, Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rarefy.formats.base import Format, Grid
    from rarefy.tuners.base import MatrixView


@dataclass(frozen=True)
class Training(ModelTuner):
    """The options of every model tuner.

    Attributes:
        learning_rate: the largest.
        steps: updates.
        rows: token rows of each.
        schedule: "linear", "cosine" or "constant", after the warm-up.
        warmup: first steps, over which the learning rate rises.
        clip: largest norm of all gradients together, or None.

    Raises:
        ValueError: a field outside its values.
    """

    learning_rate: float = 1e-4
    steps: int = 200
    rows: int = 4
    schedule: str = "linear"
    warmup: int = 0
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be above 0, or null, not {self.clip}")
        Loop(self.steps, self.rows, self.schedule, self.warmup)

    @property
    def loop(self) -> Loop:
        """As the options say."""
        return Loop(self.steps, self.rows, self.schedule, self.warmup, self.clip)


@dataclass(frozen=True)
class PairOptions:
    """Size of a low-rank pair.

    Attributes:
        rank: r.
        alpha: the product is multiplied by ``alpha / r``.
        dropout: share of the inputs that the pair does not see in training.

    Raises:
        ValueError: a field outside its values.
    """

    rank: int
    alpha: float
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError("rank must be at least 1, and alpha above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), and {self.dropout} does not")


class Pair(nn.Module):
    """The factors of ``(alpha / r) B A``.

    Args:
        matrix: whose place they take; its name and seed decide what is drawn.
        options: r, alpha and dropout. Dropout draws from torch's global generator, which the
            training loop seeds for every step.
    """

    def __init__(self, matrix: MatrixView, options: PairOptions) -> None:
        super().__init__()
        rows, columns = matrix.weight.shape
        drawn = torch.Generator().manual_seed(crc32(matrix.name.encode()) + matrix.seed)
        # Kaiming's uniform distribution with a = sqrt(5), as in peft.
        A = (torch.rand(options.rank, columns, generator=drawn) * 2 - 1) / columns**0.5
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(torch.zeros(rows, options.rank))
        self.factor = options.alpha / options.rank
        self.dropout = options.dropout

    def product(self) -> torch.Tensor:
        """``(alpha / r) B A``, [out, in]."""
        return self.factor * (self.B @ self.A)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(alpha / r) x A^T B^T``, [..., out], without the [out, in] product."""
        seen = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return self.factor * F.linear(F.linear(seen, self.A), self.B)

    def tensors(self) -> dict[str, torch.Tensor]:
        """A and B in peft's names."""
        return {"lora_A.weight": self.A.detach(), "lora_B.weight": self.B.detach()}


class Beside(Adapter):
    """A frozen matrix and a pair beside it."""

    def __init__(self, matrix: MatrixView, options: PairOptions) -> None:
        super().__init__()
        self.pair = Pair(matrix, options)

    @abstractmethod
    def base(self) -> torch.Tensor:
        """The frozen matrix, float [out, in]."""

    def frozen(self, x: torch.Tensor) -> torch.Tensor:
        """``x W^T`` of the frozen matrix."""
        return F.linear(x, self.base())

    def matrix(self) -> torch.Tensor:
        """``W + (alpha / r) B A``; see :meth:`Adapter.matrix`."""
        return self.base() + self.pair.product()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two thin products instead of one full one."""
        y: torch.Tensor = self.frozen(x) + self.pair(x)
        return y

    def finish(self) -> Outcome:
        """The pair, to be saved apart."""
        return Outcome(adapter=self.pair.tensors())


class Recomputed(Adapter):
    """An adapter whose matrix is made again for the backward pass instead of being kept."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x W^T``; see :meth:`Adapter.forward`."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        y: torch.Tensor = checkpoint(
            super().forward, x, use_reentrant=False, preserve_rng_state=False
        )
        return y


def floating(form: Format) -> bool:
    """Whether a format's values are plain floating numbers, so that a small change fits in it."""
    return isinstance(form.values if isinstance(form, Sparse) else form, Float)


def settled(weight: torch.Tensor, grid: Grid | None) -> Outcome:
    """A matrix that is stored anew, brought onto its grid if it has one."""
    weight = weight.detach()
    return Outcome(weight if grid is None else grid.round(weight), grid)


def straight_through(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """``rounded``, bit for bit, with the gradient of ``value``."""
    return rounded.detach() + (value - value.detach())


def peft_files(
    adapters: Mapping[str, Mapping[str, torch.Tensor]], rank: int, alpha: float, base: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What peft reads.

    Args:
        adapters: module path -> tensors in peft's names, ``lora_A.weight`` and ``lora_B.weight``.
        rank, alpha: of all of them.
        base: name or folder of the model that they belong to.

    Returns:
        Content of ``adapter_config.json``, and of ``adapter_model.safetensors``.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(adapters),
    }
    tensors = {
        f"base_model.model.{module}.{name}": tensor.contiguous()
        for module, pair in adapters.items()
        for name, tensor in pair.items()
    }
    return config, tensors
