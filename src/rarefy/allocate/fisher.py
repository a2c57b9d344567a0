"""Bits where the model's output depends on them most, by the Fisher information.

    KL(p || p_Q) ~ 1/2 d^T F d,    F = E[g g^T],    g = gradient of log p(y), y drawn from p
    damage(l, b) = 1/2 sum_i F_ii (Q_b(W_l) - W_l)_i^2
    minimize sum_l damage(l, b_l)  such that  sum_l bytes(l, b_l) <= bytes of the recipe's formats

The second derivative of the divergence of a model's output from what it was is its Fisher
information. Choosing bits by second-order sensitivity is HAWQ-V2's (Dong et al., NeurIPS 2020,
arXiv 1911.03852); by the Fisher information it is FIT's (Zandonati et al., ICLR 2023, arXiv
2210.08502).

    W_l   matrix l, [m, n]         Q_b   rounding to the nearest at b bits, in groups as given
    F_ii  mean over tokens of the squared gradient of log p(y) by weight i, y drawn from the model

Where we differ, and why:
 * The diagonal is taken weight by weight, not as a trace of the matrix: errors are largest where
   a group's outliers are, and so are gradients.
 * Budget and costs are bytes as stored, scales and zero points included.

The choice: of every matrix's options only those on the lower convex hull of damage over bytes
matter; steps between them are taken in the order of damage saved a byte until the budget is spent,
and what is left over goes to the best steps that still fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rarefy.allocate.base import ALLOCATORS, Offer, WidthAllocator
from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from collections.abc import Mapping


@ALLOCATORS.register(
    "fisher",
    family="quantization",
    paper="Zandonati et al., FIT: A Metric for Model Sensitivity, ICLR 2023",
    arxiv="2210.08502",
)
@dataclass(frozen=True)
class Fisher(WidthAllocator):
    """Widths of least expected divergence.

    Attributes:
        bits: widths to choose from, rising.
        length: tokens of the pieces of calibration rows that gradients are taken on.
        pieces: how many of them at most; one backward pass of the whole model each.

    Raises:
        ValueError: a field outside its values.
    """

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    length: int = 128
    pieces: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", tuple(self.bits))
        rising = all(isinstance(b, int) for b in self.bits) and list(self.bits) == sorted(
            set(self.bits)
        )
        if len(self.bits) < 2 or not rising:
            raise ValueError(f"bits must be at least two rising integers, not {list(self.bits)}")
        if self.length < 2 or self.pieces < 1:
            raise ValueError("length must be at least 2, and pieces at least 1")

    def choose(self, offers: Mapping[str, Offer]) -> dict[str, int]:
        """See :meth:`WidthAllocator.choose`.

        Raises:
            RarefyError: even the narrowest widths take more than was given.
        """
        left = sum(offer.given - float(offer.bytes[0]) for offer in offers.values())
        if left < 0:
            raise RarefyError(
                f"fisher: {self.bits[0]} bits everywhere take more than the recipe's formats; "
                "allow narrower widths, or give the schemes more bits"
            )
        at = dict.fromkeys(offers, 0)
        steps = [
            (gain, name, start, end)
            for name, offer in offers.items()
            for gain, start, end in _hull(offer)
        ]
        for _, name, start, end in sorted(steps, key=lambda s: (-s[0], s[1], s[2])):
            cost = float(offers[name].bytes[end] - offers[name].bytes[start])
            if at[name] == start and cost <= left:
                at[name], left = end, left - cost
        return {name: self.bits[index] for name, index in at.items()}


def _hull(offer: Offer) -> list[tuple[float, int, int]]:
    """Steps along the lower convex hull: damage saved a byte, from which width, to which."""
    cost, damage = offer.bytes.tolist(), offer.damage.tolist()
    steps, at = [], 0
    while at < len(cost) - 1:
        gains = [
            ((damage[at] - damage[k]) / (cost[k] - cost[at]), -k) for k in range(at + 1, len(cost))
        ]
        gain, end = max(gains)
        if gain <= 0:
            break
        steps.append((gain, at, -end))
        at = -end
    return steps
