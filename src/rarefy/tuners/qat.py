"""LLM-QAT: train all weights through the rounding of weights, activations and the K/V cache.

    forward   W' = round(W) on a grid fitted on the live W, at every step
    backward  as if nothing were rounded (straight-through estimation)

Liu, Oguz, Zhao, Chang, Stock, Mehdad, Shi, Krishnamoorthi, Chandra, LLM-QAT: Data-Free Quantization
Aware Training for Large Language Models, 2023 (arXiv 2305.17888). What it is trained on, text that
the dense model wrote, and towards what, the dense model's logits, are up to the recipe.

    W        max|w| of each row or group over 2^(b-1) - 1: symmetric, 2^b - 1 levels, no clipping
             (any other format is fitted by its own rule)
    x        the input format of the stage's schemes, int of 8 bits for each token in the paper
    K and V  symmetric, for each token over all heads, as they leave k_proj and v_proj: keys are
             rounded before the rotary embedding

The paper's code lets no gradient through where a rounded value is 2 or more in size, although
nothing is clipped there; ``clip_gradient`` does the same. The K/V rounding is learned for, and not
a part of the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import pad

from rarefy.errors import RarefyError
from rarefy.formats.activation import IntActivation
from rarefy.formats.integer import Int
from rarefy.formats.sparse import Sparse
from rarefy.tuners.adapters import Training, settled, straight_through
from rarefy.tuners.base import TUNERS, Adapter, MatrixView, Outcome
from rarefy.tuners.full import Latent, is_embedding

if TYPE_CHECKING:
    from rarefy.formats.base import Format, Grid

_FUSED = ("qkv_proj", "c_attn", "query_key_value", "Wqkv")
_KEYS_AND_VALUES = ("k_proj", "v_proj")
_EDGE = 2.0  # beyond which the paper's code drops gradients


@TUNERS.register(
    "qat",
    family="quantization",
    paper="Liu et al., LLM-QAT, Findings of ACL 2024",
    arxiv="2305.17888",
)
@dataclass(frozen=True)
class QAT(Training):
    """Quantization-aware training of the matrices that the stage's schemes name.

    Attributes:
        kv_bits: bits of keys and values, or None to leave them alone.
        clip_gradient: drop gradients where the paper's code does.
        norms, biases, embeddings: whether these move, too; they are not rounded.

    Raises:
        ValueError: a field outside its values.
    """

    learning_rate: float = 2e-5
    schedule: str = "cosine"
    kv_bits: int | None = None
    clip_gradient: bool = False
    norms: bool = True
    biases: bool = True
    embeddings: bool = True

    rounds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_bits is not None:
            IntActivation(self.kv_bits)

    def adapt(self, matrix: MatrixView) -> Adapter | None:
        """Weights that move and are seen rounded; None for a matrix without a scheme.

        Raises:
            RarefyError: keys and values are to be rounded, and come from one matrix with queries.
        """
        if matrix.scheme is None:
            return None
        node = matrix.name.rpartition(".")[2]
        if self.kv_bits is not None and node in _FUSED:
            raise RarefyError(
                f"{matrix.name} gives queries, keys and values at once, which cannot be rounded "
                "apart; leave out kv_bits"
            )
        bits = self.kv_bits if node in _KEYS_AND_VALUES else None
        cache = None if bits is None else IntActivation(bits)
        return _Rounded(matrix, matrix.scheme, cache, self.clip_gradient)

    def moves(self, name: str, norm: bool) -> bool:
        """As the options say."""
        if norm or name.endswith(".bias"):
            return self.norms if norm else self.biases
        return self.embeddings and is_embedding(name)


class _Rounded(Latent):
    def __init__(
        self, matrix: MatrixView, scheme: Format, cache: IntActivation | None, clip: bool
    ) -> None:
        super().__init__(matrix)
        self.scheme, self.cache, self.clip = scheme, cache, clip

    def _seen(self, value: torch.Tensor) -> torch.Tensor:
        """A value about to be rounded, whose gradient may be dropped."""
        return torch.where(value.abs() < _EDGE, value, value.detach()) if self.clip else value

    def matrix(self) -> torch.Tensor:
        live = self.weight.detach()
        rounded = live_grid(self.scheme, live, self.support).round(live)
        return straight_through(self._seen(self.weight), rounded)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self._seen(x))

    def output(self, y: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            return y
        return straight_through(self._seen(y), self.cache.round(y.detach()))

    def finish(self) -> Outcome:
        live = self.weight.detach()
        return settled(live, live_grid(self.scheme, live, self.support))


def live_grid(scheme: Format, weight: torch.Tensor, support: torch.Tensor | None) -> Grid:
    """The grid of a matrix as it stands.

    Symmetric integers get one level less than they could have, so that the largest weight of a
    group is a level itself and none is clipped.

    Args:
        scheme: the format.
        weight: float [m, n].
        support: bool [m, n], or None.
    """
    grid = scheme.fit(weight, support=support)
    values = scheme.values if isinstance(scheme, Sparse) else scheme
    if not (isinstance(values, Int) and values.symmetric and values.rule == "minmax"):
        return grid
    rows, groups = grid.scales.shape
    missing = groups * (values.group or weight.shape[1]) - weight.shape[1]
    peak = pad(weight, (0, missing)).reshape(rows, groups, -1).abs().amax(-1)
    full = grid.rescaled(peak * 2 / (values.levels - 1))
    return grid.rescaled(torch.where(full.scales > 0, full.scales, grid.scales))
