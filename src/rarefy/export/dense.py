"""Dense export: every compressed matrix decoded into an ordinary weight, a block at a time."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from rarefy.errors import RarefyError
from rarefy.export.containers import quantization_config
from rarefy.export.folder import open_folder, plain_config, write_folder
from rarefy.export.order import Order
from rarefy.registry import suggest

if TYPE_CHECKING:
    from pathlib import Path

    from rarefy.engine.skeleton import Skeleton

_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def export_dense(directory: Path, out: Path, dtype: str | None = None) -> None:
    """Write a folder that rarefy compressed as a plain checkpoint.

    Blocks of different width stay so, and only rarefy's loader opens such a checkpoint.

    Args:
        directory: the compressed folder, of either container.
        out: the folder to be made.
        dtype: "float32", "float16" or "bfloat16" for every floating tensor; by default decoded
            matrices take the type of the weights that were left alone.

    Raises:
        RarefyError: not a compressed folder, an unknown dtype, or ``out`` holds something else.
    """
    if dtype is not None and dtype not in _NAMES.values():
        raise RarefyError(f"there is no export dtype {dtype!r}{suggest(dtype, [*_NAMES.values()])}")
    skeleton = open_folder(directory)
    if not skeleton.earlier:
        raise RarefyError(
            f"{directory} holds no matrix that rarefy compressed; it is dense already"
        )
    config = plain_config(skeleton)
    config.pop("torch_dtype", None)
    if skeleton.widths:
        config["quantization_config"] = quantization_config({}, (), skeleton.widths)
    config["dtype"] = dtype or kept_type(skeleton)
    order = Order(directory, out, dtype)
    write_folder(skeleton, order, config, lambda names: _tensors(skeleton, names, dtype))


def _tensors(skeleton: Skeleton, names: list[str], dtype: str | None) -> dict[str, torch.Tensor]:
    """Decoded tensors under the names that the architecture's own checkpoints use."""
    tensors = {}
    for name in names:
        tensor = skeleton.read(name)
        decoded = name.removesuffix(".weight") in skeleton.earlier
        if tensor.is_floating_point() and (decoded or dtype is not None):
            tensor = tensor.to(getattr(torch, dtype or kept_type(skeleton)))
        tensors[skeleton.map.stored_name(name)] = tensor
    return tensors


def kept_type(skeleton: Skeleton) -> str:
    """The floating type that most of the weights that were left alone have."""
    kinds: Counter[str] = Counter()
    for name, entry in skeleton.checkpoint.entries.items():
        if entry.dtype in _NAMES and not name.endswith("weight_scale"):
            kinds[entry.dtype] += entry.size
    [(kind, _)] = kinds.most_common(1) or [("F16", 0)]
    return _NAMES[kind]
