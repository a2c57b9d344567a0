"""DSnoT: mend a mask by swaps that bring each row's expected output error to zero.

Paper: Zhang, Zhao, Lin, Sun, Yao, Han, Tanner, Liu, Ji, *Dynamic Sparse No Training*, ICLR 2024,
arXiv 2310.08915.

    c_ij = W_ij E[x_j]                       eps_i = sum of c_ij over the pruned weights of row i
    swap, while |eps_i| > threshold:
        revive the pruned weight of largest  c_ij sign(eps_i) / Var[x_j]^power
        prune the kept weight of lowest  |W_ij| ||X_j||  with  sign(c_ij) = -sign(eps_i)
        eps_i <- eps_i + c_pruned - c_revived

Weights keep their values, a swapped weight is not swapped back, and a row that stops has stopped.
In an N:M pattern both weights of a swap lie in the same pattern.

Symbols: W, c [m, n], eps [m].

Which weight is swapped with which is known beforehand: within a pattern (or row) the r-th best to
revive meets the r-th best to prune, and a row takes such pairs from the best revived on. So the
loop only walks along a sorted list of at most ``cycles`` pairs a row.

Where we differ, and why:
 * ``threshold`` is in units of one token. The reference code compares 0.1 with sums over the
   tokens of a sequence, so its 0.1 at 2048 tokens is our 0.1 / 2048, whatever the length.
 * A revived weight must have the sign of eps, and a row without a legal pair stops; the reference
   code falls back to the first column, and its sparsity drifts.
 * The sign guard holds for every format, not for N:M alone: eps may shrink but not overshoot, so
   that |eps| never rises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from rarefy.errors import RarefyError
from rarefy.solvers.base import SOLVERS, Problem, Solution, Solver

if TYPE_CHECKING:
    from rarefy.formats.base import Format

_INITIAL = ("magnitude", "wanda")


@SOLVERS.register(
    "dsnot",
    family="pruning",
    paper="Zhang et al., Dynamic Sparse No Training, ICLR 2024",
    arxiv="2310.08915",
)
@dataclass(frozen=True)
class DSnoT(Solver):
    """Training-free repair of a mask by pairs of swapped weights.

    Attributes:
        initial: what chooses the first mask, "magnitude" or "wanda".
        cycles: most swaps of a row.
        threshold: a row stops once its expected error per token is not above this.
        power: of the variance by which the choice of the revived weight is divided.
        sign_guard: stop a row before its expected error would change sign.

    Raises:
        ValueError: a field outside these values.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"moments"})

    initial: str = "wanda"
    cycles: int = 50
    threshold: float = 0.1 / 2048
    power: float = 1.0
    sign_guard: bool = True

    def __post_init__(self) -> None:
        if self.initial not in _INITIAL:
            raise ValueError(f"initial must be one of {', '.join(_INITIAL)}, not {self.initial!r}")
        if self.cycles < 0 or self.threshold < 0:
            raise ValueError("cycles and threshold must not be negative")

    def solve(self, problem: Problem, fmt: Format) -> Solution:
        """Choose a mask, swap, and store the dense weights on what results.

        Raises:
            RarefyError: the format has no zeros to choose.
        """
        assert problem.moments is not None
        W, moments = problem.weight, problem.moments
        importance = moments.square if self.initial == "wanda" else None
        mask = fmt.fit(W, importance, problem.support).support
        if mask is None:
            raise RarefyError(
                f"dsnot moves zeros, and {fmt.label()} has none; give a sparse format"
            )
        allowed = torch.ones_like(mask) if problem.support is None else problem.support
        variance = moments.variance
        variance = variance.clamp(min=float(variance.mean()) * 1e-6 + 1e-30)
        c = W * moments.mean
        eps = (c * ~mask).sum(1)
        scores = Scores(
            revive=c / variance**self.power,
            prune=W.abs() * moments.square.sqrt(),
            c=c,
            revivable=~mask & allowed,
            kept=mask,
        )
        swapped = swaps(scores, eps, self, fmt.pattern or W.shape[1])
        grid = fmt.fit(W, moments.square, mask ^ swapped)
        return Solution(grid.round(W), grid)


@dataclass(frozen=True)
class Scores:
    """What decides about the weights of a matrix, all [m, n].

    Attributes:
        revive: ``c / Var^power``. prune: Wanda's score. c: expected contribution to the output.
        revivable: pruned weights that may come back. kept: the initial mask.
    """

    revive: torch.Tensor
    prune: torch.Tensor
    c: torch.Tensor
    revivable: torch.Tensor
    kept: torch.Tensor

    def pairs(self, sign: torch.Tensor, width: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The best swaps of each row, in the order in which they are to be made.

        Args:
            sign: of the error that they are to lower, [m, 1].
            width: of a pattern, inside which a swap has to stay.
            most: number of swaps.

        Returns:
            Columns [2, m, k] of the revived and the pruned weights, and by how much each swap
            lowers the error, [m, k], which is infinite where there is no swap.
        """
        m, n = self.c.shape
        barred = ~self.revivable | (self.c * sign <= 0)
        revive = (self.revive * sign).masked_fill_(barred, -torch.inf)
        prune = self.prune.masked_fill(~self.kept | (self.c * sign >= 0), torch.inf)
        deep, shape = min(most, width), (m, n // width, width)
        best, ins = revive.reshape(shape).topk(deep)
        worst, outs = prune.reshape(shape).topk(deep, largest=False)
        legal = torch.isfinite(best) & torch.isfinite(worst)
        first = torch.arange(0, n, width, device=ins.device).unsqueeze(1)
        ranked = best.masked_fill(~legal, -torch.inf).reshape(m, -1)
        best, take = ranked.topk(min(most, ranked.shape[1]))
        columns = torch.stack([(i + first).reshape(m, -1).gather(1, take) for i in (ins, outs)])
        change = self.c.gather(1, columns[0]) - self.c.gather(1, columns[1])
        gain = (change * sign).masked_fill(torch.isinf(best), torch.inf)
        return columns, gain


def swaps(scores: Scores, eps: torch.Tensor, options: DSnoT, width: int) -> torch.Tensor:
    """Which weights change sides, bool [m, n].

    Args:
        scores: of the matrix. eps: expected error of each row at the start, [m].
        options: the solver. width: of a pattern.
    """
    swapped = torch.zeros_like(scores.kept)
    sign = torch.where(eps < 0, -1.0, 1.0).to(eps).unsqueeze(1)
    # Without the guard eps may cross zero, and comes back along a list of its own.
    signs = [sign] if options.sign_guard else [sign, -sign]
    lists = [scores.pairs(s, width, options.cycles) for s in signs]
    gains = torch.stack([gain for _, gain in lists])
    most = gains.shape[2]
    rows = torch.arange(len(eps), device=eps.device)
    left, active = eps * sign[:, 0], torch.ones_like(eps, dtype=torch.bool)
    taken = torch.zeros(len(lists), len(eps), dtype=torch.long, device=eps.device)
    for _ in range(options.cycles if most else 0):
        side = (left < 0).long() * (len(lists) - 1)
        at = taken[side, rows]
        gain = gains[side, rows, at.clamp(max=most - 1)]
        after = left - torch.where(side > 0, -gain, gain)
        active &= (left.abs() > options.threshold) & torch.isfinite(gain) & (at < most)
        if options.sign_guard:
            active &= after >= 0
        left = torch.where(active, after, left)
        taken[side, rows] += active.long()
    for (columns, _), count in zip(lists, taken, strict=True):
        made = torch.arange(most, device=eps.device) < count.unsqueeze(1)
        for column in columns:
            swapped |= torch.zeros_like(swapped).scatter_(1, column, made)
    return swapped
