"""LLM.int8(): tokens rounded to 8 bits, except the channels where any of them is an outlier.

Paper: Dettmers, Lewis, Belkada, Zettlemoyer, *LLM.int8(): 8-bit Matrix Multiplication for
Transformers at Scale*, NeurIPS 2022, arXiv 2208.07339.

    O = {j : |x_tj| >= threshold for some token t}
    x'_tj = x_tj                          j in O
    x'_tj = s_t round(x_tj / s_t)         elsewhere,  s_t = max_{j not in O} |x_tj| / 127

With weights ``s_i q_ij`` of 8 bits the product is one of integers over the columns outside O and a
small one of floats over O; :mod:`rarefy.kernels.mixed` computes it so. O is found anew at every
call over all tokens at hand, so that what a token gives depends on its batch.

Where we differ: weights of outlier channels are the stored 8-bit ones, as in bitsandbytes, because
keeping them in 16 bits means keeping all of them, for O is not known before. A token's scale comes
from the channels outside O, as the paper writes it; bitsandbytes also looks at the small entries of
the channels in O.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rarefy.errors import RarefyError
from rarefy.formats.activation import ACTIVATIONS, Activation, IntActivation

INNER = IntActivation(8)


@ACTIVATIONS.register(
    "llm-int8",
    family="quantization",
    paper="Dettmers et al., LLM.int8(), NeurIPS 2022",
    arxiv="2208.07339",
)
@dataclass(frozen=True)
class LLMInt8(Activation):
    """Eight bits for each token, outlier channels left alone.

    Attributes:
        threshold: from which absolute value on an entry makes its channel an outlier.

    Raises:
        ValueError: the threshold is not positive.
    """

    threshold: float = 6.0

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be positive, not {self.threshold}")

    def outliers(self, x: torch.Tensor) -> torch.Tensor:
        """Which channels hold an outlier, bool [n], for x [..., n]."""
        return (x.abs() >= self.threshold).reshape(-1, x.shape[-1]).any(0)

    def scale(self, peak: torch.Tensor) -> torch.Tensor:
        """There is none to store.

        Raises:
            RarefyError: always.
        """
        raise RarefyError("LLM.int8() finds its scales while it runs; there is none to store")

    def round(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """See the module's formula."""
        apart = self.outliers(x)
        return torch.where(apart, x, INNER.round(x.masked_fill(apart, 0)))

    def soft(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """``round`` with straight-through codes; which channels are outliers has no gradient."""
        apart = self.outliers(x.detach())
        return torch.where(apart, x, INNER.soft(x.masked_fill(apart, 0)))

    def label(self) -> str:
        """For example ``a8 llm-int8``, ``a8 llm-int8 >4``."""
        return "a8 llm-int8" if self.threshold == 6 else f"a8 llm-int8 >{self.threshold:g}"
