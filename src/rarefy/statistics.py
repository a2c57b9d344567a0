"""Statistics of an edge's activations: the Gram matrix, and moments of each channel.

Both are additive over tokens, so partial results of several machines may be added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Wide enough for the matrix product to run at full rate, narrow enough to skip most of the
# lower triangle.
_STRIP = 128
_TOKENS = 256


class Gram:
    """Sum of ``x x^T`` over tokens.

    Only the upper triangle is accumulated, strip by strip: little more than half the work of a
    full product.

    Args:
        channels: n.
        device: where to accumulate, in fp32.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self._sum = torch.zeros(channels, channels, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Add activations [..., n]."""
        x = x.reshape(-1, x.shape[-1]).float()
        n = x.shape[1]
        for a in range(0, n, _STRIP):
            b = min(a + _STRIP, n)
            self._sum[a:b, a:].addmm_(x[:, a:b].T, x[:, a:])
        self.tokens += x.shape[0]

    def mean(self) -> torch.Tensor:
        """``E[x x^T]``, [n, n]. The accumulator itself is returned: call it once, at the end."""
        n = self._sum.shape[0]
        for a in range(0, n, _STRIP):
            b = min(a + _STRIP, n)
            self._sum[b:, a:b] = self._sum[a:b, b:].T
            strip = self._sum[a:b, a:b]
            strip.copy_((strip + strip.T) / 2)
        return self._sum.div_(max(1, self.tokens))


@dataclass(frozen=True)
class Moments:
    """Per-channel moments over all tokens, each float [n].

    Attributes:
        mean: ``E[x]``. square: ``E[x^2]``. size: ``E|x|``. peak: ``max |x|``.
        tokens: number of tokens.
    """

    mean: torch.Tensor
    square: torch.Tensor
    size: torch.Tensor
    peak: torch.Tensor
    tokens: int

    @property
    def variance(self) -> torch.Tensor:
        """``E[x^2] - E[x]^2``, not below zero; the mean was accumulated in fp64."""
        return (self.square.double() - self.mean.double().square()).clamp(min=0).to(self.mean)


class MomentSums:
    """Accumulates :class:`Moments`, sums in fp64 over pieces of a few hundred tokens.

    Args:
        channels: n.
        device: where to accumulate.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self._sums = torch.zeros(3, channels, dtype=torch.float64, device=device)
        self._peak = torch.zeros(channels, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Add activations [..., n]."""
        x = x.reshape(-1, x.shape[-1]).float()
        ones = torch.ones(_TOKENS, device=x.device)
        # A piece at a time, so that it is read from memory once, and sums as products with ones:
        # reductions along the tokens are several times slower.
        for piece in torch.split(x, _TOKENS):
            one = ones[: len(piece)]
            size = piece.abs()
            torch.maximum(self._peak, size.amax(0), out=self._peak)
            self._sums[0] += one @ piece
            self._sums[2] += one @ size
            self._sums[1] += one @ size.square_()
        self.tokens += x.shape[0]

    def moments(self) -> Moments:
        """What was seen so far."""
        mean, square, size = (self._sums / max(1, self.tokens)).float()
        return Moments(mean, square, size, self._peak.clone(), self.tokens)


class Collector:
    """What is collected of one edge.

    Args:
        needs: "gram", "moments", or both.
        channels: n.
        device: where to accumulate.
    """

    def __init__(self, needs: frozenset[str], channels: int, device: torch.device) -> None:
        self.gram = Gram(channels, device) if "gram" in needs else None
        self.moments = MomentSums(channels, device) if "moments" in needs else None
        self.tokens = 0
        self._result: tuple[torch.Tensor | None, Moments | None] | None = None

    def add(self, x: torch.Tensor) -> None:
        """Add activations [..., n]; not after ``result``."""
        self.tokens += x.numel() // x.shape[-1]
        for one in (self.gram, self.moments):
            if one is not None:
                one.add(x)

    def result(self) -> tuple[torch.Tensor | None, Moments | None]:
        """Gram matrix [n, n] and moments, each None unless collected."""
        if self._result is None:
            gram = self.gram.mean() if self.gram is not None else None
            moments = self.moments.moments() if self.moments is not None else None
            self._result = gram, moments
        return self._result

    def finite(self) -> bool:
        """Whether everything that was seen was finite."""
        gram, moments = self.result()
        return (gram is None or bool(gram.diagonal().isfinite().all())) and (
            moments is None or bool(moments.square.isfinite().all())
        )
