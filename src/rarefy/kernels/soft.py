"""Compiled rounding with gradients: one pass over the matrix each way instead of a dozen.

What it computes is described in :mod:`rarefy.formats.soft`, whose torch code is its oracle.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from rarefy.kernels import library

if TYPE_CHECKING:
    from rarefy.formats.soft import Ranges


class _Ranges(ctypes.Structure):
    """Mirror of ``rarefy_ranges`` in ``csrc/soft.h``."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
    )


class SoftRounding:
    """The kernel on one matrix.

    Args:
        ranges: of the grid that the values lie on; borrowed, as all tensors are.
        columns: of the matrix.
    """

    def __init__(self, ranges: Ranges, columns: int) -> None:
        low, high = -ranges.zero, ranges.levels - ranges.zero
        self.kept = [t.contiguous() for t in (ranges.scale, low, high)]
        self.groups = tuple(ranges.scale.shape)
        self.described = _Ranges(
            ranges.scale.shape[0],
            columns,
            ranges.group or columns,
            *(t.data_ptr() for t in self.kept),
        )

    def values(self, weight: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        """The rounded matrix [m, n]."""
        out = torch.empty_like(weight)
        self._call("rarefy_soft_round", weight, offset, out)
        return out

    def back(
        self, weight: torch.Tensor, offset: torch.Tensor | None, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of the offset [m, n], and sums over groups [m, G, 4]; see ``csrc/soft.h``."""
        by_offset, sums = torch.empty_like(weight), weight.new_empty(*self.groups, 4)
        self._call("rarefy_soft_round_back", weight, offset, gradient, by_offset, sums)
        return by_offset, sums

    def _call(self, name: str, *tensors: torch.Tensor | None) -> None:
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        function = getattr(library.library(), name)
        status = function(ctypes.byref(self.described), *pointers, torch.get_num_threads())
        assert status == 0, f"{name} was called wrongly"


def soft_rounding(
    weight: torch.Tensor, offset: torch.Tensor | None, ranges: Ranges
) -> SoftRounding | None:
    """The kernel, or None where torch has to do it."""
    tensors = [weight, ranges.scale, ranges.zero, *([] if offset is None else [offset])]
    fits = all(t.dtype is torch.float32 and t.device.type == "cpu" for t in tensors)
    whole = weight.is_contiguous() and (offset is None or offset.is_contiguous())
    if not (fits and whole and library.available()):
        return None
    return SoftRounding(ranges, weight.shape[1])
