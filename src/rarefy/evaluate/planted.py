"""Planted outliers: a model of the same function with a few very loud activation channels.

Small models lack the outlier channels that make activations of large ones hard to round. Here the
norms before attention and the MLP amplify a few channels by kappa, and the matrices that read them
make up for it. Rounding that cannot cope with loud channels collapses; SmoothQuant's factors just
grow by kappa, and its result is the same as without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.travel import travel
from rarefy.checkpoint.writer import Writer, write_json
from rarefy.engine.skeleton import Skeleton
from rarefy.engine.stage import untouched
from rarefy.errors import RarefyError
from rarefy.maps.check import fold
from rarefy.maps.model_map import dims_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from rarefy.maps.model_map import Dims, ModelMap


def plant_block(
    block: nn.Module, model_map: ModelMap, dims: Dims, kappa: float, channels: torch.Tensor
) -> None:
    """Amplify some channels of every norm that can be folded, in place.

    Args:
        block: loaded, its experts split.
        model_map: expanded.
        dims: the model's widths.
        kappa: the factor.
        channels: which channels of the residual width.
    """
    for edge in model_map.edges:
        writers = model_map.writers(edge.name)
        if edge.foldable and all(node.kind == "norm" for node in writers):
            scale = torch.ones(dims.width(edge.width))
            scale[channels] = kappa
            fold(block, model_map, edge, scale, dims)


def channels_to_plant(width: int, share: float, seed: int) -> torch.Tensor:
    """The same channels for every block, as in real models: a share of them, at least one."""
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, round(share * width))]


def plant(
    source: Path, out: Path, kappa: float, *, share: float = 0.01, seed: int = 0
) -> torch.Tensor:
    """Write a float32 copy of a dense checkpoint with planted outliers.

    Args:
        source: a checkpoint folder whose family has a proved map.
        out: the folder to be made.
        kappa: the factor; 1 gives a plain float32 copy.
        share: of the channels that are amplified.
        seed: of their choice.

    Returns:
        The amplified channels.

    Raises:
        RarefyError: the model's edges are not known, or it is compressed.
    """
    skeleton = Skeleton(Checkpoint(source), torch.device("cpu"))
    if not skeleton.map.proved or skeleton.earlier:
        raise RarefyError(
            f"outliers can be planted only in a dense model with a proved map, and {source} is none"
        )
    dims = dims_of(skeleton.model.config)
    channels = channels_to_plant(dims.hidden, share, seed)
    writer = Writer(out, f"planted {source} {kappa} {share} {seed}")
    outside = untouched(skeleton, "", set())
    writer.add("outside", {name: tensor.float() for name, tensor in outside.items()}, None)
    parts = []
    for index in range(len(skeleton.blocks)):
        prefix = f"{skeleton.map.blocks}.{index}"
        with skeleton.block(index) as module:
            plant_block(module, skeleton.map, dims, kappa, channels)
            tensors = {
                skeleton.stored_name(f"{prefix}.{name}"): parameter.data.contiguous()
                for name, parameter in module.named_parameters()
            }
        parts.append(f"{index:05d}")
        writer.add(parts[-1], tensors, None)
    config = {k: v for k, v in skeleton.checkpoint.config.items() if k != "torch_dtype"}
    write_json(writer.folder / "config.json", config | {"dtype": "float32"})
    travel(source, writer.folder)
    writer.finish(["outside", *parts])
    return channels
