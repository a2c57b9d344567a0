"""A model in GGUF's terms: names, keys, and the order of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, RopeScalingType, get_tensor_name_map

from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from numpy.typing import NDArray

    from rarefy.engine.skeleton import Skeleton

_ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
_ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class GgufModel:
    """How GGUF describes a model.

    Attributes:
        config: of transformers. tied: whether the head is the embedding.
        names: module-side parameter name -> name in GGUF.
    """

    config: Any
    tied: bool
    names: dict[str, str]

    @property
    def architecture(self) -> str:
        """GGUF's name."""
        name: str = MODEL_ARCH_NAMES[_ARCHITECTURES[self.config.model_type]]
        return name

    @property
    def head(self) -> str:
        """The matrix that logits are computed with, by its name in GGUF."""
        return "token_embd.weight" if self.tied else "output.weight"

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def head_width(self) -> int:
        """Columns of one attention head."""
        config = self.config
        width = getattr(config, "head_dim", None)
        return int(width or config.hidden_size // config.num_attention_heads)

    def row_order(self, name: str) -> NDArray[np.int64] | None:
        """Where each row of a tensor comes from, by its name in GGUF; None if order is kept.

        llama.cpp turns neighbouring rows of a head together, transformers those half a head apart.
        """
        part = name.split(".")[-2]
        if self.architecture != "llama" or part not in ("attn_q", "attn_k"):
            return None
        heads = self.config.num_attention_heads
        if part == "attn_k":
            heads = self.config.num_key_value_heads
        rows = np.arange(heads * self.head_width).reshape(heads, 2, -1)
        return rows.swapaxes(1, 2).reshape(-1)

    def rope_factors(self) -> NDArray[np.float32] | None:
        """What llama3's scaling divides each frequency by, [head width / 2]; None for others."""
        rope = self.config.rope_parameters
        if rope.get("rope_type", "default") != "llama3":
            return None
        turns = np.arange(0, self.head_width, 2) / self.head_width
        waves = 2 * math.pi * float(rope["rope_theta"]) ** turns
        factor, low, high = (
            float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
        )
        ratio = float(rope["original_max_position_embeddings"]) / waves
        smooth = np.clip((ratio - low) / (high - low), 0, 1)
        factors: NDArray[np.float32] = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
        return factors

    def write(self, writer: GGUFWriter) -> None:
        """Add the model's keys."""
        config, rope = self.config, self.config.rope_parameters
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(self.blocks)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_width)
        writer.add_value_length(self.head_width)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(float(rope["rope_theta"]))
        writer.add_rope_dimension_count(self.head_width)
        writer.add_vocab_size(config.vocab_size)
        if rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))


def gguf_model(skeleton: Skeleton) -> GgufModel:
    """Describe a model.

    Raises:
        RarefyError: GGUF, or rarefy's writer of it, cannot express the model.
    """
    config = skeleton.model.config
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        raise RarefyError(
            f"rarefy writes GGUF files of {', '.join(_ARCHITECTURES)}, not of {kind}; "
            "export dense and use llama.cpp's own converter"
        )
    if skeleton.widths:
        raise RarefyError(
            f"the blocks of {skeleton.checkpoint.path} differ in width, which llama.cpp cannot "
            "read; use a surgery that cuts all blocks alike, or keep rarefy's container"
        )
    if skeleton.state.inputs:
        name, rounding = next(iter(skeleton.state.inputs.items()))
        raise RarefyError(
            f"the input of {name} is rounded ({rounding.label()}), which GGUF cannot say; "
            "export compressed-tensors, or compress without input"
        )
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in _ROPES:
        raise RarefyError(
            f"rarefy cannot write rope scaling of type {rope!r} into GGUF; export dense and use "
            "llama.cpp's own converter"
        )
    return GgufModel(config, skeleton.tied, _names(skeleton))


def _names(skeleton: Skeleton) -> dict[str, str]:
    config = skeleton.model.config
    table = get_tensor_name_map(_ARCHITECTURES[config.model_type], config.num_hidden_layers)
    names = {}
    for name in skeleton.parameter_names:
        if skeleton.tied and name.startswith(f"{skeleton.map.head}."):
            continue
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise RarefyError(f"GGUF has no name for {name}; export dense instead")
        names[name] = found
    return names
