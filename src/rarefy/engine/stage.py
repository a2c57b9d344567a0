"""One stage, from checkpoint to checkpoint: the walk with its reading, writing and accounting."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from rarefy.checkpoint.travel import travel
from rarefy.checkpoint.writer import write_json
from rarefy.engine.capture import capture_all, complete_map
from rarefy.engine.close import account, write_config
from rarefy.engine.select import select
from rarefy.engine.skeleton import Skeleton, set_matrix
from rarefy.engine.walk import BlockTask, NodeResult, advance, compress_block
from rarefy.resources import peak_memory, return_freed_memory
from rarefy.solvers.base import SOLVERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from rarefy.checkpoint.reader import Checkpoint
    from rarefy.checkpoint.writer import Writer
    from rarefy.data.tokens import TokenSet
    from rarefy.engine.capture import Batch
    from rarefy.engine.select import Selection
    from rarefy.recipe import Stage


_LARGE = 1 << 24  # bytes of a matrix in fp32 from which on memory is traded for a little time
_RETURNED = 1 << 21  # smaller pieces stay with the C library


@dataclass(frozen=True)
class Watcher:
    """Where news of a run goes; each field may be left at its silent default.

    Attributes:
        say: remarks for a person, one sentence each.
        step: (blocks done, blocks in all) after every block.
    """

    say: Callable[[str], None] = field(default=lambda text: None)
    step: Callable[[int, int], None] = field(default=lambda done, total: None)


@dataclass(frozen=True)
class StageRun:
    """What a stage works with.

    Attributes:
        source: the checkpoint it reads.
        stage: solver and scheme table.
        tokens: calibration rows, or None for a recipe without data.
        writer: the checkpoint it writes.
        watcher: receives remarks and progress.
        device: where the arithmetic happens.
    """

    source: Checkpoint
    stage: Stage
    tokens: TokenSet | None
    writer: Writer
    watcher: Watcher
    device: torch.device


def run_stage(run: StageRun, manifest: dict[str, Any]) -> None:
    """Compress every block, then the matrices outside, then close the new checkpoint.

    Args:
        run: what to do.
        manifest: facts known beforehand; the stage's own are added to what is written.
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
    seconds = _walk(run, skeleton, chosen)
    if not run.writer.has("outside"):
        _outside(run, skeleton, chosen)
    parts = [f"{i:05d}" for i in range(len(skeleton.blocks))]
    nodes = [node for part in [*parts, "outside"] for node in run.writer.notes(part)["nodes"]]
    timings = {
        "seconds": seconds["earlier"] + time.perf_counter() - start,
        "timings": seconds | {"solve": sum(node.pop("seconds") for node in nodes)},
        "peak_memory_bytes": peak_memory(),
    }
    folder = run.writer.folder
    write_config(folder, skeleton, chosen)
    write_json(folder / "manifest.json", manifest | account(skeleton, chosen, nodes))
    write_json(folder / "timings.json", timings)
    travel(run.source.path, folder)
    run.writer.finish(["outside", *parts])


def _walk(run: StageRun, skeleton: Skeleton, chosen: Selection) -> dict[str, float]:
    """Compress the blocks that the journal lacks; return seconds by phase."""
    count = len(skeleton.blocks)
    earlier = sum(
        run.writer.notes(f"{i:05d}")["seconds"] for i in range(count) if run.writer.has(f"{i:05d}")
    )
    start = time.perf_counter()
    batches: list[Batch] = []
    with torch.no_grad():
        if run.tokens is not None and run.stage.solver.needs_gram:
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
        task = BlockTask(
            name, index, module, skeleton.map.shared_inputs, chosen.blocks[index], run.stage.solver
        )
        compress_block(task, batches)
    results = {f"{name}.{path}": result for path, result in task.results.items()}
    formats = {f"{name}.{path}": fmt for path, fmt in chosen.blocks[index].items()}
    tensors = untouched(skeleton, f"{name}.", set(results))
    nodes = []
    for node, result in results.items():
        stored = skeleton.stored_name(node)
        tensors |= {f"{stored}.{suffix}": tensor for suffix, tensor in result.packed.items()}
        nodes.append(_entry(run, skeleton, node, formats[node].label(), result))
    notes = {"nodes": nodes, "seconds": time.perf_counter() - start}
    run.writer.add(f"{index:05d}", tensors, notes)


def _replay(
    run: StageRun, skeleton: Skeleton, chosen: Selection, index: int, batches: list[Batch]
) -> None:
    """Bring the batches through a block that an earlier run finished."""
    if not batches:
        return
    stored = run.writer.read(f"{index:05d}")
    with skeleton.block(index) as module:
        for path, fmt in chosen.blocks[index].items():
            node = skeleton.stored_name(f"{skeleton.map.blocks}.{index}.{path}")
            shape = stored[f"{node}.weight_shape"].tolist()
            packed = {s: stored[f"{node}.{s}"] for s in fmt.layout(shape[0], shape[1])}
            set_matrix(module.get_submodule(path), fmt.decode(packed).to(run.device))
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
        packed = fmt.fit(weight).encode(weight)
        result = NodeResult(packed, None, 0, time.perf_counter() - start)
        stored = skeleton.stored_name(name)
        tensors |= {f"{stored}.{suffix}": tensor for suffix, tensor in packed.items()}
        nodes.append(_entry(run, skeleton, name, fmt.label(), result))
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


def _entry(
    run: StageRun, skeleton: Skeleton, name: str, label: str, result: NodeResult
) -> dict[str, Any]:
    """What the manifest says of a compressed matrix."""
    rows, columns = skeleton.shape(name)
    size = sum(tensor.nbytes for tensor in result.packed.values())
    data_free = result.error is None
    return {
        "name": name,
        "kind": name.rsplit(".", 1)[-1],
        "format": label,
        "solver": "nearest" if data_free else SOLVERS.name_of(run.stage.solver),
        "weights": rows * columns,
        "bytes": size,
        "bits": 8 * size / (rows * columns),
        "error": result.error,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "notes": list(result.notes),
    }
