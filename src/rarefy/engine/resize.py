"""The sizes of a smaller model, and the config that describes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from rarefy.errors import RarefyError
from rarefy.export.containers import quantization_config
from rarefy.maps.model_map import dims_of
from rarefy.maps.units import cut, narrow, parts_of, units_in

if TYPE_CHECKING:
    from rarefy.engine.skeleton import Skeleton
    from rarefy.surgery.base import Kind


@dataclass(frozen=True)
class Sizes:
    """What is to be left of a model.

    Attributes:
        blocks: indices of the blocks that stay, ascending.
        heads: key/value groups in each of them. neurons: neurons in each of them.
    """

    blocks: tuple[int, ...]
    heads: tuple[int, ...]
    neurons: tuple[int, ...]

    @property
    def uneven(self) -> dict[Kind, tuple[int, ...]]:
        """Kind -> units in each block, where blocks differ; no config of transformers says that."""
        both: dict[Kind, tuple[int, ...]] = {"heads": self.heads, "neurons": self.neurons}
        return {kind: counts for kind, counts in both.items() if len(set(counts)) > 1}

    def __str__(self) -> str:
        def text(counts: tuple[int, ...]) -> str:
            low, high = min(counts), max(counts)
            return str(low) if low == high else f"{low} to {high}"

        return (
            f"{len(self.blocks)} blocks, {text(self.heads)} key/value groups and "
            f"{text(self.neurons)} neurons"
        )


def resized_config(skeleton: Skeleton, sizes: Sizes) -> dict[str, Any]:
    """The source's ``config.json`` with the new sizes.

    The size of a head is written down, because it is otherwise taken to be hidden size by number
    of heads. Lists with one entry for each block keep the entries of the blocks that stay, and are
    written down for the same reason: by default they follow from a block's number.

    Widths that differ from block to block are left to rarefy's own loader: they are written into
    ``quantization_config``, and the size that the config gives for all blocks stays.
    """
    config = skeleton.model.config
    dims, known = dims_of(config), config.to_dict()
    alias = getattr(config, "attribute_map", {})
    edits: dict[str, Any] = {}
    uneven = sizes.uneven
    if "heads" not in uneven and sizes.heads[0] != dims.kv:
        edits["num_attention_heads"] = sizes.heads[0] * (dims.heads // dims.kv)
        edits["head_dim"] = dims.head_dim
        if "num_key_value_heads" in known:
            edits["num_key_value_heads"] = sizes.heads[0]
    if "neurons" not in uneven and sizes.neurons[0] != dims.intermediate:
        fields = ("intermediate_size", "ffn_dim", "n_inner")
        edits[next(field for field in fields if field in known)] = sizes.neurons[0]
    count = len(skeleton.blocks)
    if len(sizes.blocks) != count:
        edits["num_hidden_layers"] = len(sizes.blocks)
        edits |= {
            field: [value[i] for i in sizes.blocks]
            for field, value in known.items()
            if "layer" in field and isinstance(value, list) and len(value) == count
        }
    kept = {k: v for k, v in skeleton.checkpoint.config.items() if k != "quantization_config"}
    if uneven:
        kept["quantization_config"] = quantization_config({}, (), uneven)
    return kept | {alias.get(field, field): value for field, value in edits.items()}


def check_opens(skeleton: Skeleton, sizes: Sizes) -> None:
    """Refuse sizes that the architecture cannot have, before anything is computed.

    Raises:
        RarefyError: transformers refuses the config, or builds a model of other shapes than what
            is left of the weights.
    """
    family = skeleton.map.family
    try:
        config = type(skeleton.model.config).from_dict(resized_config(skeleton, sizes))
        with no_init_weights(), init_empty_weights(include_buffers=False):
            small = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        narrow(small, skeleton.map, sizes.uneven)
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise RarefyError(
            f"transformers refuses a {family} model of {sizes}: {reason}; choose other sizes"
        ) from error
    expected = {name: tensor.shape for name, tensor in small.state_dict().items()}
    for new, old in enumerate(sizes.blocks):
        for name, tensor in _cut_shapes(skeleton, sizes, new, old).items():
            full = f"{skeleton.map.blocks}.{new}.{name}"
            if expected.get(full) != tensor.shape:
                raise RarefyError(
                    f"a {family} model of {sizes} would need {full} in shape "
                    f"{tuple(expected.get(full, ()))}, and the cut leaves {tuple(tensor.shape)}: "
                    "its config has no field for that; leave heads at 0 and cut neurons, or blocks"
                )


def _cut_shapes(skeleton: Skeleton, sizes: Sizes, new: int, old: int) -> dict[str, torch.Tensor]:
    """A block's tensors on the meta device, cut to the size of the new block."""
    tensors: dict[str, torch.Tensor] = skeleton.blocks[old].state_dict()
    dims = dims_of(skeleton.model.config)
    left: dict[Kind, int] = {"heads": sizes.heads[new], "neurons": sizes.neurons[new]}
    for kind, count in left.items():
        gone = torch.arange(count, units_in(dims, kind))
        if len(gone):
            tensors = cut(tensors, parts_of(skeleton.map, dims, kind), gone)
    return tensors
