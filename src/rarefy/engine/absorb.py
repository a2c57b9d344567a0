"""A transform stage: new bases for the foldable edges, absorbed into the weights beside them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from rarefy.checkpoint.reader import DTYPES
from rarefy.engine.capture import capture_all
from rarefy.engine.close import close_dense
from rarefy.engine.observe import observe
from rarefy.engine.skeleton import Skeleton, matrix_of
from rarefy.engine.stage import untouched
from rarefy.errors import RarefyError
from rarefy.maps.check import columns_of, fold
from rarefy.maps.model_map import dims_of
from rarefy.transforms.base import EdgeView, Transform

if TYPE_CHECKING:
    from torch import nn

    from rarefy.engine.capture import Batch
    from rarefy.engine.stage import StageRun
    from rarefy.maps.model_map import Edge, Node
    from rarefy.statistics import Collector


def run_transform(run: StageRun, manifest: dict[str, Any]) -> None:
    """Fold every edge that the transform wants folded, block by block.

    The function of the model stays what it was, so the batches that later blocks see are those of
    the dense model.

    Raises:
        RarefyError: the model's edges are not known, or it is compressed already.
    """
    start = time.perf_counter()
    skeleton = Skeleton(run.source, run.device)
    skeleton.demand_dense(run.stage.name, "transforms", "changes weights")
    batches: list[Batch] = []
    count = len(skeleton.blocks)
    with torch.no_grad():
        if run.tokens is not None and run.stage.needs:
            batches = capture_all(skeleton, run.tokens.ids)
        for index in range(count):
            _fold_block(run, skeleton, index, batches)
            run.watcher.step(index + 1, count)
    if not run.writer.has("outside"):
        run.writer.add("outside", untouched(skeleton, "", set()), None)
    parts = [f"{i:05d}" for i in range(count)]
    edges = [edge for part in parts for edge in run.writer.notes(part)]
    close_dense(run, skeleton, manifest, {"edges": edges}, start)
    run.writer.finish(["outside", *parts])


def _fold_block(run: StageRun, skeleton: Skeleton, index: int, batches: list[Batch]) -> None:
    part = f"{index:05d}"
    prefix = f"{skeleton.map.blocks}.{index}"
    with skeleton.block(index) as module:
        if run.writer.has(part):
            for batch in batches:  # an earlier run folded this block; what it computes is the same
                batch.hidden = batch.run(module, index)
            return
        edges = [edge for edge in skeleton.map.edges if edge.foldable and not edge.part_of]
        watched = {
            node.path: edge.name
            for edge in edges
            for node in _first_readers(_readers(skeleton, edge))
        }
        seen = observe(module, index, batches, watched, run.stage.needs) if batches else {}
        notes = []
        # From the last edge on: a fold rescales rows of its writers, and these read an earlier
        # edge, whose factors are to suit the weights that stay.
        for edge in reversed(edges):
            if edge.name in seen:
                note = _fold_edge(run, skeleton, (index, module), edge, seen[edge.name])
                notes += [] if note is None else [note]
        tensors = _dense(skeleton, module, prefix)
    run.writer.add(part, tensors, notes)


def _readers(skeleton: Skeleton, edge: Edge) -> tuple[Node, ...]:
    """The matrices that read an edge; a router reads it too, but is nobody's to round."""
    return tuple(
        node for node in skeleton.map.readers(edge.name) if node.kind in ("linear", "conv1d")
    )


def _first_readers(readers: tuple[Node, ...]) -> list[Node]:
    """One reader for each tensor that is read: linears of one input would count it twice."""
    return list({node.reads: node for node in reversed(readers)}.values())


def _fold_edge(
    run: StageRun,
    skeleton: Skeleton,
    place: tuple[int, nn.Module],
    edge: Edge,
    seen: Collector,
) -> dict[str, Any] | None:
    """Ask the transform about one edge and absorb its answer; return what the manifest says."""
    index, module = place
    transform = run.stage.method
    assert isinstance(transform, Transform)
    name = f"{skeleton.map.blocks}.{index}.{edge.name}"
    dims = dims_of(skeleton.model.config)
    readers = _readers(skeleton, edge)
    schemes = [
        run.stage.scheme_for(skeleton.node_name(index, node), inside=True) for node in readers
    ]
    gram, moments = seen.result()
    assert moments is not None
    stored = [skeleton.stored_dtype(skeleton.node_name(index, node)) for node in readers]
    view = EdgeView(
        name=name,
        after_norm=all(node.kind == "norm" for node in skeleton.map.writers(edge.name)),
        of_heads=edge.width in ("heads", "kv"),
        repeated=edge.repeat and dims.heads != dims.kv,
        readers=tuple(matrix_of(module.get_submodule(node.path)) for node in readers),
        formats=tuple(
            None if scheme is None else scheme.weight.for_dtype(dtype)
            for scheme, dtype in zip(schemes, stored, strict=True)
        ),
        channels=columns_of(edge, dims).to(run.device),
        width=dims.width(edge.width),
        moments=moments,
        gram=gram,
    )
    scaling = transform.fit(view)
    if scaling is None:
        return None
    factors = scaling.factors
    if not bool((torch.isfinite(factors) & (factors > 0)).all()):
        raise RarefyError(f"{run.stage.name} found no positive, finite factors for {name}")
    fold(module, skeleton.map, edge, 1 / factors.to(run.device), dims)
    return {"edge": name, **scaling.notes}


def _dense(skeleton: Skeleton, module: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """A block's parameters under their stored names and in their stored type.

    Raises:
        RarefyError: a weight has left the range of its type.
    """
    tensors = {}
    for name, parameter in module.named_parameters():
        full = f"{prefix}.{name}"
        owner = full.rpartition(".")[0]
        value = parameter.data.to(DTYPES[skeleton.stored_dtype(owner)]).contiguous()
        if not bool(value.isfinite().all()):
            raise RarefyError(
                f"folding moved {full} out of the range of {value.dtype}; "
                "convert the checkpoint to bfloat16 or float32 first"
            )
        tensors[skeleton.stored_name(full)] = value.cpu()
    return tensors
