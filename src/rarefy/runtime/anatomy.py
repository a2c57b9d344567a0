"""What one token needs of a decoder: a transformers model taken apart through its map.

The shape that can be taken apart is Llama's: RMS norm, attention with grouped queries and rotary
positions, RMS norm, gated SiLU MLP, each added to the residual stream. Biases, norms on the heads'
queries and keys, sliding windows, fused matrices and blocks of unequal width are allowed.
Everything else is refused with a reason, and the caller lets transformers run the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rarefy.errors import RarefyError
from rarefy.maps.catalogue import map_for
from rarefy.maps.llama import LLAMA
from rarefy.maps.model_map import dims_of
from rarefy.runtime.packed import PackedEmbedding

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rarefy.maps.model_map import Dims, ModelMap, Node

_LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True)
class Share:
    """Rows ``row .. row + rows`` of a linear's matrix: q, k and v may share one."""

    linear: nn.Module
    row: int
    rows: int

    @property
    def bias(self) -> Tensor | None:
        """Its part of the bias, [rows], or None."""
        bias = getattr(self.linear, "bias", None)
        return bias[self.row : self.row + self.rows] if bias is not None else None


@dataclass(frozen=True)
class Block:
    """One decoder block.

    Attributes:
        query ... down: its matrices.
        attention_norm, mlp_norm: what the norms multiply by, [hidden].
        query_norm, key_norm: the same for each head, [head_dim], or None.
        window: positions that a token sees, itself included; 0 for all.
    """

    query: Share
    key: Share
    value: Share
    output: Share
    gate: Share
    up: Share
    down: Share
    attention_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    window: int

    @property
    def shares(self) -> tuple[Share, ...]:
        """All matrices, in order of execution."""
        return (
            self.query, self.key, self.value, self.output, self.gate, self.up, self.down
        )  # fmt: skip


@dataclass(frozen=True)
class Anatomy:
    """A whole decoder.

    Attributes:
        embedding: turns ids into rows. head: gives the logits. final_norm: [hidden].
        rotary: transformers' module of rotary positions.
        head_dim: channels of a head. epsilon: of all norms. scale: of the attention scores.
        limit: positions for which rotary positions do not depend on the length of the text.
    """

    blocks: tuple[Block, ...]
    embedding: nn.Module
    head: Share
    final_norm: Tensor
    rotary: nn.Module
    head_dim: int
    epsilon: float
    scale: float
    limit: int

    def rope(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the first positions, each [positions, rotary / 2]."""
        places = torch.arange(positions).unsqueeze(0)
        with torch.inference_mode():
            cosine, sine = self.rotary(torch.zeros(1), places)
        half = cosine.shape[-1] // 2  # the second half repeats the first
        return cosine[0, :, :half].float().contiguous(), sine[0, :, :half].float().contiguous()


def dissect(model: Any) -> Anatomy:
    """Take a loaded model apart; its tensors are shared, not copied.

    Raises:
        RarefyError: the model is not of Llama's shape; the sentence says what differs.
    """
    known, dims = _llama_map(model), dims_of(model.config)
    blocks = model.get_submodule(known.blocks)
    base = model.get_submodule(known.blocks.rpartition(".")[0])
    attention = _attention(blocks[0], known)
    final = model.get_submodule(known.final_norm)
    head_module = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    if isinstance(embedding, PackedEmbedding) and embedding.factor is not None:
        raise _refusal(model, "it scales its embedding")
    taken = tuple(_block(model, block, known, dims) for block in blocks)
    return Anatomy(
        blocks=taken,
        embedding=embedding,
        head=Share(head_module, 0, _rows(model, head_module)),
        final_norm=_norm(model, final),
        rotary=base.rotary_emb,
        head_dim=dims.head_dim,
        epsilon=_epsilon(model, blocks, final),
        scale=float(getattr(attention, "scaling", dims.head_dim**-0.5)),
        limit=_limit(base.rotary_emb, model.config),
    )


def _refusal(model: Any, why: str) -> RarefyError:
    return RarefyError(f"the native decoder cannot run {model.config.model_type}: {why}")


def _llama_map(model: Any) -> ModelMap:
    """The model's map, if its nodes read and write what Llama's do."""
    known = map_for(model.config)
    if known is None:
        raise _refusal(model, "its architecture has no written map")
    if _flow(known) != _flow(LLAMA):
        raise _refusal(model, "its blocks are not norm, attention, norm, gated MLP")
    if getattr(model.config, "hidden_act", None) not in ("silu", "swish"):
        raise _refusal(model, f"its activation is {getattr(model.config, 'hidden_act', None)}")
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(model.config, field, None):
            raise _refusal(model, f"it has {field}")
    return known


def _flow(known: ModelMap) -> set[tuple[object, ...]]:
    """What is read and written, however the matrices are divided."""
    return {
        (node.kind, node.reads, edge, node.offset, node.layout)
        for node in known.nodes
        for edge in node.writes
    }


def _attention(block: nn.Module, known: ModelMap) -> nn.Module:
    """The module that holds the query matrix."""
    [node] = known.writers("query")
    return block.get_submodule(node.path.rpartition(".")[0])


def _block(model: Any, block: nn.Module, known: ModelMap, dims: Dims) -> Block:
    def share(edge: str) -> Share:
        [node] = known.writers(edge)
        return _share(model, block, node, edge, known, dims)

    def reader(edge: str) -> Share:
        [node] = known.readers(edge)
        module = block.get_submodule(node.path)
        return Share(module, 0, _rows(model, module))

    def norm(edge: str) -> Tensor:
        [node] = known.writers(edge)
        return _norm(model, block.get_submodule(node.path))

    attention = _attention(block, known)
    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    window = getattr(attention, "sliding_window", None)
    if not hasattr(attention, "sliding_window"):  # Mistral and Phi 3 ask the config
        window = getattr(model.config, "sliding_window", None)
    taken = Block(
        query=share("query"),
        key=share("key"),
        value=share("value"),
        output=reader("value"),
        gate=share("gate"),
        up=share("mlp_inner"),
        down=reader("mlp_inner"),
        attention_norm=norm("attn_in"),
        mlp_norm=norm("mlp_in"),
        query_norm=None if query_norm is None else _norm(model, query_norm),
        key_norm=None if key_norm is None else _norm(model, key_norm),
        window=int(window or 0),
    )
    for head_norm in (taken.query_norm, taken.key_norm):
        if head_norm is not None and head_norm.numel() != dims.head_dim:
            raise _refusal(model, "its query norm spans all heads")
    return taken


def _share(
    model: Any, block: nn.Module, node: Node, edge: str, known: ModelMap, dims: Dims
) -> Share:
    """The rows of a node that write one edge."""
    module = block.get_submodule(node.path)
    if len(node.writes) == 1:  # the module knows its width; blocks may differ
        return Share(module, 0, _rows(model, module))
    widths = [dims.width(known.edge(name).width) for name in node.writes]
    rows = _rows(model, module)
    if sum(widths) != rows and len(set(widths)) == 1:  # gate and up of a block that is narrower
        widths = [rows // len(widths)] * len(widths)
    if sum(widths) != rows:
        raise _refusal(model, f"{node.path} has {rows} rows, which do not divide as they should")
    at = node.writes.index(edge)
    return Share(module, sum(widths[:at]), widths[at])


def _rows(model: Any, module: nn.Module) -> int:
    """Outputs of a linear."""
    embedding = getattr(module, "embedding", None)  # a head that reads the packed embedding
    matrix = embedding[0] if isinstance(embedding, tuple) else module
    shape = getattr(matrix, "shape", None) or getattr(matrix, "weight", torch.empty(0)).shape
    if len(shape) != 2:
        raise _refusal(model, f"{type(module).__name__} is no linear")
    return int(shape[0])


def _norm(model: Any, module: nn.Module) -> Tensor:
    """What an RMS norm multiplies by."""
    if not hasattr(module, "variance_epsilon") or getattr(module, "bias", None) is not None:
        raise _refusal(model, f"{type(module).__name__} is no RMS norm")
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.detach()


def _epsilon(model: Any, blocks: nn.Module, final: nn.Module) -> float:
    """The one epsilon of all norms."""
    found = {
        float(module.variance_epsilon)  # type: ignore[arg-type]
        for module in [*blocks.modules(), final]
        if hasattr(module, "variance_epsilon")
    }
    if len(found) > 1:
        raise _refusal(model, "its norms differ in epsilon")
    return found.pop()


def _limit(rotary: Any, config: Any) -> int:
    """Positions up to which the rotary table is one table."""
    most = int(config.max_position_embeddings)
    if getattr(rotary, "rope_type", "default") not in _LENGTH_DEPENDENT:
        return most
    settings = config.rope_parameters
    return int(settings.get("original_max_position_embeddings") or rotary.original_max_seq_len)
