"""The surgery role: which units of a model matter least.

A unit is what can be cut without leaving a hole: a key/value group with its query heads, a neuron
of the MLP, a whole block. A surgery says which matter least; the engine cuts them and edits the
config, so that a smaller ordinary model comes out. The conformance suite checks for every
registered surgery that cutting units equals silencing them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rarefy.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

Kind = Literal["heads", "neurons"]
"""Units of width: key/value groups, and neurons of the MLP."""


@dataclass(frozen=True)
class Member:
    """One matrix's part in a set of units.

    A neuron has one channel. A key/value group has one for each channel of its head; the query
    heads that share the group hold ``copies`` of each.

    Attributes:
        node: path of the matrix below the block.
        edge: the edge whose channels these are: it tells query, key and value of one matrix apart.
        weight: float [units, copies, channels, k]: for a matrix that writes the channels its rows,
            for one that reads them its columns.
        first: mean gradient of the loss, shaped like weight, or None.
        second: mean of the squared gradients of single samples, shaped like weight, or None.
    """

    node: str
    edge: str
    weight: torch.Tensor
    first: torch.Tensor | None = None
    second: torch.Tensor | None = None


@dataclass(frozen=True)
class Outputs:
    """What each unit hands on to the matrix that reads it, over all tokens.

    Attributes:
        norm: root of the mean square of its channels, [units].
        size: mean absolute value of its channels, [units].
    """

    norm: torch.Tensor
    size: torch.Tensor


@dataclass(frozen=True)
class Units:
    """The units of one kind in one block.

    Attributes:
        kind: key/value groups or neurons.
        block: index of the block.
        members: the matrices that they cut through, writers before readers.
        outputs: None unless asked for.
    """

    kind: Kind
    block: int
    members: tuple[Member, ...]
    outputs: Outputs | None = None

    @property
    def count(self) -> int:
        """Number of units."""
        return self.members[0].weight.shape[0]


@dataclass(frozen=True)
class Stack:
    """The blocks of a model, as a depth surgery sees them; what was not asked for is None.

    Attributes:
        count: L.
        cosine: mean over tokens of the cosine between each block's input and its output, [L].
        last: hidden state of every row's last token before each block and after the last one,
            [rows, L + 1, hidden].
        losses: from the blocks that are left to the mean loss per predicted token if each of them
            was taken out as well, [left].
    """

    count: int
    cosine: torch.Tensor | None = None
    last: torch.Tensor | None = None
    losses: Callable[[Sequence[int]], torch.Tensor] | None = None


@dataclass(frozen=True)
class Removal:
    """A depth surgery's answer.

    Attributes:
        blocks: to be removed. scores: the numbers that decided, for the manifest.
    """

    blocks: tuple[int, ...]
    scores: torch.Tensor


class Surgery:
    """Says what matters least; subclasses are frozen dataclasses.

    Attributes:
        needs: statistics that must be given; any of them needs calibration data. Width: "gradients"
            (members carry ``first`` and ``second``), "outputs". Depth: "cosine", "last", "losses".
        samples, length: calibration rows that it reads, and tokens of each; None reads all.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    samples: int | None = None
    length: int | None = None


class WidthSurgery(Surgery, ABC):
    """Cuts key/value groups and neurons.

    Attributes:
        heads: share of the key/value groups to remove, with their query heads.
        neurons: share of the neurons to remove.
        ranking: "block" cuts every block alike; "model" ranks the units of all blocks together,
            after which blocks differ in width and rarefy's own loader opens the result.
    """

    heads: float
    neurons: float
    ranking: str = "block"

    def __post_init__(self) -> None:
        for kind in ("heads", "neurons"):
            share = getattr(self, kind)
            if not 0 <= share < 1:
                raise ValueError(f"{kind} must be a share of at least 0 and below 1, not {share}")
        if self.ranking not in ("block", "model"):
            raise ValueError(f"ranking must be block or model, not {self.ranking!r}")
        if self.heads == self.neurons == 0:
            raise ValueError("heads and neurons are both 0: nothing would be removed")

    @abstractmethod
    def score(self, units: Units) -> torch.Tensor:
        """Importance of each unit, not negative, [units]; the lowest are cut."""


class DepthSurgery(Surgery, ABC):
    """Removes whole blocks.

    Attributes:
        blocks: number of blocks to remove.
        protect: number of blocks at either end that stay.
    """

    blocks: int
    protect: int

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, not {self.blocks}")
        if self.protect < 0:
            raise ValueError(f"protect must not be negative, and {self.protect} is")

    def candidates(self, count: int) -> range:
        """The blocks of a stack of ``count`` that may go."""
        return range(self.protect, count - self.protect)

    @abstractmethod
    def choose(self, stack: Stack) -> Removal:
        """Which of the candidates to remove."""


SURGERIES: Registry[Surgery] = Registry(
    "surgery",
    Surgery,
    "rarefy.surgery",
)
