"""Prove a map on a small model: what it says must hold in numbers.

Three claims are checked in every block. *Sharing*: linears that read one edge receive the very
same tensor. *Order*: linears run in the order in which they are listed, and none is left out.
*Folding*: scaling a foldable edge's writers by s > 0 and dividing its readers by s moves no logit.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rarefy.errors import RarefyError
from rarefy.maps.discover import LINEARS, Call, record_calls
from rarefy.maps.experts import fuse_experts, split_experts
from rarefy.maps.model_map import Dims, Edge, Experts, ModelMap, Node, dims_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

# float32 rounding through a few blocks; a wrong fold moves logits by more than a hundredth.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Proof:
    """A fold that was carried out.

    Attributes:
        block: index of the block.
        edge: name of the edge.
        change: largest absolute change of any logit.
    """

    block: int
    edge: str
    change: float


def rows_of(node: Node, edge: Edge, model_map: ModelMap, dims: Dims) -> Tensor:
    """Return which output rows of a writer make up the edge.

    Example:
        GPT-2's ``c_attn`` writes query, key and value of 64 channels each: the rows of "value"
        are 128 to 191. In GPT-NeoX they come head by head, after that head's query and key.

    Returns:
        Row indices [width of the edge], in the order of the edge's channels.
    """
    at = node.writes.index(edge.name)
    if node.layout == "per_head":
        per_head, d = len(node.writes) * dims.head_dim, dims.head_dim
        starts = torch.arange(dims.heads) * per_head + at * d
        return (starts[:, None] + torch.arange(d)).flatten()
    start = sum(dims.width(model_map.edge(name).width) for name in node.writes[:at])
    return torch.arange(start, start + dims.width(edge.width))


def columns_of(edge: Edge, dims: Dims) -> Tensor:
    """Return the channel of the edge that each input column of its readers sees.

    Under grouped-query attention every key/value head feeds several query heads, so that a
    channel appears in several columns; otherwise column i sees channel i.

    Returns:
        Channel indices [columns of a reader].
    """
    channels = torch.arange(dims.width(edge.width))
    if not edge.repeat:
        return channels
    heads = channels.view(dims.kv, dims.head_dim)
    return heads.repeat_interleave(dims.heads // dims.kv, dim=0).flatten()


@torch.no_grad()
def fold(block: nn.Module, model_map: ModelMap, edge: Edge, scale: Tensor, dims: Dims) -> None:
    """Multiply an edge's writers by ``scale`` and divide its readers by it, in place.

    Args:
        block: the block, its experts split.
        model_map: the map, expanded.
        edge: the edge to fold.
        scale: positive factors [width of the edge].
        dims: the model's widths.
    """
    for node in model_map.writers(edge.name):
        module = block.get_submodule(node.path)
        rows = rows_of(node, edge, model_map, dims)
        weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        if node.kind == "norm":
            weight.copy_(scale * (node.offset + weight) - node.offset)
        elif node.kind == "conv1d":
            weight[:, rows] *= scale
        else:
            weight[rows] *= scale[:, None]
        if bias is not None:
            bias[rows] *= scale
    per_column = scale[columns_of(edge, dims)]
    for node in model_map.readers(edge.name):
        weight = block.get_submodule(node.path).get_parameter("weight")
        weight.div_(per_column[:, None] if node.kind == "conv1d" else per_column)


def left_alone(block: nn.Module, model_map: ModelMap) -> tuple[str, ...]:
    """Return the modules that own a matrix which no solver compresses, such as a router.

    Args:
        block: the block, its experts split.
        model_map: the map, expanded.
    """
    taken = {node.path for node in model_map.linears}
    return tuple(
        path
        for path, module in block.named_modules()
        if path not in taken and any(p.ndim >= 2 for p in module.parameters(recurse=False))
    )


def prove(model: PreTrainedModel, model_map: ModelMap) -> list[Proof]:
    """Check a map against a model and fold every foldable edge; the weights are put back.

    Args:
        model: a small float32 model with random weights; norms that are not all one and biases
            that are not zero make the proof mean something.
        model_map: the family's map, not expanded.

    Returns:
        One proof for each fold, in order of blocks and edges.

    Raises:
        RarefyError: a claim of the map does not hold; the sentence names the edge or module.
    """
    dims = dims_of(model.config)
    full = model_map.expanded(dims)
    blocks = list(cast("nn.ModuleList", model.get_submodule(model_map.blocks)))
    input_ids = torch.randint(
        model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0)
    )

    def logits() -> Tensor:
        return cast("Tensor", model(input_ids=input_ids, use_cache=False).logits)

    with torch.no_grad(), _prepared(model, blocks, model_map.experts):
        for block in blocks:
            _check_modules(block, full)
            _check_calls(record_calls(block, logits), full)
        return [
            Proof(index, edge.name, _prove_fold(block, full, edge, dims, logits))
            for index, block in enumerate(blocks)
            for edge in full.edges
            if edge.foldable
        ]


@contextmanager
def _prepared(model: nn.Module, blocks: list[nn.Module], experts: Experts | None) -> Iterator[None]:
    """Evaluation mode and split experts, for as long as the proof lasts."""
    training = model.training
    model.eval()
    for block in blocks if experts else ():
        split_experts(block, cast("Experts", experts))
    try:
        yield
    finally:
        model.train(training)
        for block in blocks if experts else ():
            fuse_experts(block, cast("Experts", experts))


def _check_modules(block: nn.Module, model_map: ModelMap) -> None:
    """Every node is a module of its kind, and every linear of the block is a node."""
    modules = dict(block.named_modules())
    for node in model_map.nodes:
        module = modules.get(node.path)
        if getattr(module, "weight", None) is None:
            raise _wrong(model_map, f"{node.path!r} is no module with a weight")
        if isinstance(module, Conv1D) != (node.kind == "conv1d"):
            raise _wrong(model_map, f"{node.path!r} is not of kind {node.kind!r}")
    missing = [p for p in left_alone(block, model_map) if isinstance(modules[p], LINEARS)]
    routers = {node.path for node in model_map.nodes if node.kind == "router"}
    if set(missing) - routers:
        raise _wrong(model_map, f"linears are missing: {', '.join(missing)}")


def _check_calls(calls: tuple[Call, ...], model_map: ModelMap) -> None:
    """Readers of an edge share one input tensor, and linears run in the order listed."""
    by_path = {call.path: call for call in calls}
    for first, *others in model_map.shared_inputs:
        for node in others:
            a, b = by_path.get(first.path), by_path.get(node.path)
            if a and b and not a.same_input(b):
                raise _wrong(
                    model_map,
                    f"edge {first.reads!r} is read by {a.path} and {b.path}, which receive "
                    "different inputs",
                )
    # An expert that no token reached does not run.
    may_rest = (f"{model_map.experts.container}.",) if model_map.experts else ()
    listed = [n for n in model_map.linears if n.path in by_path or not n.path.startswith(may_rest)]
    for node, ran in zip_longest(listed, by_path):
        if node is None or node.path != ran:
            listing = f"edge {node.reads!r} is read by {node.path}" if node else "nothing is listed"
            raise _wrong(model_map, f"{listing} where {ran or 'no other linear'} runs")


def _prove_fold(
    block: nn.Module,
    model_map: ModelMap,
    edge: Edge,
    dims: Dims,
    logits: Callable[[], Tensor],
) -> float:
    """Fold one edge by random factors; return how far the logits moved, if only by rounding."""
    _check_widths(block, model_map, edge, dims)
    nodes = (*model_map.writers(edge.name), *model_map.readers(edge.name))
    touched = [p for n in nodes for p in block.get_submodule(n.path).parameters(recurse=False)]
    kept = [p.clone() for p in touched]
    generator = torch.Generator().manual_seed(1)
    scale = 0.5 + 1.5 * torch.rand(dims.width(edge.width), generator=generator)
    before = logits()
    try:
        fold(block, model_map, edge, scale, dims)
        change = float((logits() - before).abs().max())
    finally:
        for parameter, value in zip(touched, kept, strict=True):
            parameter.copy_(value)
    noise = TOLERANCE * float(before.abs().max())
    if not change <= noise:
        raise _wrong(
            model_map,
            f"edge {edge.name!r} cannot be folded: logits moved by {change:.2g}, and rounding "
            f"explains {noise:.2g}",
        )
    return change


def _check_widths(block: nn.Module, model_map: ModelMap, edge: Edge, dims: Dims) -> None:
    """A foldable edge has writers and readers, and they are as wide as it says."""
    writers, readers = model_map.writers(edge.name), model_map.readers(edge.name)
    if not writers or not readers:
        raise _wrong(model_map, f"edge {edge.name!r} is foldable but lacks a writer or a reader")
    for node in writers:
        shape = _shape(block, node)
        rows = sum(dims.width(model_map.edge(name).width) for name in node.writes)
        if shape[0] != rows:
            raise _wrong(
                model_map, f"edge {edge.name!r}: {node.path} has {shape[0]} rows and not {rows}"
            )
    for node in readers:
        shape = _shape(block, node)
        columns = len(columns_of(edge, dims))
        if shape[-1] != columns:
            raise _wrong(
                model_map,
                f"edge {edge.name!r}: {node.path} has {shape[-1]} columns and not {columns}",
            )


def _shape(block: nn.Module, node: Node) -> tuple[int, ...]:
    """Weight shape as [out, in], or [width] of a norm."""
    shape = tuple(block.get_submodule(node.path).get_parameter("weight").shape)
    return shape[::-1] if node.kind == "conv1d" else shape


def _wrong(model_map: ModelMap, what: str) -> RarefyError:
    return RarefyError(f"the {model_map.family} map does not describe this model: {what}")
