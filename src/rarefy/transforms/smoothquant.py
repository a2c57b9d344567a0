"""SmoothQuant: divide a channel that is loud in the activations, multiply the weights that read it.

Paper: Xiao, Lin, Seznec, Wu, Demouth, Han, *SmoothQuant: Accurate and Efficient Post-Training
Quantization for Large Language Models*, ICML 2023, arXiv 2211.10438.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)         X diag(s)^-1  times  diag(s) W^T

Symbols: X_j what channel j carries over all calibration tokens, W_j its column in every matrix that
reads it, alpha the share of the difficulty that moves into the weights. With alpha = 1/2 both
sides of every channel end with the same maximum.

Where we differ, and why:
 * A channel that is silent in calibration keeps s = 1. The reference code gives it the smallest
   factor, 1e-5, so that it is amplified 100,000 times when it speaks up later.
 * ``inner`` and ``value`` extend the method to edges that a linear writes: the input of the MLP's
   last projection, and the value channels before attention's. The paper folds into norms only and
   leaves both alone, but in models with a gated MLP the first of them is the hardest to round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rarefy.transforms.base import TRANSFORMS, Scaling, Transform

if TYPE_CHECKING:
    from rarefy.transforms.base import EdgeView

_SMALLEST = 1e-5  # of weight maxima and of factors, as in the reference code
_SILENT = 1e-5  # of the loudest channel of an edge


@TRANSFORMS.register(
    "smoothquant",
    family="quantization",
    paper="Xiao et al., SmoothQuant, ICML 2023",
    arxiv="2211.10438",
)
@dataclass(frozen=True)
class SmoothQuant(Transform):
    """Balance the maxima of activations and weights, channel by channel.

    Attributes:
        alpha: migration strength, 0 (divide by the weights alone) to 1 (by the activations alone).
        inner: also smooth the input of the MLP's last projection, where the map allows it.
        value: also smooth the value channels, the input of attention's output projection.

    Raises:
        ValueError: alpha outside 0..1.
    """

    alpha: float = 0.5
    inner: bool = False
    value: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in 0..1, and {self.alpha} does not")

    def fit(self, edge: EdgeView) -> Scaling | None:
        """Factors by the formula; see :meth:`Transform.fit`."""
        if not edge.after_norm and not (self.value if edge.of_heads else self.inner):
            return None
        columns = torch.stack([W.abs().amax(0) for W in edge.readers]).amax(0)
        X, W = edge.per_channel(edge.moments.peak), edge.per_channel(columns)
        s = (X**self.alpha / W.clamp(min=_SMALLEST) ** (1 - self.alpha)).clamp(min=_SMALLEST)
        silent = X.le(_SILENT * X.max())
        s = torch.where(silent, torch.ones_like(s), s)
        notes: dict[str, object] = {
            "smallest": float(s.min()),
            "largest": float(s.max()),
            "silent": int(silent.sum()),
        }
        return Scaling(s, notes)
