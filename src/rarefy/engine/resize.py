"""Cut units out of a block's tensors, and write the config that describes what is left."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from rarefy.errors import RarefyError
from rarefy.maps.check import columns_of, rows_of
from rarefy.maps.model_map import dims_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rarefy.engine.skeleton import Skeleton
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


@dataclass(frozen=True)
class Sizes:
    """What is to be left of a model.

    Attributes:
        blocks: indices of the blocks that stay, ascending.
        heads: key/value groups in each of them. neurons: neurons in each of them.
    """

    blocks: tuple[int, ...]
    heads: int
    neurons: int


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


def resized_config(skeleton: Skeleton, sizes: Sizes) -> dict[str, Any]:
    """The source's ``config.json`` with the new sizes.

    The size of a head is written down, because it is otherwise taken to be hidden size by number
    of heads. Lists with one entry for each block keep the entries of the blocks that stay, and are
    written down for the same reason: by default they follow from a block's number.
    """
    config = skeleton.model.config
    dims, known = dims_of(config), config.to_dict()
    alias = getattr(config, "attribute_map", {})
    edits: dict[str, Any] = {}
    if sizes.heads != dims.kv:
        edits["num_attention_heads"] = sizes.heads * (dims.heads // dims.kv)
        edits["head_dim"] = dims.head_dim
        if "num_key_value_heads" in known:
            edits["num_key_value_heads"] = sizes.heads
    if sizes.neurons != dims.intermediate:
        fields = ("intermediate_size", "ffn_dim", "n_inner")
        edits[next(field for field in fields if field in known)] = sizes.neurons
    count = len(skeleton.blocks)
    if len(sizes.blocks) != count:
        edits["num_hidden_layers"] = len(sizes.blocks)
        edits |= {
            field: [value[i] for i in sizes.blocks]
            for field, value in known.items()
            if "layer" in field and isinstance(value, list) and len(value) == count
        }
    kept = {k: v for k, v in skeleton.checkpoint.config.items() if k != "quantization_config"}
    return kept | {alias.get(field, field): value for field, value in edits.items()}


def check_opens(skeleton: Skeleton, sizes: Sizes) -> None:
    """Refuse sizes that the architecture cannot have, before anything is computed.

    Raises:
        RarefyError: transformers refuses the config, or builds a model of other shapes than what
            is left of the weights.
    """
    family = skeleton.map.family
    what = f"{len(sizes.blocks)} blocks, {sizes.heads} key/value groups and {sizes.neurons} neurons"
    try:
        config = type(skeleton.model.config).from_dict(resized_config(skeleton, sizes))
        with no_init_weights(), init_empty_weights(include_buffers=False):
            small = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise RarefyError(
            f"transformers refuses a {family} model of {what}: {reason}; choose other sizes"
        ) from error
    expected = {name: tensor.shape for name, tensor in small.state_dict().items()}
    for new, old in enumerate(sizes.blocks):
        for name, tensor in _cut_shapes(skeleton, sizes, old).items():
            full = f"{skeleton.map.blocks}.{new}.{name}"
            if expected.get(full) != tensor.shape:
                raise RarefyError(
                    f"a {family} model of {what} would need {full} in shape "
                    f"{tuple(expected.get(full, ()))}, and the cut leaves {tuple(tensor.shape)}: "
                    "its config has no field for that; leave heads at 0 and cut neurons, or blocks"
                )


def _cut_shapes(skeleton: Skeleton, sizes: Sizes, block: int) -> dict[str, torch.Tensor]:
    """A block's tensors on the meta device, cut to size."""
    tensors: dict[str, torch.Tensor] = skeleton.blocks[block].state_dict()
    dims = dims_of(skeleton.model.config)
    left: dict[Kind, int] = {"heads": sizes.heads, "neurons": sizes.neurons}
    for kind, count in left.items():
        gone = torch.arange(count, units_in(dims, kind))
        if len(gone):
            tensors = cut(tensors, parts_of(skeleton.map, dims, kind), gone)
    return tensors
