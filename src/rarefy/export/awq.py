"""AWQ's "gemm" checkpoint layout: 4 bits, zero points, what vLLM and GPTQModel open.

qweight  int32 [in, out / 8]   eight outputs a word, in the order 0 2 4 6 1 3 5 7
qzeros   int32 [G, out / 8]    likewise; the zero itself
scales   float16 [G, out]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rarefy.engine.select import dense_linears
from rarefy.errors import RarefyError
from rarefy.export.folder import (
    converted,
    demand_groups,
    demand_linears,
    demand_no_rounded_inputs,
    half_scales,
    only_format,
    open_compressed,
    plain_config,
    write_folder,
)
from rarefy.formats.integer import Int
from rarefy.formats.packing import pack, unpack

if TYPE_CHECKING:
    from rarefy.engine.skeleton import Skeleton
    from rarefy.export.order import Order
    from rarefy.formats.base import Packed

_BITS = 4
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def export_awq(order: Order) -> None:
    """Write a folder in AWQ's layout.

    Raises:
        RarefyError: the layout cannot express the model.
    """
    skeleton = open_compressed(Path(order.source))
    fmt = awq_format(skeleton)
    config = plain_config(skeleton) | {"quantization_config": _config(skeleton, fmt)}
    write_folder(
        skeleton,
        order,
        config,
        lambda names: converted(skeleton, names, lambda name, packed: _layout(fmt, name, packed)),
    )


def awq_format(skeleton: Skeleton) -> Int:
    """The format of all compressed matrices, once nothing speaks against the layout."""
    demand_no_rounded_inputs(skeleton, "AWQ")
    demand_linears(skeleton, "AWQ")
    fmt = only_format(skeleton, "AWQ")
    if not isinstance(fmt, Int) or fmt.bits != _BITS:
        raise RarefyError(f"the matrices are {fmt.label()}, and AWQ holds integers of 4 bits")
    demand_groups(skeleton, fmt, len(_ORDER), "AWQ")
    for name in skeleton.earlier:
        half_scales(fmt, name, skeleton.packed(name))
    return fmt


def _config(skeleton: Skeleton, fmt: Int) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": _BITS,
        "group_size": fmt.group or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": dense_linears(skeleton, skeleton.earlier),
    }


def _words(codes: torch.Tensor) -> torch.Tensor:
    """int32 [k, out / 8] from codes [k, out]."""
    eights = codes.reshape(codes.shape[0], -1, len(_ORDER))[:, :, list(_ORDER)]
    return pack(eights.reshape(codes.shape), _BITS)


def _layout(fmt: Int, name: str, packed: Packed) -> dict[str, torch.Tensor]:
    codes = unpack(packed["weight_packed"], _BITS, int(packed["weight_shape"][1]))
    zero = fmt.stored_grid(packed).zero.to(torch.int32)
    return {
        "qweight": _words(codes.T),
        "qzeros": _words(zero.T),
        "scales": half_scales(fmt, name, packed).T,
    }
