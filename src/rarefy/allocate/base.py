"""The allocator role: which matrix may take how much, when the whole has a given budget.

Density allocators look at one block at a time (``measure``) and then share the budget out
(``spread``): the number of weights that the recipe's formats would keep at their uniform density.
Width allocators learn what rounding each matrix to each number of bits does to the model's output,
and share out the bytes that the recipe's formats would take. The conformance suite checks for every
registered allocator that its budget is met.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rarefy.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from rarefy.statistics import Moments


@dataclass(frozen=True)
class Matrix:
    """One dense matrix, as an allocator sees it.

    Attributes:
        weight: float [m, n].
        moments: of its input in the dense model, or None. gram: ``E[x x^T]`` [n, n], or None.
    """

    weight: torch.Tensor
    moments: Moments | None = None
    gram: torch.Tensor | None = None


@dataclass(frozen=True)
class Share:
    """What there is to share out for one matrix.

    Attributes:
        rows, columns: of the matrix.
        density: what it would keep if all were treated alike.
    """

    rows: int
    columns: int
    density: float

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


class Allocator(ABC):  # noqa: B024  (its two kinds have nothing to call in common)
    """Shares a budget out; subclasses are frozen dataclasses.

    Attributes:
        needs: statistics that it reads; none means no data.
    """

    needs: ClassVar[frozenset[str]] = frozenset()


class DensityAllocator(Allocator):
    """Shares out how many weights are kept; ``needs`` is of "gram" and "moments"."""

    @abstractmethod
    def measure(self, block: Mapping[str, Matrix]) -> dict[str, torch.Tensor]:
        """What ``spread`` has to know of one block: node path -> tensor, of any shape."""

    @abstractmethod
    def spread(
        self,
        measures: Sequence[Mapping[str, torch.Tensor]],
        shares: Sequence[Mapping[str, Share]],
    ) -> list[dict[str, float]]:
        """Density of every matrix, in [0, 1], by block and node path.

        The sum of ``weights * density`` must equal that of the shares.
        """


@dataclass(frozen=True)
class Offer:
    """What one matrix may be stored in.

    Attributes:
        bytes: that it takes at each width, rising, float64 [k].
        damage: expected divergence of the model's output, in nats a token, at each, float64 [k].
        given: bytes that it takes in the recipe's format.
    """

    bytes: torch.Tensor
    damage: torch.Tensor
    given: float


class WidthAllocator(Allocator):
    """Shares bytes out, by the number of bits of each matrix; ``needs`` is {"fisher"}.

    Attributes:
        bits: widths to choose from, rising.
        length: tokens of the pieces of calibration rows that are read.
        pieces: how many of them at most.
    """

    bits: tuple[int, ...]
    length: int
    pieces: int
    needs: ClassVar[frozenset[str]] = frozenset({"fisher"})

    @abstractmethod
    def choose(self, offers: Mapping[str, Offer]) -> dict[str, int]:
        """Number of bits of every matrix, by name; together they take no more than was given."""


ALLOCATORS: Registry[Allocator] = Registry("allocator", Allocator, "rarefy.allocate")
