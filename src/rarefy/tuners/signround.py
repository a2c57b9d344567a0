"""SignRound: learn which way to round, and how far each group's range reaches, by sign descent.

    Q(w) = s (clip(round(w / s + v) + z, 0, L) - z),   s, z from the range [beta lo, alpha hi]
    (v, alpha, beta) <- (v, alpha, beta) - lr sign(gradient of |block_Q(x') - block(x)|^2)

Cheng, Zhang, Shen, Cai, He, Lv, Liu: "Optimize Weight Rounding via Signed Gradient Descent for the
Quantization of LLMs", Findings of EMNLP 2024, arXiv 2309.05516, sections 3.1 to 3.3.

    v      offset of a code, [out, in], starts at 0 and cannot travel further than (T + 1) / 2T
    alpha  factor of a group's upper end, beta of its lower one, in [0, 1], start at 1
    T      steps; the learning rate starts at 1 / T and falls to 0 linearly

Where we differ, and why:
 * With ``relative`` each token's error is taken in units of the token's own size. Hidden states of
   a few tokens, the first of a text above all, are a thousand times as large as the others and
   make up most of a plain mean; but every norm that follows divides by the size.
 * The grid's own rule says where ranges begin (the paper: min-max).
 * The stage may follow a solver, whose codes are then refined.
Without a step the codes are those of the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rarefy.engine.fit import Loop, SignSGD
from rarefy.errors import RarefyError
from rarefy.tuners.base import TUNERS, BlockTuner, BlockTuning, BlockView, Groups, Tuned

if TYPE_CHECKING:
    from rarefy.formats.base import Grid
    from rarefy.tuners.base import Start


class _Matrix:
    """The numbers of one matrix: offsets v [m, n], factors beta and alpha [m, G]."""

    def __init__(self, start: Start, learn_range: bool) -> None:
        self.W, self.grid = start.weight, start.grid
        self.v = torch.zeros_like(self.W, requires_grad=True)
        ends = torch.ones_like(start.grid.pitch)
        self.beta = ends.clone().requires_grad_(learn_range)
        self.alpha = ends.clone().requires_grad_(learn_range)

    def clamp(self) -> None:
        with torch.no_grad():
            self.alpha.clamp_(0, 1)
            self.beta.clamp_(0, 1)

    def value(self) -> torch.Tensor:
        """Q(W), [m, n]."""
        return self.grid.soft(self.W, self.beta, self.alpha, self.v)

    @torch.no_grad()
    def settled(self) -> tuple[torch.Tensor, Grid]:
        grid = self.grid.adjusted(self.beta, self.alpha)
        return grid.round(self.value()), grid


class _Rounding(BlockTuning):
    def __init__(self, block: BlockView, tuner: SignRound) -> None:
        self.tuner = tuner
        self.matrices = {p: _Matrix(m, tuner.learn_range) for p, m in block.matrices.items()}
        self.norms = {name: block.others[name].clone() for name in block.norms}
        for norm in self.norms.values():
            norm.requires_grad_(bool(tuner.norms))

    @property
    def groups(self) -> Groups:
        lr = self.tuner.rate
        leaves = [m.v for m in self.matrices.values()]
        ends = [e for m in self.matrices.values() for e in (m.alpha, m.beta)]
        groups: Groups = [{"params": leaves, "lr": lr}]
        if self.tuner.learn_range:
            groups.append({"params": ends, "lr": lr})
        if self.tuner.norms:
            groups.append({"params": [*self.norms.values()], "lr": lr * self.tuner.norms})
        return groups

    def parameters(self) -> dict[str, torch.Tensor]:
        for matrix in self.matrices.values():
            matrix.clamp()
        values = {f"{path}.weight": m.value() for path, m in self.matrices.items()}
        return values | self.norms

    def finish(self) -> Tuned:
        for matrix in self.matrices.values():
            matrix.clamp()
        moved = sum(int((m.v.detach().abs() > 0.25).sum()) for m in self.matrices.values())
        total = sum(m.v.numel() for m in self.matrices.values())
        settled = {path: matrix.settled() for path, matrix in self.matrices.items()}
        norms = {n: v.detach() for n, v in self.norms.items()} if self.tuner.norms else {}
        return Tuned(settled, norms, {"offset": moved / max(1, total)})


@TUNERS.register(
    "signround",
    family="quantization",
    paper="Cheng et al., Findings of EMNLP 2024: Optimize Weight Rounding via Signed Gradient "
    "Descent for the Quantization of LLMs",
    arxiv="2309.05516",
)
@dataclass(frozen=True)
class SignRound(BlockTuner):
    """Learned rounding.

    Attributes:
        steps: T.
        rows: calibration rows of each step.
        learning_rate: the first step's; None for 1 / T.
        learn_range: also learn alpha and beta.
        best: keep the step with the least loss of its rows, as the paper does; otherwise the last.
        momentum: of the mean gradient whose sign is taken; 0 in the paper.
        relative: weigh a token's squared error by the inverse of its squared size (not in the
            paper).
        norms: also learn the norms' weights, at this share of the learning rate (not in the paper).

    Raises:
        ValueError: a field outside its values.
    """

    steps: int = 200
    rows: int = 4
    learning_rate: float | None = None
    learn_range: bool = True
    best: bool = True
    momentum: float = 0.0
    relative: bool = False
    norms: float = 0.0

    def __post_init__(self) -> None:
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), and {self.momentum} does not")
        Loop(self.steps, self.rows)

    @property
    def rate(self) -> float:
        """The first step's learning rate."""
        return self.learning_rate or 1 / max(1, self.steps)

    @property
    def loop(self) -> Loop:
        """T steps, linearly to zero."""
        return Loop(self.steps, self.rows, best=self.best)

    def optimizer(self, groups: Groups) -> torch.optim.Optimizer:
        """Every number moves by the same amount."""
        return SignSGD(groups, momentum=self.momentum)

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the block's output [B, L, h], or of its direction."""
        if not self.relative:
            return super().loss(output, target)
        size = target.square().mean(-1)
        return ((output - target).square().mean(-1) / size.clamp(min=1e-12)).mean()

    def begin(self, block: BlockView) -> BlockTuning:
        """Offsets 0 and factors 1.

        Raises:
            RarefyError: a matrix's format has no ranges to learn.
        """
        for path, start in block.matrices.items():
            if not start.grid.form.learnable:
                raise RarefyError(
                    f"{block.name}.{path}: {start.grid.form.label()} has no ranges that could be "
                    "learned; give an integer format"
                )
        return _Rounding(block, self)
