"""The allocator role: which layer may keep how much, when the whole must keep a given share.

An allocator looks at one block at a time (``measure``) and then shares the budget out (``spread``).
The budget is the number of weights that the recipe's formats would keep at their uniform density;
the conformance suite checks for every registered allocator that it is met.
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


class Allocator(ABC):
    """Shares a budget out; subclasses are frozen dataclasses.

    Attributes:
        needs: which of "gram" and "moments" the matrices must carry; none means no data.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

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


ALLOCATORS: Registry[Allocator] = Registry(
    "allocator",
    Allocator,  # type: ignore[type-abstract]
    "rarefy.allocate",
)
