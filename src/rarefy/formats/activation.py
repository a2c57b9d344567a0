"""Activation formats: how the input of a linear is rounded while the model runs.

    symmetric b-bit integers:  s = max|x| / (2^(b-1) - 1)    x' = s clip(round(x / s))

``per`` says who shares a scale: some neighbouring channels of a token (a group, as in llama.cpp), a
token, or the whole tensor. Scales are dynamic (from the values at hand) or static (from the largest
value seen in calibration, stored as ``input_scale``). What is evaluated is this rounding, carried
out in front of every product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch.nn import functional as F  # noqa: N812

from rarefy.registry import Registry


class Activation(ABC):
    """A rounding of activations; subclasses are frozen dataclasses whose fields are the options.

    Attributes:
        static: whether ``round`` needs a stored scale.
    """

    static: bool = False

    @abstractmethod
    def scale(self, peak: torch.Tensor) -> torch.Tensor:
        """The stored scale, float [1], from the largest absolute value of each channel [n]."""

    @abstractmethod
    def round(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Rounded activations, shaped like x [..., n]."""

    @abstractmethod
    def soft(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """``round``, differentiable: straight through the codes, and through dynamic scales."""

    @abstractmethod
    def label(self) -> str:
        """Short name for tables: ``a8 token``."""


ACTIVATIONS: Registry[Activation] = Registry(
    "activation format",
    Activation,  # type: ignore[type-abstract]
    "rarefy.formats",
)

_SCOPES = ("group", "token", "tensor")


@ACTIVATIONS.register("int", family="quantization")
@dataclass(frozen=True)
class IntActivation(Activation):
    """Symmetric integers.

    Attributes:
        bits: 2 to 8.
        per: "group", "token" or "tensor".
        dynamic: scales come from the values at hand; otherwise from calibration.
        group: channels that share a scale, where those of a token do not all; the last group of a
            token may be smaller.

    Raises:
        ValueError: a field outside these values, or a static scale for anything but the tensor.
    """

    bits: int = 8
    per: str = "token"
    dynamic: bool = True
    group: int = 64

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must lie in 2..8, and {self.bits} does not")
        if self.per not in _SCOPES:
            raise ValueError(f"per must be one of {', '.join(_SCOPES)}, not {self.per!r}")
        if self.group < 1:
            raise ValueError(f"group must be at least 1, and {self.group} is not")
        if self.per != "tensor" and not self.dynamic:
            raise ValueError(f"a scale for each {self.per} is always dynamic; give per: tensor")

    @property
    def static(self) -> bool:  # type: ignore[override]
        """Whether the scale comes from calibration."""
        return not self.dynamic

    @property
    def largest(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def scale(self, peak: torch.Tensor) -> torch.Tensor:
        """The largest channel's peak over the largest code; see :meth:`Activation.scale`."""
        return (peak.max() / self.largest).clamp(min=torch.finfo(torch.float32).tiny).reshape(1)

    def _dynamic(self, x: torch.Tensor) -> torch.Tensor:
        """Scales that broadcast over x."""
        if self.per == "group":
            columns = x.shape[-1]
            whole = F.pad(x.abs(), (0, -columns % self.group))
            peaks = whole.reshape(*x.shape[:-1], -1, self.group).amax(-1)
            peak = peaks.repeat_interleave(self.group, -1)[..., :columns]
        else:
            peak = x.abs().amax(-1, keepdim=True) if self.per == "token" else x.abs().max()
        return (peak / self.largest).clamp(min=torch.finfo(x.dtype).tiny)

    def codes(
        self, x: torch.Tensor, scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Integer codes in x's type [..., n], and the scales that belong to them."""
        if scale is None:
            scale = self._dynamic(x)
        return (x / scale).round_().clamp_(-self.largest - 1, self.largest), scale

    def round(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Codes times scales; see :meth:`Activation.round`."""
        codes, scale = self.codes(x, scale)
        return codes.mul_(scale)

    def soft(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """``x + s e`` with the constant error e in units of the scale; see :meth:`Activation.soft`.

        A smaller peak then is a smaller error, which is what smoothing learns from.
        """
        with torch.no_grad():
            codes, size = self.codes(x, scale)
            error = codes - x / size
        return x + error * (self._dynamic(x) if scale is None else scale)

    def label(self) -> str:
        """For example ``a8 g64``, ``a8 token``, ``a8 tensor static``."""
        per = f"g{self.group}" if self.per == "group" else self.per
        return f"a{self.bits} {per}{'' if self.dynamic else ' static'}"
