"""How keys and values of past tokens are stored: KIVI's grouped integers with a residual window.

    x' = low + scale * code        scale = (high - low) / (2**b - 1)

Some channels of the keys are large in every token, so a group of keys is one channel of ``group``
neighbouring tokens, and large channels keep to themselves. Values have no such channels, and every
output of attention is a sum over tokens, so a group of values is ``group`` channels of one token.
The newest tokens stay as the model made them: of the values exactly the last R, of the keys the
tokens since the last multiple of R, because a group of keys is complete only then.

``low`` and ``scale`` are float16, rounded before any code is chosen, and ``low`` is rounded down,
so that every number lies within half a step of a code. A number takes b + 32 / group bits.

Liu, Yuan, Jin, Zhong, Xu, Braverman, Chen, Hu, KIVI: A Tuning-Free Asymmetric 2bit Quantization
for KV Cache, ICML 2024 (arXiv 2402.02750).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch

from rarefy.errors import RarefyError
from rarefy.formats.packing import pack, unpack, words_per_row
from rarefy.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

_SCOPES = ("channel", "token")
_SPELLING = re.compile(r"(?:kv)?(\d+)(?:-g(\d+))?(?:-r(\d+))?")
_HALF = torch.finfo(torch.float16)
_PARAMETERS = 2 * _HALF.bits // 8  # bytes of one low and one scale


@dataclass(frozen=True)
class KVFormat:
    """Layout of a quantized cache of keys and values.

    Attributes:
        bits: 2 to 8.
        group: numbers that share a scale: tokens of a channel (keys), channels of a token (values).
        residual: R, tokens in full precision; a multiple of ``group``.
        keys_per: "channel", or "token" to group keys like values, which is a control.

    Raises:
        ValueError: a field outside these values.

    Example:
        >>> KVFormat(bits=2).bytes_per_token(heads=3, width=64)
        144.0
    """

    bits: int = 4
    group: int = 32
    residual: int = 128
    keys_per: str = "channel"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must lie in 2..8, and {self.bits} does not")
        if self.group < 1 or self.residual < 1 or self.residual % self.group:
            raise ValueError(
                f"residual must be a multiple of group, and {self.residual} is none of {self.group}"
            )
        if self.keys_per not in _SCOPES:
            raise ValueError(f"keys_per must be one of {', '.join(_SCOPES)}, not {self.keys_per!r}")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read ``4``, ``kv4`` or ``kv4-g16-r64``; ``16`` means full precision, which is None.

        Raises:
            RarefyError: another spelling, or values that do not fit.
        """
        found = _SPELLING.fullmatch(text)
        if found is None:
            raise RarefyError(
                f"{text!r} is no format of a cache; give kv8, kv4 or kv2, with -g32 for the group "
                "and -r128 for the residual window if need be, or 16 for full precision"
            )
        if text.removeprefix("kv") == "16":
            return None
        bits, group, residual = found.groups()
        try:
            return cls(int(bits), int(group or cls.group), int(residual or cls.residual))
        except ValueError as error:
            raise RarefyError(f"{text!r} is no format of a cache: {error}") from error

    def misfit(self, width: int) -> str:
        """Why heads of ``width`` channels cannot be stored; empty if they can."""
        if width % self.group == 0:
            return ""
        return (
            f"a group of {self.group} does not divide heads of {width} channels; "
            f"choose a group that divides {width}"
        )

    def coded(self, tokens: int) -> tuple[int, int]:
        """How many of the first tokens are stored as codes: of the keys, and of the values."""
        return tokens - tokens % self.residual, max(0, tokens - self.residual)

    def bytes_per_token(self, heads: int, width: int) -> float:
        """Bytes that a token outside the windows takes in one layer, keys and values together."""
        shared = _PARAMETERS * width / self.group
        return 2 * heads * (4 * words_per_row(width, self.bits) + shared)

    def layer_bytes(self, tokens: int, heads: int, width: int, itemsize: int) -> int:
        """Bytes of one layer and one sequence.

        Args:
            tokens: read so far.
            heads, width: of keys and values.
            itemsize: bytes of a number in the model's own type.
        """
        coded = sum(self.coded(tokens))
        window = (2 * tokens - coded) * heads * width * itemsize
        return round(coded * self.bytes_per_token(heads, width) / 2) + window

    def label(self) -> str:
        """For example ``kv4 g32 r128``."""
        control = "" if self.keys_per == "channel" else " keys per token"
        return f"kv{self.bits} g{self.group} r{self.residual}{control}"


CACHES: Registry[KVFormat] = Registry("cache format", KVFormat, "rarefy.formats")
CACHES.register(
    "kivi",
    family="quantization",
    paper="Liu et al., KIVI, ICML 2024",
    arxiv="2402.02750",
)(KVFormat)


@dataclass(frozen=True, eq=False)
class Coded:
    """Keys or values of T tokens as codes.

    Attributes:
        words: int32 [B, H, T, words], the codes packed along the channels.
        scale, low: float16, [B, H, T / group, 1, d] or, for groups of channels,
            [B, H, T, d / group, 1].
        form: the format. width: d. per: what a scale belongs to, "channel" or "token".
    """

    words: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor
    form: KVFormat
    width: int
    per: str

    @classmethod
    def encode(cls, x: torch.Tensor, form: KVFormat, per: str) -> Self:
        """Choose scales and codes.

        Args:
            x: [B, H, T, d]; T is a multiple of the group where scales belong to channels.
            form, per: see the class.
        """
        groups = _grouped(x.float(), form.group, per)
        inner = 3 if per == "channel" else 4
        lowest, highest = groups.amin(inner, keepdim=True), groups.amax(inner, keepdim=True)
        levels = (1 << form.bits) - 1
        low = (lowest - lowest.abs() * (_HALF.eps / 2)).half()
        scale = ((highest - low.float()) / levels).half()
        step = torch.where(scale == 0, torch.ones_like(scale), scale).float()
        codes = ((groups - low.float()) / step).round_().clamp_(0, levels)
        # What is not a number shows in the scales, and is no code.
        whole = codes.nan_to_num_(0).to(torch.uint8).reshape(x.shape)
        return cls(pack(whole, form.bits), scale, low, form, x.shape[-1], per)

    @property
    def tokens(self) -> int:
        """T."""
        return self.words.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.nbytes for t in (self.words, self.scale, self.low))

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """[B, H, T, d]."""
        codes = unpack(self.words, self.form.bits, self.width)
        groups = _grouped(codes.float(), self.form.group, self.per)
        values = groups.mul_(self.scale.float()).add_(self.low.float())
        return values.reshape(codes.shape).to(dtype)

    def join(self, newer: Self) -> Self:
        """These tokens and newer ones; no code changes."""
        return self._with(
            *(torch.cat((a, b), 2) for a, b in zip(self._tensors, newer._tensors, strict=True))
        )

    def part(self, start: int, stop: int) -> Self:
        """Tokens ``start .. stop``, multiples of the group where scales belong to channels."""
        each = self.form.group if self.per == "channel" else 1
        shared = slice(start // each, stop // each)
        parts = (self.words[:, :, start:stop], self.scale[:, :, shared], self.low[:, :, shared])
        return self._with(*(part.clone() for part in parts))

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Each tensor changed along the batch, or moved to another device."""
        return self._with(*map(change, self._tensors))

    @property
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.words, self.scale, self.low

    def _with(self, words: torch.Tensor, scale: torch.Tensor, low: torch.Tensor) -> Self:
        return replace(self, words=words, scale=scale, low=low)


def _grouped(x: torch.Tensor, group: int, per: str) -> torch.Tensor:
    """[B, H, T, d] as [B, H, T / group, group, d], or as [B, H, T, d / group, group]."""
    if per == "channel":
        return x.reshape(*x.shape[:2], x.shape[2] // group, group, x.shape[3])
    return x.reshape(*x.shape[:3], x.shape[3] // group, group)
