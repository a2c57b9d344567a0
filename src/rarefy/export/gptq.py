"""GPTQ's checkpoint layout, first version: what GPTQModel, vLLM and transformers open.

    qweight  int32 [in b / 32, out]   codes packed along the input, a bit stream for each output
    qzeros   int32 [G, out b / 32]    zero - 1, packed along the output
    scales   float16 [G, out]         g_idx  int32 [in], the group of each input

``zero - 1`` cannot say zero = 0. Such a group is moved up by one step, codes and zero alike, which
changes no value; where its largest code is in use already, the export is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import rarefy
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

_BITS = (2, 3, 4, 8)
_UNIT = 32


def export_gptq(order: Order) -> None:
    """Write a folder in GPTQ's layout.

    Raises:
        RarefyError: the layout cannot express the model.
    """
    skeleton = open_compressed(Path(order.source))
    fmt = gptq_format(skeleton)
    config = _config(skeleton, fmt)
    write_folder(
        skeleton,
        order,
        plain_config(skeleton) | {"quantization_config": config},
        lambda names: converted(skeleton, names, lambda name, packed: _layout(fmt, name, packed)),
        {"quantize_config.json": config},
    )


def gptq_format(skeleton: Skeleton) -> Int:
    """The format of all compressed matrices, once nothing speaks against the layout."""
    demand_no_rounded_inputs(skeleton, "GPTQ")
    demand_linears(skeleton, "GPTQ")
    fmt = only_format(skeleton, "GPTQ")
    if not isinstance(fmt, Int) or fmt.bits not in _BITS:
        raise RarefyError(
            f"the matrices are {fmt.label()}, and GPTQ holds integers of 2, 3, 4 or 8 bits"
        )
    demand_groups(skeleton, fmt, _UNIT, "GPTQ")
    for name in skeleton.earlier:
        packed = skeleton.packed(name)
        half_scales(fmt, name, packed)
        _codes(fmt, name, packed)
    return fmt


def _config(skeleton: Skeleton, fmt: Int) -> dict[str, Any]:
    dense = [name for name in dense_linears(skeleton, skeleton.earlier) if name != "lm_head"]
    skipped: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in dense}
    return {
        "quant_method": "gptq",
        "method": "gptq",
        "bits": fmt.bits,
        "group_size": fmt.group or -1,
        "desc_act": False,
        "sym": fmt.symmetric,
        "lm_head": skeleton.map.head in skeleton.earlier,
        "format": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"rarefy:{rarefy.__version__}"]},
    } | ({"dynamic": skipped} if skipped else {})


def _codes(fmt: Int, name: str, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [m, n] and zeros [m, G] of the same values, with every zero at least 1."""
    m, n = (int(size) for size in packed["weight_shape"])
    codes = unpack(packed["weight_packed"], fmt.bits, n).to(torch.int32)
    zero = fmt.stored_grid(packed).zero.to(torch.int32)
    low = zero == 0
    if bool(low.any()):
        groups = codes.reshape(m, zero.shape[1], -1)
        if bool((groups[low] == fmt.levels).any()):
            raise RarefyError(
                f"{name} has a group whose zero point is 0, which GPTQ's layout cannot say; "
                "compress with symmetric: true, or export compressed-tensors"
            )
        groups += low.unsqueeze(-1).int()
        zero = zero + low.int()
    return codes, zero


def _layout(fmt: Int, name: str, packed: Packed) -> dict[str, torch.Tensor]:
    codes, zero = _codes(fmt, name, packed)
    n = codes.shape[1]
    return {
        "qweight": pack(codes, fmt.bits).T,
        "qzeros": pack((zero - 1).T.contiguous(), fmt.bits),
        "scales": half_scales(fmt, name, packed).T,
        "g_idx": torch.arange(n, dtype=torch.int32) // (fmt.group or n),
    }
