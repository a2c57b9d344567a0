"""compressed-tensors with rounded activations: what stock transformers and vLLM open.

    int-quantized     weight int8 [out, in],          weight_scale [out, 1]; input_scale if static
    float-quantized   weight float8_e4m3fn [out, in], weight_scale [out, 1]

The first is made from 8-bit symmetric integers by row with 8-bit inputs (W8A8); the second from a
dense model, with inputs rounded to float8 by token (``--type FP8``). Weights alone in 2, 4 or 8
bits are stored as ``pack-quantized`` by ``compress`` itself (``containers.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rarefy.engine.select import dense_linears
from rarefy.errors import RarefyError
from rarefy.export.containers import obstacle
from rarefy.export.folder import (
    converted,
    demand_linears,
    only_format,
    open_compressed,
    open_folder,
    plain_config,
    write_folder,
)
from rarefy.formats.activation import IntActivation
from rarefy.formats.integer import Int
from rarefy.formats.packing import unpack

if TYPE_CHECKING:
    from rarefy.engine.skeleton import Skeleton
    from rarefy.export.order import Order
    from rarefy.formats.base import Packed

FP8 = "FP8"
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_NAME = "compressed-tensors"


def export_compressed_tensors(order: Order) -> None:
    """Write a folder in compressed-tensors' container.

    Raises:
        RarefyError: the container cannot express the model.
    """
    if order.type is not None and order.type.upper() != FP8:
        raise RarefyError(
            f"--type {order.type} is not one of compressed-tensors'; give FP8, or none to export "
            "what a recipe has made"
        )
    if order.type is not None:
        _export_fp8(order)
    else:
        _export_int8(order)


def _export_int8(order: Order) -> None:
    skeleton = open_compressed(Path(order.source))
    stored = skeleton.stored_matrices(skeleton.earlier, skeleton.state.inputs)
    if obstacle(stored, bool(skeleton.widths)) is None:
        raise RarefyError(
            f"{order.source} is a compressed-tensors checkpoint already; use it as it is"
        )
    demand_linears(skeleton, _NAME)
    fmt = only_format(skeleton, _NAME)
    rounding = _one_rounding(skeleton)
    if not isinstance(fmt, Int) or fmt.bits != 8 or not fmt.symmetric or fmt.group is not None:
        raise RarefyError(
            f"the matrices are {fmt.label()} and their inputs {rounding.label()}; with rounded "
            "inputs rarefy writes compressed-tensors of 8-bit symmetric integers by row only"
        )
    inputs = _arguments("int", "token" if rounding.dynamic else "tensor", rounding.dynamic)
    config = _config(skeleton, "int-quantized", _arguments("int", "channel", False), inputs)
    write_folder(
        skeleton,
        order,
        config,
        lambda names: converted(skeleton, names, lambda name, packed: _int8(packed)),
    )


def _one_rounding(skeleton: Skeleton) -> IntActivation:
    """How every compressed linear's input is rounded."""
    found = {skeleton.state.inputs.get(name) for name in skeleton.earlier}
    if len(found) > 1:
        raise RarefyError(
            "the inputs of the compressed matrices are not all rounded alike, and rarefy writes "
            "compressed-tensors with one scheme only; use one scheme for all"
        )
    [rounding] = found
    if rounding is None:
        name, fmt = next(iter(skeleton.earlier.items()))
        raise RarefyError(
            f"{name} is {fmt.label()}, which compressed-tensors cannot say; it holds 2, 4 or 8 "
            "bits in whole groups, one format for all"
        )
    if (
        not isinstance(rounding, IntActivation)
        or rounding.bits != 8
        or (rounding.dynamic and rounding.per != "token")
    ):
        raise RarefyError(
            f"inputs are {rounding.label()}; compressed-tensors takes 8 bits by token, or 8 bits "
            "of the whole tensor with a static scale"
        )
    return rounding


def _int8(packed: Packed) -> dict[str, torch.Tensor]:
    codes = unpack(packed["weight_packed"], 8, int(packed["weight_shape"][1]))
    tensors = {
        "weight": (codes.short() - 128).to(torch.int8),
        "weight_scale": packed["weight_scale"],
    }
    if "input_scale" in packed:
        tensors["input_scale"] = packed["input_scale"]
    return tensors


def _export_fp8(order: Order) -> None:
    skeleton = open_folder(Path(order.source))
    if skeleton.earlier:
        raise RarefyError(
            f"{order.source} is compressed already, and --type FP8 rounds a dense model; "
            "export the dense model"
        )
    if skeleton.widths or skeleton.map.experts is not None or not skeleton.map.proved:
        raise RarefyError(
            f"rarefy writes FP8 of models with a written map, plain linears and equal blocks, and "
            f"{order.source} is none"
        )
    linears = {
        skeleton.node_name(index, node)
        for index in range(len(skeleton.blocks))
        for node in skeleton.linears(index)
    }
    for index in range(len(skeleton.blocks)):
        for node in skeleton.linears(index):
            if node.kind != "linear":
                raise RarefyError(
                    f"{skeleton.node_name(index, node)} is not a plain linear layer, the only "
                    "thing that compressed-tensors compresses"
                )
    weights = _arguments("float", "channel", False)
    config = _config(
        skeleton, "float-quantized", weights, _arguments("float", "token", True), linears
    )

    def tensors(names: list[str]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name in names:
            stored, weight = skeleton.stored_name(name), skeleton.read(name)
            module = name.removesuffix(".weight")
            if module == name or module not in linears:
                found[stored] = weight
            else:
                codes, scale = fp8(weight)
                found |= {stored: codes, f"{stored}_scale": scale}
        return found

    write_folder(skeleton, order, config, tensors)


def fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows rounded to float8_e4m3fn, and their scales [m, 1] in the weight's own type."""
    reach = weight.float().abs().amax(1, keepdim=True)
    scale = (reach / _LARGEST).to(weight.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    units = (weight.float() / scale.float()).clamp(-_LARGEST, _LARGEST)
    return units.to(torch.float8_e4m3fn), scale


def _arguments(kind: str, strategy: str, dynamic: bool) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs, which forbids any further key."""
    return {
        "num_bits": 8,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": None,
        "block_structure": None,
        "dynamic": dynamic,
        "actorder": None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
    }


def _config(
    skeleton: Skeleton,
    form: str,
    weights: dict[str, Any],
    inputs: dict[str, Any],
    compressed: set[str] | None = None,
) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": form,
    }
    return plain_config(skeleton) | {
        "quantization_config": {
            "quant_method": _NAME,
            "format": form,
            "quantization_status": "compressed",
            "version": "0.20.0",
            "config_groups": {"group_0": group},
            "ignore": dense_linears(skeleton, compressed or skeleton.earlier),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "sparsity_config": {},
            "transform_config": {},
        }
    }
