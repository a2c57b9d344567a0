"""``rarefy::int_linear`` on GPUs: triton's kernels where triton is installed, else the reference.

The kernels are checked against the reference in triton's interpreter and compile for GPUs of
compute capability 8.0 and 9.0. They have not run on a GPU yet: neither speed nor results are
measured there.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from rarefy.kernels import reference
from rarefy.kernels.ops_int import int_linear

_BITS = (2, 4, 8)


@cache
def available() -> bool:
    """Whether there is a GPU with triton for it."""
    return torch.cuda.is_available() and find_spec("triton") is not None


@int_linear.register_kernel("cuda")
def cuda_int_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group: int,
) -> torch.Tensor:
    """:func:`rarefy.kernels.ops_int.int_linear` by triton, imported when first needed."""
    if bits not in _BITS or not available():
        return reference.int_linear(x, codes, scales, zeros, bits, group)
    from rarefy.kernels.triton.integer import product

    return product(x, codes, scales, zeros, bits, group or None)
