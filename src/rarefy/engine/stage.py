"""One stage, from checkpoint to checkpoint: the walk with its reading, writing and accounting."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from rarefy.allocate.base import ALLOCATORS, WidthAllocator
from rarefy.engine.allocation import allocate
from rarefy.engine.capture import capture_all, complete_map
from rarefy.engine.close import account, close, history, write_config
from rarefy.engine.select import select
from rarefy.engine.skeleton import Skeleton, set_matrix
from rarefy.engine.walk import BlockTask, NodeResult, advance, compress_block, rounded_inputs
from rarefy.recipe import describe, format_from
from rarefy.resources import return_freed_memory, return_unused_pages
from rarefy.solvers.base import Solver

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from rarefy.checkpoint.reader import Checkpoint
    from rarefy.checkpoint.writer import Writer
    from rarefy.data.tokens import TokenSet
    from rarefy.engine.capture import Batch
    from rarefy.engine.select import Selection
    from rarefy.formats.activation import Activation
    from rarefy.objectives.rows import Rows
    from rarefy.stages import Stage

    Walk = Callable[["StageRun", Skeleton, Selection], dict[str, float]]


_LARGE = 1 << 24  # bytes of a matrix in fp32 from which on memory is traded for a little time
_RETURNED = 1 << 21  # smaller pieces stay with the C library


@dataclass(frozen=True)
class Watcher:
    """Where news of a run goes; each field may be left at its silent default.

    Attributes:
        say: remarks for a person, one sentence each.
        step: (blocks done, blocks in all) after every block.
        train: (steps done, steps in all) after every step of a training; None: as ``step``.
    """

    say: Callable[[str], None] = field(default=lambda text: None)
    step: Callable[[int, int], None] = field(default=lambda done, total: None)
    train: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class StageRun:
    """What a stage works with.

    Attributes:
        source: the checkpoint it reads.
        stage: what is done to it.
        tokens: calibration rows, or None for a recipe without data.
        writer: the checkpoint it writes.
        watcher: receives remarks and progress.
        device: where the arithmetic happens.
        base: the dense checkpoint that everything began with, which tuners are to match; None if
            that is the source.
        rows: what a model tuner is trained on.
    """

    source: Checkpoint
    stage: Stage
    tokens: TokenSet | None
    writer: Writer
    watcher: Watcher
    device: torch.device
    base: Checkpoint | None = None
    rows: Rows | None = None


def run_stage(run: StageRun, manifest: dict[str, Any], walk: Walk | None = None) -> None:
    """Compress every block, then the matrices outside, then close the new checkpoint.

    Args:
        run: what to do.
        manifest: facts known beforehand; the stage's own are added to what is written.
        walk: writes the blocks that the journal lacks and returns seconds by phase; by default
            the solver's walk.
    """
    start = time.perf_counter()
    skeleton = Skeleton(run.source, run.device)
    complete_map(skeleton)
    chosen = select(skeleton, run.stage)
    inside = {path for block in chosen.blocks for path in block}
    skeleton.split |= any(skeleton.in_experts(f".{path}") for path in inside)
    for note in chosen.notes:
        run.watcher.say(note)
    if skeleton.widest >= _LARGE:
        return_freed_memory(_RETURNED)
    if run.stage.allocator is not None:
        chosen = allocate(run, skeleton, chosen)
    seconds = (walk or _walk)(run, skeleton, chosen)
    if not run.writer.has("outside"):
        _outside(run, skeleton, chosen)
    parts = [f"{i:05d}" for i in range(len(skeleton.blocks))]
    nodes = [dict(node) for part in [*parts, "outside"] for node in run.writer.notes(part)["nodes"]]
    solving = sum(node.pop("seconds") for node in nodes)
    formats = {node["name"]: format_from(node.pop("stored")) for node in nodes}
    write_config(run.writer.folder, skeleton, chosen, formats)
    done = _allocation(run) | _told(run, parts)
    facts = account(skeleton, chosen, nodes) | {"history": history(run, done)}
    close(run, manifest | facts, start - seconds["earlier"], seconds | {"solve": solving})
    run.writer.finish(["outside", *parts])


def _allocation(run: StageRun) -> dict[str, Any]:
    """What the history says of the stage's allocator."""
    allocator = run.stage.allocator
    if allocator is None:
        return {}
    return {
        "allocator": ALLOCATORS.name_of(allocator),
        "allocator_options": dataclasses.asdict(allocator),  # type: ignore[call-overload]
        "bits" if isinstance(allocator, WidthAllocator) else "density": run.writer.notes(
            "allocation"
        ),
    }


def _told(run: StageRun, parts: list[str]) -> dict[str, Any]:
    """What the blocks' entries in the journal say beyond their matrices."""
    told = [run.writer.notes(part).get("facts") for part in parts]
    return {"blocks": told} if any(told) else {}


def _walk(run: StageRun, skeleton: Skeleton, chosen: Selection) -> dict[str, float]:
    """Compress the blocks that the journal lacks; return seconds by phase."""
    count = len(skeleton.blocks)
    earlier = sum(
        run.writer.notes(f"{i:05d}")["seconds"] for i in range(count) if run.writer.has(f"{i:05d}")
    )
    start = time.perf_counter()
    batches: list[Batch] = []
    with torch.no_grad():
        if run.tokens is not None and run.stage.needs:
            batches = capture_all(skeleton, run.tokens.ids)
        captured = time.perf_counter() - start
        for index in range(count):
            if run.writer.has(f"{index:05d}"):
                _replay(run, skeleton, chosen, index, batches)
            else:
                _compress(run, skeleton, chosen, index, batches)
            run.watcher.step(index + 1, count)
    walked = time.perf_counter() - start - captured
    return {"earlier": earlier, "capture": captured, "blocks": walked}


def _compress(
    run: StageRun, skeleton: Skeleton, chosen: Selection, index: int, batches: list[Batch]
) -> None:
    start = time.perf_counter()
    name = f"{skeleton.map.blocks}.{index}"
    with skeleton.block(index) as module:
        task = _task(run, skeleton, chosen, index, module)
        compress_block(task, batches)
    results = {f"{name}.{path}": result for path, result in task.results.items()}
    tensors = untouched(skeleton, f"{name}.", set(results))
    nodes = []
    for node, result in results.items():
        stored = skeleton.stored_name(node)
        tensors |= {f"{stored}.{suffix}": tensor for suffix, tensor in result.packed.items()}
        nodes.append(entry_of(skeleton, node, result))
    notes = {"nodes": nodes, "seconds": time.perf_counter() - start}
    run.writer.add(f"{index:05d}", tensors, notes)
    return_unused_pages()


def _task(
    run: StageRun, skeleton: Skeleton, chosen: Selection, index: int, module: nn.Module
) -> BlockTask:
    """What is to be done to a loaded block."""
    name = f"{skeleton.map.blocks}.{index}"
    assert isinstance(run.stage.method, Solver)
    supports = {path: skeleton.support(f"{name}.{path}") for path in chosen.blocks[index]}
    return BlockTask(
        name=name,
        index=index,
        module=module,
        groups=skeleton.nodes(index).shared_inputs,
        formats=chosen.blocks[index],
        solver=run.stage.method,
        needs=run.stage.needs,
        inputs=inputs_of(skeleton, chosen, index),
        supports={
            path: support.to(run.device)
            for path, support in supports.items()
            if support is not None
        },
        thrifty=skeleton.widest >= _LARGE,
    )


def inputs_of(skeleton: Skeleton, chosen: Selection, index: int) -> dict[str, Activation]:
    """Node path -> rounding of its input, of one block, earlier stages' included."""
    prefix = f"{skeleton.map.blocks}.{index}."
    inputs = skeleton.state.inputs | chosen.inputs
    return {
        name[len(prefix) :]: activation
        for name, activation in inputs.items()
        if name.startswith(prefix)
    }


def _replay(
    run: StageRun, skeleton: Skeleton, chosen: Selection, index: int, batches: list[Batch]
) -> None:
    """Bring the batches through a block that an earlier run finished."""
    if not batches:
        return
    stored = run.writer.read(f"{index:05d}")
    prefix = f"{skeleton.map.blocks}.{index}."
    formats = {
        node["name"][len(prefix) :]: format_from(node["stored"])
        for node in run.writer.notes(f"{index:05d}")["nodes"]
    }
    inputs = inputs_of(skeleton, chosen, index)
    scales = {}
    with skeleton.block(index) as module:
        for path, fmt in formats.items():
            node = skeleton.stored_name(f"{prefix}{path}")
            suffixes = fmt.layout(*skeleton.shape(f"{prefix}{path}"))
            packed = {suffix: stored[f"{node}.{suffix}"] for suffix in suffixes}
            set_matrix(module.get_submodule(path), fmt.decode(packed).to(run.device))
            if f"{node}.input_scale" in stored:
                scales[path] = stored[f"{node}.input_scale"].to(run.device)
        with rounded_inputs(module, inputs, scales):
            advance(module, index, batches)


def _outside(run: StageRun, skeleton: Skeleton, chosen: Selection) -> None:
    """Everything that is not in a block; the embedding and the head are rounded if chosen."""
    nodes, tensors = [], untouched(skeleton, "", set(chosen.outside))
    for name, fmt in chosen.outside.items():
        if name == skeleton.map.head and skeleton.shares_packed_embedding(set(chosen.outside)):
            continue
        start = time.perf_counter()
        source = skeleton.map.embedding if skeleton.tied else name
        weight = skeleton.read(f"{source}.weight").float()
        grid = fmt.fit(weight, support=skeleton.support(name))
        packed = grid.encode(weight)
        seconds = time.perf_counter() - start
        result = NodeResult(packed, grid.form, "nearest", None, 0, seconds)
        stored = skeleton.stored_name(name)
        tensors |= {f"{stored}.{suffix}": tensor for suffix, tensor in packed.items()}
        nodes.append(entry_of(skeleton, name, result))
    run.writer.add("outside", tensors, {"nodes": nodes, "seconds": 0.0})


def untouched(skeleton: Skeleton, prefix: str, compressed: set[str]) -> dict[str, torch.Tensor]:
    """The tensors that pass through a stage, by the name they are stored under.

    Args:
        skeleton: the source.
        prefix: module-side path of a block with a final dot, or "" for all that is outside blocks.
        compressed: module-side names of the matrices that the stage compresses.
    """
    inside = f"{skeleton.map.blocks}."
    tensors: dict[str, torch.Tensor] = {}
    for name in skeleton.parameter_names:
        if not name.startswith(prefix) or (not prefix and name.startswith(inside)):
            continue
        module, _, leaf = name.rpartition(".")
        tied_head = skeleton.tied and module == skeleton.map.head
        if tied_head or (module in compressed and leaf == "weight"):
            continue
        if module in skeleton.earlier and leaf == "weight":
            stored = skeleton.stored_name(module)
            tensors |= {f"{stored}.{k}": v for k, v in skeleton.packed(module).items()}
        else:
            tensors[skeleton.stored_name(name)] = skeleton.read(name)
    return tensors


def entry_of(skeleton: Skeleton, name: str, result: NodeResult) -> dict[str, Any]:
    """What the journal and the manifest say of a compressed matrix."""
    rows, columns = skeleton.shape(name)
    size = sum(tensor.nbytes for tensor in result.packed.values())
    return {
        "name": name,
        "kind": name.rsplit(".", 1)[-1],
        "format": result.format.label(),
        "stored": describe(result.format),
        "solver": result.solver,
        "weights": rows * columns,
        "bytes": size,
        "bits": 8 * size / (rows * columns),
        "error": result.error,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "notes": list(result.notes),
    }
