"""What one token costs a loaded model: weights, zeros, operations and bytes, counted.

Nothing is taken from a recipe's word: packed matrices are decoded and their zeros counted, two
thin factors count as r (m + n), and weights dropped by surgery are not there to count. For a token
at a context of T positions

    FLOPs = 2 P + 4 layers T d_attn

with P the weights of the matrices that it is multiplied by (the head among them; an embedding is
looked up; of routed experts only the chosen share) and d_attn = heads x head_dim. Neither a
causal mask nor a sliding window is subtracted.

Source: Kaplan et al., Scaling Laws for Neural Language Models, 2020, section 2.1, forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rarefy.maps.experts import SplitExperts
from rarefy.maps.model_map import dims_of
from rarefy.maps.units import units_in, widths_in
from rarefy.runtime.packed import PackedEmbedding, PackedMatrix, TiedHead

if TYPE_CHECKING:
    from collections.abc import Iterator

_STRIP = 1 << 22  # weights decoded at a time


@dataclass(frozen=True)
class Counts:
    """A loaded model in numbers.

    Attributes:
        parameters: learned scalars, tied tensors once; a packed matrix [m, n] counts m n.
        nonzero: those that differ from zero as executed, decoded where they are packed.
        linear: parameters of the matrices inside the blocks.
        multiplied, multiplied_nonzero: weights that meet one token in a product, the head
            included. head: the head's share of ``multiplied``.
        attention: operations per token and position of context.
        read_bytes: bytes of weights, as resident, that one token needs.
        cache_bytes: keys and values of one position, in the model's number format.
    """

    parameters: int
    nonzero: int
    linear: int
    multiplied: int
    multiplied_nonzero: int
    head: int
    attention: int
    read_bytes: int
    cache_bytes: int

    def flops(self, context: int) -> int:
        """Operations per token, zeros multiplied like any other weight."""
        return 2 * self.multiplied + self.attention * context

    def flops_effective(self, context: int) -> int:
        """Operations per token if every product with a zero were skipped."""
        return 2 * self.multiplied_nonzero + self.attention * context

    def flops_prefill(self, tokens: int) -> int:
        """Operations of reading a prompt and predicting its next token alone."""
        return tokens * (self.flops(tokens) - 2 * self.head) + 2 * self.head


@dataclass(frozen=True)
class _Piece:
    """One stored tensor or packed matrix: its identity, extent, and how many entries count."""

    key: int
    rank: int
    weights: int
    nonzero: int
    bytes: int


@torch.no_grad()
def count(model: Any) -> Counts:
    """Count a loaded transformers model.

    Args:
        model: dense or compressed, as ``rarefy.checkpoint.load.load_model`` returns it.

    Raises:
        RarefyError: the config does not say how wide the model is.
    """
    total: dict[str, float] = dict.fromkeys(Counts.__dataclass_fields__, 0)
    known: dict[int, _Piece] = {}
    counted: set[int] = set()
    shares, head = _expert_shares(model), model.get_output_embeddings()
    for module in model.modules():
        looked_up = isinstance(module, nn.Embedding | PackedEmbedding)
        for piece in _pieces(module, known):
            product = piece.rank > 1 and not looked_up
            share = shares.get(id(module), 1.0)
            if piece.key not in counted:
                total["parameters"] += piece.weights
                total["nonzero"] += piece.nonzero
                total["linear"] += piece.weights if product and module is not head else 0
                counted.add(piece.key)
            if product:
                total["multiplied"] += share * piece.weights
                total["multiplied_nonzero"] += share * piece.nonzero
                total["head"] += piece.weights if module is head else 0
            total["read_bytes"] += 0 if looked_up else share * piece.bytes
    dims, layers = dims_of(model.config), _layers(model.config)
    total["attention"] = 4 * layers * dims.width("heads")
    total["cache_bytes"] = 2 * layers * dims.width("kv") * model.dtype.itemsize
    return Counts(**{name: round(value) for name, value in total.items()})


def _pieces(module: nn.Module, known: dict[int, _Piece]) -> Iterator[_Piece]:
    """What a module itself multiplies by or looks up, its children apart."""
    matrix = module.embedding[0] if isinstance(module, TiedHead) else module
    if isinstance(matrix, PackedMatrix):
        if id(matrix) not in known:
            known[id(matrix)] = _packed(matrix)
        yield known[id(matrix)]
    for parameter in module.parameters(recurse=False):
        if id(parameter) not in known:
            nonzero = int(torch.count_nonzero(parameter))
            known[id(parameter)] = _Piece(
                id(parameter), parameter.ndim, parameter.numel(), nonzero, parameter.nbytes
            )
        yield known[id(parameter)]


def _packed(matrix: PackedMatrix) -> _Piece:
    rows, columns = matrix.shape
    strip = max(1, _STRIP // columns)
    nonzero = sum(
        int(torch.count_nonzero(matrix.dense(slice(at, min(at + strip, rows)))))
        for at in range(0, rows, strip)
    )
    size = sum(tensor.nbytes for tensor in matrix.tensors().values())
    return _Piece(id(matrix), 2, rows * columns, nonzero, size)


def _layers(config: Any) -> float:
    """Number of blocks; one that kept half of its heads counts half."""
    heads = widths_in(config.to_dict()).get("heads")
    if heads is not None:
        return sum(heads) / units_in(dims_of(config), "heads")
    return int(config.get_text_config().num_hidden_layers)


def _expert_shares(model: Any) -> dict[int, float]:
    """Share of tokens that reach each module of routed experts, by the module's identity."""
    experts = dims_of(model.config).experts
    if not experts:
        return {}
    share = getattr(model.config.get_text_config(), "num_experts_per_tok", experts) / experts
    routed = [m for m in model.modules() if isinstance(m, SplitExperts) or _fused(m, experts)]
    return {id(inner): share for module in routed for inner in module.modules()}


def _fused(module: nn.Module, experts: int) -> bool:
    """Whether a module holds all experts of a block in one tensor [experts, ., .]."""
    own = list(module.parameters(recurse=False))
    return any(p.ndim == 3 and p.shape[0] == experts for p in own)
