"""Encoders of ggml's super-blocks of 256: scales of sub-blocks are themselves small integers.

    q2_k, q4_k, q5_k   w = (d s) q - (e t) ,    s, t in 0 .. 15 or 0 .. 63,   sub-blocks of 16 or 32
    q3_k, q6_k         w = (d s) q,             s in -32 .. 31 or -128 .. 127, sub-blocks of 16

d and e are float16, one a super-block. First every sub-block finds its own best scale and minimum
(``rules/blocks.py``); then, from several starts, d and e are fitted to all 256 weights by least
squares and s, t move to the best of their neighbours, in turns, always with the codes that the
rounded numbers lead to. All errors are weighted by the importance of their column.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

from rarefy.export import blocks
from rarefy.formats.base import strips
from rarefy.rules.blocks import Levels, affine, inverse, symmetric, weights_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rarefy.export.blocks import Octets

_TURNS = 3
_STARTS = (1.0, 0.94, 0.88)
_TINY = 1e-30


@dataclass(frozen=True)
class KType:
    """One of ggml's types with super-blocks.

    Attributes:
        sub: weights of a sub-block. levels: what codes stand for.
        steps: smallest and largest scale of a sub-block, in units of the super-block's.
        minimum: whether sub-blocks have minima too.
    """

    sub: int
    levels: Levels
    steps: tuple[int, int]
    minimum: bool = True


TYPES: dict[str, KType] = {
    "q2_k": KType(16, Levels(0, 3), (0, 15)),
    "q3_k": KType(16, Levels(-4, 3), (-32, 31), minimum=False),
    "q4_k": KType(32, Levels(0, 15), (0, 63)),
    "q5_k": KType(32, Levels(0, 31), (0, 63)),
    "q6_k": KType(16, Levels(-32, 31), (-128, 127), minimum=False),
}


@dataclass
class _Super:
    """Super-blocks with everything that is stored of them but the codes.

    Attributes:
        x: weights [..., S, k]. w: of their errors. kind: the type.
        d, e: scale and minimum of each super-block [...], as float16 holds them.
        s, t: scale and minimum of each sub-block in units of these, integers [..., S].
    """

    x: torch.Tensor
    w: torch.Tensor
    kind: KType
    d: torch.Tensor
    e: torch.Tensor
    s: torch.Tensor
    t: torch.Tensor

    def codes(self) -> torch.Tensor:
        """Units of the nearest codes, [..., S, k]."""
        return self._units(self.s, self.t)[0]

    def _units(self, s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nearest units for sub-block steps, and the values that they decode to."""
        scale = (self.d.unsqueeze(-1) * s).unsqueeze(-1)
        minimum = (self.e.unsqueeze(-1) * t).unsqueeze(-1)
        units = self.kind.levels.nearest((self.x + minimum) * inverse(scale))
        return units, units * scale - minimum

    def error(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Weighted squared error of each sub-block, [..., S]."""
        values = self._units(s, t)[1].sub_(self.x)
        return values.square_().mul_(self.w).sum(-1)

    def fit_super(self) -> None:
        """d and e by least squares for the present codes and steps."""
        a = self.codes() * self.s.unsqueeze(-1)
        b = -self.t.unsqueeze(-1).expand_as(a)
        wa, wb = self.w * a, self.w * b
        aa, ab, bb = ((p * q).sum((-1, -2)) for p, q in ((wa, a), (wa, b), (wb, b)))
        xa, xb = ((p * self.x).sum((-1, -2)) for p in (wa, wb))
        det = aa * bb - ab * ab
        alone = det <= 1e-9 * aa * bb
        safe = torch.where(alone, 1.0, det)
        d = torch.where(alone, xa / aa.clamp(min=_TINY), (xa * bb - xb * ab) / safe)
        e = torch.where(alone, torch.zeros_like(d), (xb * aa - xa * ab) / safe)
        self.d = torch.where(aa > 0, _stored(d), self.d)
        self.e = torch.where(alone, self.e, _stored(e))

    def fit_steps(self) -> None:
        """Every sub-block moves to the best of its steps' neighbours."""
        low, high = self.kind.steps
        s, t = self.s, self.t
        best = self.error(s, t)
        for move_s, move_t in product((-1, 0, 1), (-1, 0, 1) if self.kind.minimum else (0,)):
            if not move_s and not move_t:
                continue
            near_s, near_t = (s + move_s).clamp(low, high), (t + move_t).clamp(0, high)
            error = self.error(near_s, near_t)
            better = error < best
            best = torch.where(better, error, best)
            self.s, self.t = (
                torch.where(better, new, old) for new, old in ((near_s, self.s), (near_t, self.t))
            )


def encode(name: str, weight: torch.Tensor, importance: torch.Tensor | None) -> Octets:
    """Encode a matrix.

    Args:
        name: of the type, a key of ``TYPES``.
        weight: float32 [m, n], n a multiple of 256.
        importance: weight of each column's squared error, [n], or None.

    Returns:
        uint8 [m, bytes of a row].
    """
    rows = [_encode(TYPES[name], name, weight[p], importance) for p in strips(*weight.shape)]
    return np.concatenate(rows)


def _encode(
    kind: KType, name: str, weight: torch.Tensor, importance: torch.Tensor | None
) -> Octets:
    shape = (-1, blocks.SUPER // kind.sub, kind.sub)
    x = weight.float().reshape(len(weight), *_cut(weight.shape[1], shape))
    w = None if importance is None else importance.float().reshape(_cut(weight.shape[1], shape))
    # Weights are relative to the mean of what shares a scale: the super-block.
    flat = weights_of(None if w is None else w.flatten(-2), x.flatten(-2))
    w = flat.reshape(shape[1:] if w is None else w.shape)
    best: _Super | None = None
    least = torch.empty(0)
    for start in _starts(x, w, kind):
        for _ in range(_TURNS):
            start.fit_steps()
            start.fit_super()
        start.fit_steps()
        error = start.error(start.s, start.t).sum(-1)
        if best is None:
            best, least = start, error
        else:
            _take(best, start, error < least)
            least = torch.minimum(least, error)
    assert best is not None
    return _bytes(best, name, weight.shape)


def _cut(columns: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (columns // blocks.SUPER, *shape[1:])


def _starts(x: torch.Tensor, w: torch.Tensor, kind: KType) -> Iterator[_Super]:
    """Super-blocks whose largest sub-block is met, and others whose largest is clipped a little."""
    low, high = kind.steps
    if kind.minimum:
        scale, minimum = affine(x, w, kind.levels.high, below=True)
        for share in _STARTS:
            d = _stored(scale.amax(-1) * share / high)
            e = _stored(-minimum.amin(-1) * share / high)
            s = (scale * inverse(d).unsqueeze(-1)).round_().clamp_(low, high)
            t = (-minimum * inverse(e).unsqueeze(-1)).round_().clamp_(0, high)
            yield _Super(x, w, kind, d, e, s, t)
        return
    scale = symmetric(x, w, kind.levels)
    largest = scale.gather(-1, scale.abs().argmax(-1, keepdim=True)).squeeze(-1)
    for end in (low, high):
        d = _stored(largest / end)
        s = (scale * inverse(d).unsqueeze(-1)).round_().clamp_(low, high)
        yield _Super(x, w, kind, d, torch.zeros_like(d), s, torch.zeros_like(s))


def _take(best: _Super, other: _Super, better: torch.Tensor) -> None:
    """Put the other's super-blocks in place where they are better."""
    wide = better.unsqueeze(-1)
    best.d = torch.where(better, other.d, best.d)
    best.e = torch.where(better, other.e, best.e)
    best.s = torch.where(wide, other.s, best.s)
    best.t = torch.where(wide, other.t, best.t)


def _bytes(found: _Super, name: str, shape: torch.Size) -> Octets:
    codes = (found.codes() - found.kind.levels.low).reshape(shape)
    if name in ("q3_k", "q6_k"):
        return (blocks.q3_k if name == "q3_k" else blocks.q6_k)(codes, found.s, found.d)
    steps = (found.s, found.t)
    if name == "q2_k":
        return blocks.q2_k(codes, steps, (found.d, found.e))
    return blocks.q45_k(codes, steps, (found.d, found.e), 5 if name == "q5_k" else 4)


def _stored(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers as float16 holds them."""
    return numbers.half().float()
