"""The transform role: rescale the channels of an edge so that what follows loses less.

A transform sees one foldable edge: the matrices that read it, and statistics of what they read.
It answers with a positive factor for each channel; the engine divides the writers by it and
multiplies the readers' columns, so the model computes what it did before. The conformance suite
checks that for every registered transform.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rarefy.registry import Registry

if TYPE_CHECKING:
    import torch

    from rarefy.formats.base import Format
    from rarefy.statistics import Moments


@dataclass(frozen=True)
class EdgeView:
    """One edge, as a transform sees it.

    Attributes:
        name: of the edge, for messages: ``model.layers.0.attn_in``.
        after_norm: a norm writes it, so that folding costs nothing; otherwise a linear does.
        of_heads: its channels belong to attention heads (the values).
        repeated: each channel feeds several columns (grouped-query attention's values).
        readers: weights [m_i, n] of the matrices that read it.
        formats: what each reader will be rounded to, None for one that stays dense.
        channels: channel of each of the n columns, [n].
        width: number of channels.
        moments: of the readers' input, n channels.
        gram: ``E[x x^T]`` [n, n] of the readers' input, if the transform needs it.
    """

    name: str
    after_norm: bool
    of_heads: bool
    repeated: bool
    readers: tuple[torch.Tensor, ...]
    formats: tuple[Format | None, ...]
    channels: torch.Tensor
    width: int
    moments: Moments
    gram: torch.Tensor | None = None

    def per_channel(self, columns: torch.Tensor) -> torch.Tensor:
        """The largest of each channel's columns: [n] -> [width]."""
        start = columns.new_full((self.width,), float("-inf"))
        return start.scatter_reduce(0, self.channels, columns, "amax")


@dataclass(frozen=True)
class Scaling:
    """A transform's answer.

    Attributes:
        factors: positive, [width]: readers' columns are multiplied by it, writers divided.
        notes: what the manifest should say, JSON-ready.
    """

    factors: torch.Tensor
    notes: dict[str, object]


class Transform(ABC):
    """Chooses the basis of edges; subclasses are frozen dataclasses.

    Attributes:
        needs: which of "gram" and "moments" the view must carry.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"moments"})

    @abstractmethod
    def fit(self, edge: EdgeView) -> Scaling | None:
        """Factors for one edge, or None to leave it as it is."""


TRANSFORMS: Registry[Transform] = Registry(
    "transform",
    Transform,  # type: ignore[type-abstract]
    "rarefy.transforms",
)
