"""AWQ: enlarge the weights that large activations meet, so that rounding hurts them less.

Paper: Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han, *AWQ: Activation-aware Weight
Quantization for LLM Compression and Acceleration*, MLSys 2024, arXiv 2306.00978.

    a_j = E|x_j|        s = a^r / sqrt(max a^r  min a^r)           r in {0, 0.05, ..., 0.95}
    r*  = argmin  sum over readers of  tr(D H D^T)     D = W - Q(W diag(s)) diag(s)^-1

Symbols: W [m, n] a matrix that reads the edge, Q its rounding to nearest, H = E[x x^T] [n, n], so
that ``tr(D H D^T)`` is its output error per token. Clipping, the paper's second half, changes the
function and is a solver: ``solvers/awq_clip.py``.

Where we differ, and why:
 * The objective is the output error of the matrices that read the edge, exact over every
   calibration token by way of H. The reference code runs the whole attention or MLP module on its
   samples for each of the 20 trials; H costs one product and needs neither samples nor a forward.
 * a is divided by its mean before it is raised to the power and clamped at 1e-4, so that the unit
   of the activations does not matter. A channel that is silent in calibration counts as an average
   one: the smallest factor would round its weights away, and it may speak up later.
 * Every matrix is rounded to the format that the recipe has for it; a reader that stays dense has
   no error and does not vote.
 * The identity is always among the trials. The reference grid has it as r = 0; with ``duo`` it
   would be missing. Hence the error is never above that of plain rounding.
 * As in the reference code, value channels under grouped-query attention are left alone: a factor
   for a channel would have to serve several query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from rarefy.transforms.base import TRANSFORMS, Scaling, Transform

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rarefy.formats.base import Format
    from rarefy.transforms.base import EdgeView

_TRIALS = 20
_SMALLEST = 1e-4


@TRANSFORMS.register(
    "awq",
    family="quantization",
    paper="Lin et al., AWQ, MLSys 2024",
    arxiv="2306.00978",
)
@dataclass(frozen=True)
class AWQ(Transform):
    """Search the power of the activations' mean size that rounding likes best.

    Attributes:
        duo: divide by the weights' mean size in its group as well, ``s = a^r / (w^(1-r) + 1e-4)``,
            an extension of the AutoAWQ library.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "moments"})

    duo: bool = False

    def fit(self, edge: EdgeView) -> Scaling | None:
        """The factors of least output error; see :meth:`Transform.fit`."""
        rounded = [(W, f) for W, f in zip(edge.readers, edge.formats, strict=True) if f is not None]
        if edge.repeated or not rounded:
            return None
        assert edge.gram is not None
        total = sum(_energy(W, edge.gram) for W, _ in rounded)
        best = torch.ones_like(edge.moments.size)
        least, ratio, search = float("inf"), 0.0, []
        for r, s in self._trials(edge, rounded):
            error = sum(_energy(W - _rounded(W * s, f) / s, edge.gram) for W, f in rounded)
            search.append([r, error / total if total > 0 else 0.0])
            if error < least:
                least, best, ratio = error, s, r
        return Scaling(best, {"ratio": ratio, "search": search})

    def _trials(
        self, edge: EdgeView, rounded: list[tuple[torch.Tensor, Format]]
    ) -> Iterator[tuple[float, torch.Tensor]]:
        """Ratio and factors [n] of every trial, the identity first."""
        a = edge.moments.size
        a = a / a.mean().clamp(min=torch.finfo(a.dtype).tiny)
        a = torch.where(a > 0, a, torch.ones_like(a))
        yield 0.0, torch.ones_like(a)
        w = _weight_size(rounded) if self.duo else None
        for i in range(0 if self.duo else 1, _TRIALS):
            r = i / _TRIALS
            s = (a**r if w is None else a**r / (w ** (1 - r) + _SMALLEST)).clamp(min=_SMALLEST)
            yield r, s / (s.max() * s.min()).sqrt()


def _rounded(W: torch.Tensor, fmt: Format) -> torch.Tensor:
    return fmt.fit(W).round(W)


def _energy(D: torch.Tensor, H: torch.Tensor) -> float:
    """``tr(D H D^T)``, the mean squared output of D [m, n]."""
    return float(((D @ H) * D).sum(dtype=torch.float64))


def _weight_size(rounded: list[tuple[torch.Tensor, Format]]) -> torch.Tensor:
    """Mean over all rows of |w| as a share of the largest |w| of its group, [n]."""
    shares = []
    for W, fmt in rounded:
        groups = torch.split(W.abs(), fmt.span or W.shape[1], 1)
        shares.append(torch.cat([g / g.amax(1, keepdim=True).clamp(min=1e-6) for g in groups], 1))
    return torch.cat(shares).mean(0)
