"""Norm tweaking: let the norms of a compressed block restore its outputs' distribution.

Paper: Li, Li, Zhang, Chu, *Norm Tweaking: High-performance Low-bit Quantization of Large Language
Models*, AAAI 2024, arXiv 2309.02784.

    L = 1/C sum_c |mu_f,c - mu_q,c| + |var_f,c - var_q,c|        lr_l = lr_0 (1 + scale l / L)

Symbols: mu and var are mean and variance of channel c of the block's output over the tokens of a
step, f of the dense block and q of the compressed one, C channels; lr_l is the learning rate of
block l of L. Only the weights of norms move, by Adam in one pass over few data: the paper finds
that more of it hurts.

The paper does not say what the dense block is fed. Its algorithm listing hands it the compressed
blocks' output, ``stream: prefix``; others use the dense model's own, ``stream: dense``. Its data
are written by the model itself; that is up to the recipe's calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from rarefy.engine.fit import Loop
from rarefy.errors import RarefyError
from rarefy.tuners.base import TUNERS, BlockTuner, BlockTuning, Tuned

if TYPE_CHECKING:
    from rarefy.tuners.base import BlockView, Groups


@TUNERS.register(
    "norm-tweaking",
    family="quantization",
    paper="Li et al., Norm Tweaking, AAAI 2024",
    arxiv="2309.02784",
)
@dataclass(frozen=True)
class NormTweaking(BlockTuner):
    """Match the mean and variance of every output channel by moving norm weights.

    Attributes:
        steps: updates a block; 128 of one row are the paper's single pass.
        rows: token rows of each.
        lr: learning rate before the first block; the paper searches around 1e-5.
        scale: how much larger it is after the last block, as a share of ``lr``.
        stream: see :class:`BlockTuner`.

    Raises:
        ValueError: a field outside these values.
    """

    steps: int = 128
    rows: int = 1
    lr: float = 1e-5
    scale: float = 1.0
    stream: Literal["dense", "prefix"] = "prefix"

    rounds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.scale < 0:
            raise ValueError("lr must be above 0, and scale at least 0")
        if self.stream not in ("dense", "prefix"):
            raise ValueError(f"stream must be dense or prefix, not {self.stream!r}")
        _ = self.loop

    @property
    def loop(self) -> Loop:
        """At a constant rate, to the last step."""
        return Loop(self.steps, self.rows, schedule="constant")

    def optimizer(self, groups: Groups) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(groups)

    def begin(self, block: BlockView) -> NormTuning:
        """The block's norms and their learning rate; see :class:`BlockTuner`.

        Raises:
            RarefyError: the block has no norm with a weight.
        """
        if not block.norms:
            raise RarefyError(f"{block.name} has no norm whose weight norm_tweaking could move")
        return NormTuning(block, self.lr * (1 + self.scale * block.index / block.depth))

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """L over all tokens of both [B, L, C]; see :class:`BlockTuner`."""
        q, f = output.flatten(0, -2), target.flatten(0, -2)
        means = (f.mean(0) - q.mean(0)).abs()
        variances = (f.var(0, correction=0) - q.var(0, correction=0)).abs()
        return (means + variances).mean()


class NormTuning(BlockTuning):
    """The norms of one block.

    Attributes:
        norms: parameter path -> weight.
    """

    def __init__(self, block: BlockView, lr: float) -> None:
        self.norms = {path: block.others[path].clone().requires_grad_() for path in block.norms}
        self._lr = lr

    @property
    def groups(self) -> Groups:
        """All norms at one rate."""
        return [{"params": list(self.norms.values()), "lr": self._lr}]

    def parameters(self) -> dict[str, torch.Tensor]:
        """The norms; the rest of the block is as it was."""
        return dict(self.norms)

    def finish(self) -> Tuned:
        """The norms; see :meth:`BlockTuning.finish`."""
        return Tuned({}, {path: weight.detach().clone() for path, weight in self.norms.items()})
