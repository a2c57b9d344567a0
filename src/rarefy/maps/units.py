"""Units of width: what a key/value group or a neuron owns of each matrix, and how to cut it out."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rarefy.errors import RarefyError
from rarefy.maps.check import columns_of, rows_of
from rarefy.maps.model_map import dims_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rarefy.maps.model_map import Dims, ModelMap, Node, Width
    from rarefy.surgery.base import Kind

_WIDTHS: dict[Kind, tuple[Width, ...]] = {
    "heads": ("heads", "kv"),
    "neurons": ("intermediate",),
}


@dataclass(frozen=True)
class Part:
    """What the units of one kind own of one matrix.

    Attributes:
        node: the matrix.
        edge: name of the edge whose channels they are.
        axis: 0 if it writes the edge, so that channels are rows of [out, in]; 1 if it reads it.
        index: rows or columns, int64 [units, copies, channels].
    """

    node: Node
    edge: str
    axis: int
    index: torch.Tensor

    def take(self, matrix: torch.Tensor) -> torch.Tensor:
        """The units' entries of an [out, in] matrix: [units, copies, channels, k]."""
        return (matrix if self.axis == 0 else matrix.T)[self.index.to(matrix.device)]


def units_in(dims: Dims, kind: Kind) -> int:
    """Number of units of a kind in every block."""
    return dims.kv if kind == "heads" else dims.intermediate


def parts_of(model_map: ModelMap, dims: Dims, kind: Kind) -> tuple[Part, ...]:
    """Everything that the units of one kind own in a block: writers before readers.

    Query head i attends with key/value head ``i // r``, so a group owns ``r`` consecutive heads.

    Example:
        With 9 query and 3 key/value heads of 64 channels, group 1 owns rows 192 to 383 of query,
        rows 64 to 127 of key and value, and columns 192 to 383 of the output projection.
    """
    units = units_in(dims, kind)
    channels = dims.head_dim if kind == "heads" else 1
    edges = [edge for edge in model_map.edges if edge.width in _WIDTHS[kind]]
    writers = [
        Part(node, edge.name, 0, rows_of(node, edge, model_map, dims).view(units, -1, channels))
        for edge in edges
        for node in model_map.writers(edge.name)
    ]
    readers = [
        Part(node, edge.name, 1, columns.view(units, -1, channels))
        for edge in edges
        for node in model_map.readers(edge.name)
        for columns in [torch.arange(len(columns_of(edge, dims)))]
    ]
    return (*writers, *readers)


def cut(
    tensors: Mapping[str, torch.Tensor], parts: Sequence[Part], gone: torch.Tensor
) -> dict[str, torch.Tensor]:
    """A block's tensors without the units ``gone``.

    Args:
        tensors: name below the block -> weight or bias, as the module stores it.
        parts: of one kind.
        gone: indices of units.
    """
    lost: dict[tuple[Node, int], list[torch.Tensor]] = defaultdict(list)
    for part in parts:
        lost[part.node, part.axis].append(part.index[gone].flatten())
    out = dict(tensors)
    for (node, axis), positions in lost.items():
        gaps = torch.cat(positions)
        weight, bias = f"{node.path}.weight", f"{node.path}.bias"
        out[weight] = _without(out[weight], 1 - axis if node.kind == "conv1d" else axis, gaps)
        if axis == 0 and bias in out:
            out[bias] = _without(out[bias], 0, gaps)
    return out


def _without(tensor: torch.Tensor, axis: int, gaps: torch.Tensor) -> torch.Tensor:
    stays = torch.ones(tensor.shape[axis], dtype=torch.bool)
    stays[gaps] = False
    return tensor.index_select(axis, stays.nonzero().flatten().to(tensor.device))


def narrow(model: nn.Module, known: ModelMap, widths: Mapping[Kind, Sequence[int]]) -> None:
    """Give each block of a model without weights its own number of units.

    Args:
        model: as its config describes it, all blocks alike; its parameters lose their values.
        known: the model's map. widths: kind -> units that each block keeps.

    Raises:
        RarefyError: the attention of this architecture takes the number of heads from the config.
    """
    dims = dims_of(model.config)
    blocks: nn.ModuleList = model.get_submodule(known.blocks)  # type: ignore[assignment]
    for kind, counts in widths.items():
        parts = parts_of(known, dims, kind)
        if kind == "heads" and (_fused(parts) or _counts_heads(blocks[0])):
            raise RarefyError(
                f"the attention of {known.family} has one number of heads for all blocks; "
                "rank heads block by block, or cut neurons only"
            )
        for block, left in zip(blocks, counts, strict=True):
            for part in parts:
                # Shapes only: transformers calls this where every new tensor is without values.
                lost = part.index[0].numel() * (units_in(dims, kind) - left)
                _shrink(block.get_submodule(part.node.path), part.axis, lost)


def widths_in(config: Mapping[str, Any]) -> dict[Kind, list[int]]:
    """The widths that a ``config.json`` gives block by block; empty where all blocks are alike."""
    found: dict[Kind, list[int]] = config.get("quantization_config", {}).get("widths", {})
    return found


def _fused(parts: Sequence[Part]) -> bool:
    """Whether one matrix writes several edges, which the module splits at places of its own."""
    writers = [part.node for part in parts if part.axis == 0]
    return len(set(writers)) < len(writers)


def _counts_heads(block: nn.Module) -> bool:
    return any(hasattr(module, "num_heads") for module in block.modules())


def _shrink(module: nn.Module, axis: int, lost: int) -> None:
    """Take outputs (axis 0) or inputs (axis 1) from a linear without values."""
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    transposed = isinstance(module, Conv1D)
    shape = list(weight.shape)
    shape[1 - axis if transposed else axis] -= lost
    module.weight = _like(weight, shape)
    if axis == 0 and isinstance(module.bias, nn.Parameter):
        module.bias = _like(module.bias, [len(module.bias) - lost])
    names = ("nx", "nf") if transposed else ("out_features", "in_features")
    for name, size in zip(names, shape, strict=True):
        setattr(module, name, size)


def _like(old: nn.Parameter, shape: Sequence[int]) -> nn.Parameter:
    empty = torch.empty(shape, dtype=old.dtype, device=old.device)
    return nn.Parameter(empty, requires_grad=False)
